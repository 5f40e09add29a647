"""The last step boundary can be had back until an update begins, and a bad batch leaves no trace in the buffers."""

import pytest
import torch
from torch import nn

from tagger.boundary import StepBoundary

CPU = torch.device("cpu")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def test_generators_and_buffers_come_back() -> None:
    model = net()
    boundary = StepBoundary(model, CPU)
    model(torch.randn(8, 4))
    boundary.mark()
    before = [buffer.clone() for buffer in model.buffers()]
    expected = torch.rand(3)
    model(100 * torch.randn(8, 4))
    boundary.restore()
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))
    assert torch.equal(torch.rand(3), expected)


def test_an_update_under_way_cannot_be_taken_back() -> None:
    boundary = StepBoundary(net(), CPU)
    boundary.begin_update()
    assert not boundary.intact
    with pytest.raises(AssertionError, match="under way"):
        boundary.restore()
    boundary.mark()
    assert boundary.intact


@pytest.mark.parametrize("left_out", [True, False])
def test_statistics_of_a_left_out_batch_stay_out(left_out: bool) -> None:
    model = net()
    boundary = StepBoundary(model, CPU)
    before = [buffer.clone() for buffer in model.buffers()]
    model(torch.full((8, 4), float("nan")))
    boundary.undo_buffers(torch.tensor(left_out))
    same = [torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True)]
    assert all(same) if left_out else not any(same)
