"""The compiled pass over the logits: what it keeps, that one compilation serves, and that it equals the formula."""

from typing import Any

import pytest
import torch
from torch import Tensor

from loss_functions import (
    AsymmetricFocalLoss,
    BinaryCrossEntropy,
    FocalLoss,
    HillLoss,
    MultiTaskLoss,
    SelfPacedCorrectionLoss,
    TagLoss,
)
from tagger.compilation import missing_compiler
from tagger.losses import summed
from tests.numerics.test_losses import as_lists, formula, some_logits, some_targets, value_and_gradient


@pytest.mark.parametrize(
    ("dtype", "kept"), [(torch.bfloat16, 2), (torch.float16, 2), (torch.float32, 4), (torch.float64, 8)]
)
def test_autograd_keeps_two_bytes_for_a_logit_of_sixteen_bits(dtype, kept):
    logits = some_logits("random", dtype).requires_grad_()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        AsymmetricFocalLoss()(logits, *as_lists(some_targets(logits)))
    assert sum(tensor.nbytes for tensor in saved) == kept * logits.numel()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Graphs that were captured since; they are run as they are, which needs no compiler."""
    captured: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        captured.append(graph)
        return graph

    compiled = torch.compile(summed.price_rows, fullgraph=True, backend=backend)
    monkeypatch.setattr(summed, "_compiled", lambda: compiled)
    torch._dynamo.reset()
    return captured


def test_one_compilation_serves_batches_of_all_sizes(graphs):
    loss, plain = AsymmetricFocalLoss(tag_weights=torch.linspace(0.5, 2, 50)), AsymmetricFocalLoss()
    plain.tag_weights = loss.tag_weights
    loss.use_compiled()
    for rows in (24, 9, 2, 17):
        logits = some_logits("random", torch.bfloat16)[:rows]
        lists = as_lists(some_targets(logits))
        torch.testing.assert_close(value_and_gradient(loss, logits, *lists), value_and_gradient(plain, logits, *lists))
    assert len(graphs) == 1


def test_correction_begins_without_a_new_compilation(graphs):
    loss = SelfPacedCorrectionLoss()
    loss.use_compiled()
    logits = some_logits("random")
    lists = as_lists(some_targets(logits))
    values = []
    for epoch in (0, 1, 2):
        loss.begin_epoch(epoch)
        values.append(value_and_gradient(loss, logits, *lists)[0])
    assert values[0] != values[1] == values[2]
    assert len(graphs) == 1


def test_the_tag_part_of_a_multi_task_loss_is_compiled(graphs):
    loss, plain = (MultiTaskLoss(FocalLoss(), (1, 2), 0.5) for _ in range(2))
    loss.use_compiled()
    logits = some_logits("random")
    lists = as_lists(some_targets(logits))
    torch.testing.assert_close(value_and_gradient(loss, logits, *lists), value_and_gradient(plain, logits, *lists))
    assert graphs


def correcting() -> TagLoss:
    loss = SelfPacedCorrectionLoss()
    loss.begin_epoch(1)
    return loss


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler(torch.device("cpu")) is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "make",
    [
        AsymmetricFocalLoss,
        lambda: AsymmetricFocalLoss(7, 1, 0.2, tag_weights=torch.linspace(0.1, 2, 50), ignored_tags=(3, 8)),
        BinaryCrossEntropy,
        HillLoss,
        correcting,
    ],
)
def test_inductor_gives_what_the_uncompiled_pass_gives(make):
    torch._dynamo.reset()
    loss, plain = make(), make()
    loss.use_compiled()
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("random", "near the margin", "extreme"):
            logits = some_logits(kind, dtype)[:, :42].repeat(1, 2)[:, :50]
            lists = as_lists(some_targets(logits))
            value, gradient = value_and_gradient(loss, logits, *lists)
            expected, expected_gradient = value_and_gradient(plain, logits, *lists)
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
            rounding = 3e-6 if dtype == torch.float32 else 2**-7
            torch.testing.assert_close(gradient, expected_gradient, rtol=rounding, atol=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler(torch.device("cpu")) is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), [(4, 0, 0.05), (2, 2, 0.0)])
def test_inductor_equals_the_formula_in_float64(gamma_neg, gamma_pos, clip):
    torch._dynamo.reset()
    loss = AsymmetricFocalLoss(gamma_neg, gamma_pos, clip)
    loss.use_compiled()
    for kind in ("random", "near the margin", "extreme"):
        logits = some_logits(kind).clamp(-30, 30)[:, :22].repeat(1, 2)
        targets = some_targets(logits)
        exact = logits.double().requires_grad_()
        expected = formula(exact, targets, gamma_neg, gamma_pos, clip).sum()
        (expected_gradient,) = torch.autograd.grad(expected, exact)
        value, gradient = value_and_gradient(loss, logits, *as_lists(targets))
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=3e-6, atol=1e-12)
