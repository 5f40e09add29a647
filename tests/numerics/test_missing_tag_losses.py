"""Hill loss and SPLC against their formulas in float64 (Zhang et al. 2021), and when SPLC corrects."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from Configuration_System import LossSection
from loss_functions import HillLoss, MultiTaskLoss, SelfPacedCorrectionLoss, create_loss
from tests.numerics.test_losses import as_lists, some_logits, some_targets, value_and_gradient


def focal_margin(logits: Tensor, gamma: float = 2.0, shift: float = 1.0) -> Tensor:
    return -(torch.sigmoid(shift - logits) ** gamma) * F.logsigmoid(logits - shift)


def hill(logits: Tensor, targets: Tensor) -> Tensor:
    p = torch.sigmoid(logits)
    return torch.where(targets, focal_margin(logits), (1.5 - p) * p**2).sum()


def splc(logits: Tensor, targets: Tensor, above: float | None) -> Tensor:
    p = torch.sigmoid(logits)
    absent = -(p**2) * F.logsigmoid(-logits)
    if above is not None:
        absent = torch.where(p > above, focal_margin(logits, shift=0.0), absent)
    return torch.where(targets, focal_margin(logits), absent).sum()


@pytest.mark.parametrize("kind", ["random", "extreme"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize("above", [None, 0.6, 0.9])
def test_values_and_gradients_equal_the_formulas(kind, dtype, tolerance, above):
    logits = some_logits(kind, dtype).clamp(-30, 30)
    targets = some_targets(logits)
    corrected = SelfPacedCorrectionLoss(above or 0.6)
    corrected.begin_epoch(0 if above is None else 1)
    for loss, expected_of in ((HillLoss(), hill), (corrected, lambda *a: splc(*a, above))):
        exact = logits.double().requires_grad_()
        expected = expected_of(exact, targets)
        (gradient,) = torch.autograd.grad(expected, exact)
        for form in ((targets,), as_lists(targets)):
            value, ours = value_and_gradient(loss, logits, *form)
            assert value.item() == pytest.approx(expected.item(), rel=tolerance)
            torch.testing.assert_close(ours.double(), gradient, rtol=tolerance, atol=1e-12)


def test_confident_mistakes_on_absent_tags_pull_less_under_hill_loss():
    logits = torch.tensor([[-4.0, 0.0, 6.0]])
    _, gradient = value_and_gradient(HillLoss(), logits, torch.zeros(1, 3))
    assert gradient[0, 0] < gradient[0, 1] > gradient[0, 2] > 0


def test_correction_begins_with_the_second_epoch_and_pulls_sure_absent_tags_up():
    loss, logits, absent = SelfPacedCorrectionLoss(0.6), torch.tensor([[0.3, 0.5]]), torch.zeros(1, 2)
    directions = []
    for epoch in (0, 1, 0, 5):
        loss.begin_epoch(epoch)
        directions.append(value_and_gradient(loss, logits, absent)[1].sign().tolist()[0])
    # The logit of 0.6 is 0.41.
    assert directions == [[1, 1], [1, -1], [1, 1], [1, -1]]


def test_a_validation_loss_is_of_the_tags_as_listed():
    loss, logits = SelfPacedCorrectionLoss(), some_logits("random")
    targets = some_targets(logits)
    with torch.inference_mode():
        before = loss(logits, targets)
        loss.begin_epoch(3)
        assert loss(logits, targets) == before
    assert loss(logits, targets) != before


def test_correction_reaches_the_tags_of_a_multi_task_loss_and_no_state_dict():
    loss = MultiTaskLoss(SelfPacedCorrectionLoss(), (0, 1), 1.0)
    loss.begin_epoch(1)
    logits = torch.full((1, 3), 4.0)
    _, gradient = value_and_gradient(loss, logits, torch.zeros(1, 3))
    assert gradient[0, 2] < 0
    assert not loss.state_dict()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: HillLoss(height=0.5), "height=0.5"),
        (lambda: HillLoss(gamma=-1), "gamma=-1"),
        (lambda: HillLoss(shift=-1), "shift=-1"),
        (lambda: SelfPacedCorrectionLoss(1.0), "correct_above=1.0"),
        (lambda: LossSection(correct_above=0.0), r"loss\.correct_above=0\.0"),
        (lambda: LossSection(chunk_tags=0), r"loss\.chunk_tags=0"),
    ],
)
def test_settings_outside_their_range_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_recipe_names_them():
    assert isinstance(create_loss(LossSection(name="hill")), HillLoss)
    loss = create_loss(LossSection(name="splc", correct_above=0.8))
    assert isinstance(loss, SelfPacedCorrectionLoss) and loss.correct_above == 0.8
