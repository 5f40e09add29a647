"""Losses against their formulas in float64, torch and finite differences; then the properties that hold for all."""

import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from Configuration_System import LossSection
from loss_functions import (
    LOSSES,
    AsymmetricFocalLoss,
    BinaryCrossEntropy,
    FocalLoss,
    HillLoss,
    MultiTaskLoss,
    SelfPacedCorrectionLoss,
    TagLoss,
    create_loss,
    tag_weights_from_counts,
)
from tagger import tag_lists
from tagger.losses import summed

SETTINGS = [
    (4, 0, 0.05),
    (7, 0, 0.05),
    (4, 1, 0.05),
    (2, 2, 0.0),
    (0, 0, 0.0),
    (0, 0, 0.05),
    (2.5, 0.5, 0.2),
    (0.5, 1.5, 0.05),
]


def formula(logits: Tensor, targets: Tensor, gamma_neg: float, gamma_pos: float, clip: float) -> Tensor:
    """Ridnik et al. 2021 in float64, per element; logarithms taken where they keep their digits."""
    x, y = logits.double(), targets.double()
    p, not_p = torch.sigmoid(x), torch.sigmoid(-x)
    positive = -(not_p**gamma_pos) * F.logsigmoid(x)
    shifted = (p - clip).clamp(min=0)
    log_rest = torch.where(p < 0.5, torch.log1p(-shifted), torch.log(not_p + clip)) if clip else F.logsigmoid(-x)
    return y * positive - (1 - y) * shifted**gamma_neg * log_rest


def some_logits(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if kind == "random":
        return (torch.randn(24, 50, generator=generator) * 4).to(dtype)
    if kind == "near the margin":
        return (torch.randn(24, 50, generator=generator) * 0.05 + math.log(0.05 / 0.95)).to(dtype)
    extreme = torch.tensor([0.0, 1e-4, 1.0, 17.0, 20.5, 40.0, 88.0, 90.0, 104.0, 500.0, 1e4])
    return torch.cat([extreme, -extreme]).repeat(24, 2).to(dtype)


def some_targets(logits: Tensor, share: float = 0.2) -> Tensor:
    return torch.rand(logits.shape, generator=torch.Generator().manual_seed(4)) < share


def as_lists(targets: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = targets.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(targets))
    return columns.int(), torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0).int()])


def value_and_gradient(loss: torch.nn.Module, logits: Tensor, *targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, *targets)
    value.backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), SETTINGS)
@pytest.mark.parametrize("kind", ["random", "near the margin", "extreme"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-7)])
def test_asymmetric_loss_equals_the_formula_in_float64(gamma_neg, gamma_pos, clip, kind, dtype, tolerance):
    logits = some_logits(kind, dtype)
    targets = some_targets(logits)
    exact = logits.double().requires_grad_()
    expected = formula(exact, targets, gamma_neg, gamma_pos, clip).sum()
    loss = AsymmetricFocalLoss(gamma_neg, gamma_pos, clip)
    for form in ((targets,), (targets.float(),), (targets.long(),), as_lists(targets)):
        value = loss(logits, *form)
        assert value.dtype == dtype
        assert value.item() == pytest.approx(expected.item(), rel=tolerance)


@given(
    logit=st.floats(-1e4, 1e4, width=32) | st.floats(-30, 30, width=32),
    present=st.booleans(),
    settings_index=st.integers(0, len(SETTINGS) - 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=300, deadline=None)
def test_each_single_cost_equals_the_formula(logit, present, settings_index, dtype):
    gamma_neg, gamma_pos, clip = SETTINGS[settings_index]
    # The oracle subtracts the margin from the probability and has no digits left right at it.
    assume(not clip or abs(logit - math.log(clip / (1 - clip))) > 1e-4)
    logits, targets = torch.tensor([[logit]], dtype=dtype), torch.tensor([[present]])
    expected = formula(logits, targets, gamma_neg, gamma_pos, clip).item()
    value, gradient = value_and_gradient(AsymmetricFocalLoss(gamma_neg, gamma_pos, clip), logits, targets)
    relative = 2e-6 if dtype == torch.float32 else 1e-9
    assert value.item() == pytest.approx(expected, rel=relative, abs=1e-36)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), SETTINGS)
@pytest.mark.parametrize("kind", ["random", "extreme"])
def test_float32_gradient_equals_the_derivative_of_the_formula(gamma_neg, gamma_pos, clip, kind):
    logits = some_logits(kind)
    if kind == "extreme":  # autograd of the formula itself is not finite further out
        logits = logits.clamp(-30, 30)
    targets = some_targets(logits)
    exact = logits.double().requires_grad_()
    formula(exact, targets, gamma_neg, gamma_pos, clip).sum().backward()
    _, gradient = value_and_gradient(AsymmetricFocalLoss(gamma_neg, gamma_pos, clip), logits, targets)
    if gamma_neg < 1:  # 0 * inf in autograd of the formula where the cost is flat
        exact.grad = exact.grad.nan_to_num(0.0)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=3e-6, atol=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        *(AsymmetricFocalLoss(*setting) for setting in SETTINGS),
        FocalLoss(2.0, alpha=0.25),
        FocalLoss(1.5),
        BinaryCrossEntropy(),
        HillLoss(),
        SelfPacedCorrectionLoss(),
        AsymmetricFocalLoss(tag_weights=torch.linspace(0.1, 2, 6), ignored_tags=(4,), reduction="mean"),
        MultiTaskLoss(AsymmetricFocalLoss(), (1, 3, 5), 0.7),
        MultiTaskLoss(BinaryCrossEntropy(reduction="mean"), (0, 2), 2.0),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_gradient_passes_gradcheck(loss):
    # Drawn away from every margin's kink: logit(0.05) = -2.94 and logit(0.2) = -1.39.
    logits = torch.empty(2, 6, dtype=torch.float64).uniform_(-1.2, 4, generator=torch.Generator().manual_seed(1))
    logits[0] = torch.tensor([-6.0, -5.0, -4.0, -3.5, -9.0, -2.0])
    logits.requires_grad_()
    targets = some_targets(logits, 0.4)
    assert torch.autograd.gradcheck(loss, (logits, targets))
    assert torch.autograd.gradcheck(loss, (logits, *as_lists(targets)))
    soft = torch.rand(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(loss, (logits, soft))


@pytest.mark.parametrize(
    "loss",
    [AsymmetricFocalLoss(), AsymmetricFocalLoss(2.5, 0.5, 1e-30), FocalLoss(), BinaryCrossEntropy(), HillLoss()],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_huge_logits_give_finite_values_and_gradients(loss, dtype):
    logits = some_logits("extreme", dtype)
    targets = some_targets(logits, 0.5)
    value, gradient = value_and_gradient(loss, logits, targets)
    assert value.isfinite()
    assert bool(gradient.isfinite().all())
    assert gradient.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_computed_in_float32_also_under_autocast(dtype):
    logits = some_logits("random", dtype)
    lists = as_lists(some_targets(logits))
    for loss in (AsymmetricFocalLoss(), MultiTaskLoss(AsymmetricFocalLoss(), (0, 1), 1.0)):
        value, gradient = value_and_gradient(loss, logits.float(), *lists)
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                half_value, half_gradient = value_and_gradient(loss, logits, *lists)
                exact_value, _ = value_and_gradient(loss, logits.double(), *lists)
            assert half_value.dtype == torch.float32
            assert exact_value.dtype == torch.float64
            torch.testing.assert_close(half_value, value, rtol=0, atol=0)
            # Kept in bfloat16: float16 has more digits, but not for what is below 6e-8.
            rounding = 0.0 if dtype == torch.bfloat16 else 2**-8
            torch.testing.assert_close(half_gradient, gradient.to(dtype), rtol=rounding, atol=rounding * 2e-5)


def test_binary_cross_entropy_equals_torch():
    logits = some_logits("random")
    targets = some_targets(logits)
    expected = logits.clone().requires_grad_()
    reference = F.binary_cross_entropy_with_logits(expected, targets.float(), reduction="sum")
    reference.backward()
    value, gradient = value_and_gradient(BinaryCrossEntropy(), logits, targets)
    torch.testing.assert_close(value, reference.detach())
    torch.testing.assert_close(gradient, expected.grad)


@pytest.mark.parametrize("alpha", [None, 0.25])
def test_focal_loss_equals_its_formula(alpha):
    logits = some_logits("random", torch.float64)
    targets = some_targets(logits)
    truth = torch.where(targets, logits, -logits)
    weight = 1.0 if alpha is None else torch.where(targets, alpha, 1 - alpha)
    expected = -(weight * torch.sigmoid(-truth) ** 2 * F.logsigmoid(truth)).mean()
    torch.testing.assert_close(FocalLoss(2.0, alpha, reduction="mean")(logits, targets), expected, rtol=1e-12, atol=0)


def test_asymmetric_loss_with_equal_sides_and_no_margin_is_focal_loss():
    logits = some_logits("extreme")
    targets = some_targets(logits)
    assert AsymmetricFocalLoss(2, 2, 0)(logits, targets) == FocalLoss(2)(logits, targets)


def test_absent_tags_below_the_margin_cost_nothing():
    logits = torch.tensor([[-1e4, -10.0, -3.0, math.log(0.05 / 0.95)]])
    for gamma in (0.0, 0.5, 4.0):
        value, gradient = value_and_gradient(AsymmetricFocalLoss(gamma), logits, torch.zeros(1, 4))
        assert value == pytest.approx(0.0, abs=1e-8)
        assert bool((gradient[:, :3] == 0).all())


def test_lists_and_multi_hot_targets_agree():
    logits = some_logits("random")
    targets = some_targets(logits)
    targets[3] = False
    targets[7] = True
    indices, offsets = as_lists(targets)
    for loss in (AsymmetricFocalLoss(), MultiTaskLoss(FocalLoss(reduction="mean"), (2, 4, 9), 0.5)):
        dense = value_and_gradient(loss, logits, targets)
        for lists in ((indices, offsets), (indices.long(), offsets.long())):
            listed = value_and_gradient(loss, logits, *lists)
            torch.testing.assert_close(listed, dense)


def test_a_tag_listed_twice_counts_once():
    logits = some_logits("random")[:2, :6]
    for loss in (AsymmetricFocalLoss(), MultiTaskLoss(AsymmetricFocalLoss(), (0, 4, 5), 0.5)):
        once = value_and_gradient(loss, logits, torch.tensor([4, 1, 0]), torch.tensor([0, 2, 3]))
        twice = value_and_gradient(loss, logits, torch.tensor([4, 1, 4, 0, 0]), torch.tensor([0, 3, 5]))
        torch.testing.assert_close(twice, once)


def test_no_listed_tag_means_all_absent():
    logits = some_logits("random")
    none = (torch.zeros(0, dtype=torch.int32), torch.zeros(len(logits) + 1, dtype=torch.int32))
    assert AsymmetricFocalLoss()(logits, *none) == AsymmetricFocalLoss()(logits, torch.zeros_like(logits))


def test_targets_between_zero_and_one_mix_both_sides():
    logits = some_logits("random", torch.float64)
    loss = AsymmetricFocalLoss()
    absent, present = loss(logits, torch.zeros_like(logits)), loss(logits, torch.ones_like(logits))
    mixed = loss(logits, torch.full_like(logits, 0.3))
    torch.testing.assert_close(mixed, 0.3 * present + 0.7 * absent)


def test_blocks_do_not_change_the_result(monkeypatch):
    logits = some_logits("random")
    targets = some_targets(logits)
    whole = value_and_gradient(AsymmetricFocalLoss(), logits, targets)
    monkeypatch.setattr(summed, "_CPU_BLOCK", 7)
    torch.testing.assert_close(value_and_gradient(AsymmetricFocalLoss(), logits, targets), whole)


def test_logits_that_are_not_contiguous_are_read_right():
    logits = some_logits("random")
    targets = some_targets(logits)
    turned = logits.t().contiguous().t()
    expected = value_and_gradient(AsymmetricFocalLoss(), logits, targets)
    torch.testing.assert_close(value_and_gradient(AsymmetricFocalLoss(), turned, targets), expected)


def test_tag_weights_multiply_each_column():
    logits = some_logits("random", torch.float64)
    targets = some_targets(logits)
    weights = torch.linspace(0, 3, logits.shape[1], dtype=torch.float64)
    expected = (formula(logits, targets, 4, 0, 0.05) * weights).sum()
    torch.testing.assert_close(AsymmetricFocalLoss(tag_weights=weights)(logits, targets), expected)


def test_ignored_tags_add_no_value_and_no_gradient_even_when_not_finite():
    logits = some_logits("random")
    targets = some_targets(logits)
    kept = [tag for tag in range(logits.shape[1]) if tag not in (0, 7)]
    loss = AsymmetricFocalLoss(ignored_tags=(7, 0), reduction="mean")
    expected, expected_gradient = value_and_gradient(
        AsymmetricFocalLoss(reduction="mean"), logits[:, kept], targets[:, kept]
    )
    logits[:, 7] = math.nan
    for form in ((targets,), as_lists(targets)):
        value, gradient = value_and_gradient(loss, logits, *form)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient[:, kept], expected_gradient)
        assert bool((gradient[:, [0, 7]] == 0).all())


def test_mean_is_the_sum_over_the_number_of_counted_costs():
    logits = some_logits("random")
    targets = some_targets(logits)
    total, mean = AsymmetricFocalLoss()(logits, targets), AsymmetricFocalLoss(reduction="mean")(logits, targets)
    torch.testing.assert_close(mean, total / logits.numel())


@pytest.mark.parametrize(
    "loss", [AsymmetricFocalLoss(), AsymmetricFocalLoss(0.0), FocalLoss(), BinaryCrossEntropy(), HillLoss()]
)
def test_a_nan_logit_makes_the_loss_nan(loss):
    for tag, present in ((1, False), (0, True)):
        logits = torch.zeros(1, 3)
        logits[0, tag] = math.nan
        value, gradient = value_and_gradient(loss, logits, torch.tensor([[True, False, False]]))
        assert value.isnan(), present
        assert gradient[0, tag].isnan()


def test_validation_without_gradient_gives_the_same_value():
    logits = some_logits("random")
    targets = some_targets(logits)
    value, _ = value_and_gradient(AsymmetricFocalLoss(), logits, targets)
    with torch.no_grad():
        assert AsymmetricFocalLoss()(logits.requires_grad_(), targets) == value


def test_losses_keep_nothing_in_the_state_dict():
    loss = MultiTaskLoss(AsymmetricFocalLoss(tag_weights=torch.ones(8), ignored_tags=(5,)), (0, 1), 1.0)
    assert not loss.state_dict()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_multi_task_loss_is_the_other_tags_plus_weighted_cross_entropy_of_rated_rows(reduction):
    logits = some_logits("random", torch.float64)[:6, :12]
    ratings = [11, 3, 5]
    others = [tag for tag in range(12) if tag not in ratings]
    targets = some_targets(logits)
    targets[:, ratings] = False
    classes = {0: 1, 2: 0, 3: 2, 5: 1}
    for row, rating in classes.items():
        targets[row, ratings[rating]] = True
    tag_part = AsymmetricFocalLoss(reduction=reduction)(logits[:, others], targets[:, others])
    rows = list(classes)
    rating_part = F.cross_entropy(logits[rows][:, ratings], torch.tensor(list(classes.values())), reduction=reduction)
    loss = MultiTaskLoss(AsymmetricFocalLoss(reduction=reduction), ratings, 0.4)
    for form in ((targets,), as_lists(targets)):
        torch.testing.assert_close(loss(logits, *form), tag_part + 0.4 * rating_part, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_rows_without_a_rating_leave_the_rating_columns_alone(reduction):
    logits = some_logits("extreme")[:2, :8]
    targets = torch.zeros(2, 8)
    targets[0, 4] = 1
    for form in ((targets,), as_lists(targets)):
        value, gradient = value_and_gradient(MultiTaskLoss(FocalLoss(reduction=reduction), (0, 1), 9.0), logits, *form)
        expected = FocalLoss(ignored_tags=(0, 1), reduction=reduction)(logits, targets)
        torch.testing.assert_close(value, expected)
        assert bool((gradient[:, :2] == 0).all())


def test_multi_task_loss_leaves_the_given_tag_loss_as_it_was():
    tag_loss = AsymmetricFocalLoss(ignored_tags=(2,))
    assert MultiTaskLoss(tag_loss, (0, 1), 1.0).tag_loss.ignored_tags == (0, 1, 2)
    assert tag_loss.ignored_tags == (2,)


LOGITS = torch.zeros(2, 4)
GOOD = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: AsymmetricFocalLoss(gamma_neg=-1), "gamma_neg=-1"),
        (lambda: AsymmetricFocalLoss(gamma_pos=math.nan), "gamma_pos=nan"),
        (lambda: AsymmetricFocalLoss(clip=1.0), "clip=1.0"),
        (lambda: AsymmetricFocalLoss(clip=1e-40), "clip=1e-40"),
        (lambda: AsymmetricFocalLoss(reduction="none"), "reduction='none'"),
        (lambda: AsymmetricFocalLoss(tag_weights=torch.ones(2, 2)), r"shape \[2, 2\]"),
        (lambda: AsymmetricFocalLoss(tag_weights=-torch.ones(4)), "negative"),
        (lambda: AsymmetricFocalLoss(tag_weights=torch.ones(3))(LOGITS, GOOD), "3 tags and logits have 4"),
        (lambda: AsymmetricFocalLoss(ignored_tags=(-1,)), "holds -1"),
        (lambda: AsymmetricFocalLoss(ignored_tags=(4,))(LOGITS, GOOD), "holds 4"),
        (lambda: AsymmetricFocalLoss(reduction="mean", ignored_tags=range(4))(LOGITS, GOOD), "4 of 4 ignored"),
        (lambda: FocalLoss(alpha=1.5), "alpha=1.5"),
        (lambda: BinaryCrossEntropy()(LOGITS.long(), GOOD), "logits are torch.int64"),
        (lambda: BinaryCrossEntropy()(LOGITS[0], GOOD[0]), r"shape \[4\]"),
        (lambda: BinaryCrossEntropy()(LOGITS, GOOD[:, :3]), r"targets have shape \[2, 3\] and logits \[2, 4\]"),
        (lambda: BinaryCrossEntropy()(LOGITS, GOOD + 2), "from 2 to 2"),
        (lambda: BinaryCrossEntropy()(LOGITS, GOOD * math.nan), "from nan"),
        (lambda: BinaryCrossEntropy()(LOGITS, torch.tensor([4]), torch.tensor([0, 1, 1])), "tag_indices holds 4"),
        (lambda: BinaryCrossEntropy()(LOGITS, torch.tensor([-1]), torch.tensor([0, 1, 1])), "tag_indices holds -1"),
        (lambda: BinaryCrossEntropy()(LOGITS, torch.tensor([0]), torch.tensor([0, 1])), "2 entries for 2 rows"),
        (lambda: BinaryCrossEntropy()(LOGITS, torch.tensor([0]), torch.tensor([0, 1, 2])), "from 0 to 2"),
        (lambda: BinaryCrossEntropy()(LOGITS, torch.tensor([0]), torch.tensor([0, 2, 1])), "decreases"),
        (lambda: BinaryCrossEntropy()(LOGITS, torch.tensor([0.0]), torch.tensor([0, 1, 1])), "expected integers"),
        (lambda: BinaryCrossEntropy()(LOGITS, GOOD.to("meta")), "targets is on meta"),
        (lambda: MultiTaskLoss(BinaryCrossEntropy(), (1,), 1.0), "two or more"),
        (lambda: MultiTaskLoss(BinaryCrossEntropy(), (1, 1), 1.0), "different"),
        (lambda: MultiTaskLoss(BinaryCrossEntropy(ignored_tags=(1,)), (0, 1), 1.0), "both ratings and ignored"),
        (lambda: MultiTaskLoss(BinaryCrossEntropy(), (0, 1), -1.0), "rating_weight=-1.0"),
        (lambda: MultiTaskLoss(BinaryCrossEntropy(), (0, 4), 1.0)(LOGITS, GOOD), "holds 4"),
        (lambda: create_loss(LossSection(rating_weight=1.0)), "vocabulary has 0"),
        (lambda: create_loss(LossSection(tag_weight_power=0.5)), "tag_weight_power=0.5"),
        (lambda: create_loss(LossSection(name="focal", gamma_neg=2.0, gamma_pos=1.0)), "one gamma"),
        (lambda: LOSSES.get("asymetric_focal"), "asymmetric_focal"),
    ],
)
def test_bad_arguments_are_refused_with_what_was_found(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [4, 5, 8, 2**31 - 1, -1, -4])
@pytest.mark.parametrize("ignored", [(), (1,)])
def test_a_wrong_index_whose_value_is_not_checked_marks_no_other_cell(index, ignored, monkeypatch):
    """As on a GPU, where reading the indices would wait for it: it fails as out of bounds, in place of training."""
    monkeypatch.setattr(tag_lists, "_check_values", lambda *_: None)
    indices, offsets = torch.tensor([0, index, 2], dtype=torch.int32), torch.tensor([0, 2, 3])
    _, columns = tag_lists.tag_coordinates(indices, offsets, 2, 4)
    assert columns.tolist() == [0, 4, 2]
    loss = BinaryCrossEntropy(ignored_tags=ignored)
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        loss(torch.zeros(2, 4), indices, offsets)
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        loss.through_head(
            torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4), indices, offsets, chunk_tags=3, dtype=torch.float32
        )


def test_configured_names_are_the_registered_ones():
    assert set(get_args(get_type_hints(LossSection)["name"])) == set(LOSSES.names())


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (LossSection(gamma_neg=3.0, gamma_pos=1.0, clip=0.1), AsymmetricFocalLoss(3.0, 1.0, 0.1)),
        (LossSection(name="focal", gamma_neg=2.0), FocalLoss(2.0)),
        (LossSection(name="binary_cross_entropy"), BinaryCrossEntropy()),
    ],
)
def test_create_loss_builds_what_the_recipe_names(section, expected):
    logits = some_logits("random")
    targets = some_targets(logits)
    loss = create_loss(section, rating_indices=(1, 2))
    assert type(loss) is type(expected)
    assert loss(logits, targets) == expected(logits, targets)


def test_create_loss_passes_on_ratings_weights_and_ignored_tags():
    counts = torch.tensor([100, 25, 4, 0, 1, 1])
    section = LossSection(rating_weight=0.5, tag_weight_power=0.5)
    loss = create_loss(section, rating_indices=(4, 5), tag_counts=counts, ignored_tags=(3,), reduction="mean")
    assert isinstance(loss, MultiTaskLoss)
    assert loss.tag_loss.ignored_tags == (3, 4, 5)
    assert loss.tag_loss.reduction == "mean"
    weights = np.array([0.1, 0.2, 0.5, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(loss.tag_loss.tag_weights, weights / weights.mean(), rtol=1e-6)


def test_tag_weights_have_mean_one():
    weights = tag_weights_from_counts(torch.tensor([5, 70_000, 12]), 0.7)
    assert weights.mean().item() == pytest.approx(1.0)
    assert weights.argsort().tolist() == [1, 2, 0]


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_loss_of_a_batch_is_the_sum_of_the_losses_of_its_rows(data):
    rows, tags = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 7))
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, tags, generator=generator, dtype=torch.float64) * 10
    targets = torch.rand(rows, tags, generator=generator) < 0.4
    for loss in (AsymmetricFocalLoss(), MultiTaskLoss(AsymmetricFocalLoss(), (0, 1), 0.3)):
        assert isinstance(loss, TagLoss | MultiTaskLoss)
        parts = sum(loss(logits[row : row + 1], targets[row : row + 1]) for row in range(rows))
        torch.testing.assert_close(loss(logits, targets), parts)
