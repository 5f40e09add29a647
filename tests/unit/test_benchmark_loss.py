"""The two sides of the loss benchmark compute the same, and what it counts is what it says."""

import pytest
import torch

from loss_functions import AsymmetricFocalLoss
from scripts.benchmark_loss import kept_bytes, make_data, measure_chunks, usual_loss


def test_both_sides_are_the_same_loss() -> None:
    data = make_data(8, 300)
    values, gradients = [], []
    for loss in (
        lambda logits: usual_loss(logits, data.dense),
        lambda logits: AsymmetricFocalLoss()(logits, data.indices, data.offsets),
    ):
        logits = data.logits.float().requires_grad_()
        value = loss(logits)
        values.append(value.item())
        gradients.append(torch.autograd.grad(value, logits)[0])
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


def test_what_autograd_keeps_is_counted_once_and_without_the_logits() -> None:
    data = make_data(8, 300)
    assert kept_bytes(lambda logits: AsymmetricFocalLoss()(logits, data.indices, data.offsets), data.logits) == 2
    assert kept_bytes(lambda logits: (logits.float().exp() ** 2).sum(), data.logits) == 4
    assert kept_bytes(lambda logits: (logits * logits).sum(), data.logits) == 0


def test_chunks_are_measured() -> None:
    at_once, in_chunks = measure_chunks(make_data(4, 50), 1)
    assert at_once > 0 and in_chunks > 0
