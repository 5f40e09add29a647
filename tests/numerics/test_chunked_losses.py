"""Head and loss in chunks of tags: the same numbers as at once, and never a whole table of logits."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from Configuration_System import ModelSection
from loss_functions import (
    AsymmetricFocalLoss,
    BinaryCrossEntropy,
    HillLoss,
    MultiTaskLoss,
    SelfPacedCorrectionLoss,
    TagLoss,
)
from model_architecture import create_model
from tagger.objective import TrainingObjective

ROWS, WIDTH, TAGS = 6, 5, 23
# The third row lists nothing, the last one a tag twice.
INDICES = torch.tensor([0, 7, 22, 7, 8, 3, 21, 1, 6, 6, 0], dtype=torch.int32)
OFFSETS = torch.tensor([0, 3, 5, 5, 7, 8, 11], dtype=torch.int32)


def correcting() -> TagLoss:
    loss = SelfPacedCorrectionLoss(0.5)
    loss.begin_epoch(1)
    return loss


LOSSES = [
    AsymmetricFocalLoss(),
    AsymmetricFocalLoss(7, 1, tag_weights=torch.linspace(0.1, 2, TAGS), ignored_tags=(0, 8, 20), reduction="mean"),
    BinaryCrossEntropy(),
    HillLoss(),
    correcting(),
    MultiTaskLoss(AsymmetricFocalLoss(ignored_tags=(4,)), (7, 0, 22), 0.5),
    MultiTaskLoss(BinaryCrossEntropy(reduction="mean"), (1, 2), 2.0),
]


def some_head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((ROWS, WIDTH), (TAGS, WIDTH), (TAGS,))
    features, weight, bias = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return features.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("chunk_tags", [1, 7, TAGS - 1, TAGS, TAGS + 9])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_chunks_give_the_same_value_and_gradients(loss, chunk_tags):
    head = some_head()
    features, weight, bias = head
    expected = loss(nn.functional.linear(features, weight, bias), INDICES, OFFSETS)
    wanted = torch.autograd.grad(3 * expected, head)
    value = loss.through_head(*head, INDICES, OFFSETS, chunk_tags=chunk_tags, dtype=torch.float64)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(3 * value, head), wanted, rtol=1e-11, atol=1e-13)


def test_gradients_pass_gradcheck():
    def run(*head: Tensor) -> Tensor:
        return LOSSES[5].through_head(*head, INDICES, OFFSETS, chunk_tags=4, dtype=torch.float64)  # type: ignore[operator]

    assert torch.autograd.gradcheck(run, some_head())


def test_a_nan_in_one_chunk_makes_the_loss_nan_and_only_its_own_gradient():
    features, weight, bias = some_head()
    with torch.no_grad():
        bias[9] = math.nan
    loss = BinaryCrossEntropy().through_head(
        features, weight, bias, INDICES, OFFSETS, chunk_tags=4, dtype=torch.float64
    )
    assert loss.isnan()
    loss.backward()
    assert bias.grad is not None
    assert [tag for tag in range(TAGS) if bias.grad[tag].isnan()] == [9]


class LargestTable(TorchDispatchMode):
    """Most elements of any tensor that an operation gives out, in tables of as many rows as the batch has."""

    columns = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.shape[0] == ROWS:
                self.columns = max(self.columns, tensor.shape[1])
        return out


def test_logits_never_exist_as_a_whole():
    head = some_head()
    with LargestTable() as seen:
        AsymmetricFocalLoss().through_head(*head, INDICES, OFFSETS, chunk_tags=6, dtype=torch.float64).backward()
    assert seen.columns == 6
    with LargestTable() as seen:
        AsymmetricFocalLoss()(nn.functional.linear(*head), INDICES, OFFSETS).backward()
    assert seen.columns == TAGS


def test_what_needs_no_gradient_gets_none():
    features, weight, bias = some_head()
    features = features.detach()
    loss = BinaryCrossEntropy().through_head(
        features, weight, bias, INDICES, OFFSETS, chunk_tags=4, dtype=torch.float64
    )
    loss.backward()
    assert features.grad is None and weight.grad is not None and bias.grad is not None
    with torch.no_grad():
        same = BinaryCrossEntropy().through_head(
            features, weight, bias, INDICES, OFFSETS, chunk_tags=4, dtype=torch.float64
        )
    assert same == loss and not same.requires_grad


SECTION = ModelSection(embed_dim=16, depth=2, num_heads=2, patch_size=8)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_objective_in_chunks_trains_like_one_at_once(dtype):
    torch.manual_seed(0)
    model = create_model(SECTION, TAGS, 16)
    images = torch.randint(0, 256, (ROWS, 3, 16, 16), dtype=torch.uint8)
    sizes = torch.full((ROWS, 2), 16)
    results = []
    for chunk_tags in (None, 7):
        objective = TrainingObjective(model, AsymmetricFocalLoss(), chunk_tags)
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = objective(images, sizes, INDICES, OFFSETS)
        assert loss.dtype == torch.float32
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        results.append((loss.detach(), gradients))
    (loss, gradients), (other_loss, others) = results
    torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=0)
    rounding = 1e-5 if dtype is None else 2e-2
    for ours, theirs in zip(others, gradients, strict=True):
        assert float((ours - theirs).norm()) <= rounding * float(theirs.norm()) + 1e-9


def test_float16_chunks_keep_small_gradients_that_the_loss_scale_lifts():
    features, weight, bias = some_head(torch.float32)
    with torch.no_grad():
        bias.fill_(-18)  # slopes of about 1e-8, below the smallest float16
    loss = BinaryCrossEntropy().through_head(
        features, weight, bias, INDICES[:0], torch.zeros(ROWS + 1, dtype=torch.int32), chunk_tags=5, dtype=torch.float16
    )
    (loss * 65536).backward()
    assert bias.grad is not None
    exact = torch.sigmoid(nn.functional.linear(features, weight, bias)).sum(0)
    torch.testing.assert_close(bias.grad / 65536, exact, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("model", "chunk_tags", "words"),
    [(create_model(SECTION, TAGS, 16), 0, "chunk_tags=0 is below 1"), (nn.Linear(2, 3), 4, "forward_features")],
)
def test_chunks_that_cannot_be_are_refused(model, chunk_tags, words):
    with pytest.raises(ValueError, match=words):
        TrainingObjective(model, BinaryCrossEntropy(), chunk_tags)


def test_bad_lists_are_refused_in_chunks_too():
    with pytest.raises(ValueError, match="tag_indices holds 23"):
        BinaryCrossEntropy().through_head(*some_head(), INDICES + 1, OFFSETS, chunk_tags=4, dtype=torch.float64)
    with pytest.raises(ValueError, match="holds 30 and logits have 23"):
        loss = MultiTaskLoss(BinaryCrossEntropy(), (2, 30), 1.0)
        loss.through_head(*some_head(), INDICES, OFFSETS, chunk_tags=4, dtype=torch.float64)
