"""Metrics against scikit-learn, ties and edges included; then what holds however the images arrive."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor

import evaluation_metrics
from evaluation_metrics import MetricComputer, MetricResult
from tagger.errors import DivergedError
from tagger.metrics import store


def sixteen_bits(logits: Tensor) -> np.ndarray:
    """The scores that both sides rank: numpy's float16, kept finite."""
    with np.errstate(over="ignore"):
        halves = logits.float().numpy().astype(np.float16)
    return np.clip(halves, np.finfo(np.float16).min, np.finfo(np.float16).max).astype(np.float64)


def scikit_learn(logits: Tensor, targets: Tensor, threshold: float = 0.5) -> dict[str, object]:
    scores, truth = sixteen_bits(logits), targets.numpy().astype(int)
    predicted = (scores >= np.log(threshold) - np.log1p(-threshold)).astype(int)
    precision = np.array(
        [average_precision_score(y, s) if y.any() else np.nan for y, s in zip(truth.T, scores.T, strict=True)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mean over nothing is NaN on both sides
        per_tag = [f1_score(y, p, zero_division=np.nan) for y, p in zip(truth.T, predicted.T, strict=True)]
        return {
            "mAP": np.nanmean(precision),
            "f1_macro": np.nanmean(per_tag),
            "f1_micro": f1_score(truth.ravel(), predicted.ravel(), zero_division=np.nan),
            "average_precision": precision,
            "left_out": int(np.isnan(per_tag).sum()),
        }


def score(logits: Tensor, targets: Tensor, threshold: float = 0.5) -> MetricResult:
    computer = MetricComputer(logits.shape[1], threshold)
    computer.update(logits, targets)
    return computer.compute()


def assert_equals_scikit_learn(logits: Tensor, targets: Tensor, threshold: float = 0.5) -> None:
    found, expected = score(logits, targets, threshold), scikit_learn(logits, targets, threshold)
    for key in ("mAP", "f1_macro", "f1_micro"):
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-12, atol=0, err_msg=key)
    np.testing.assert_allclose(found["average_precision"], expected["average_precision"], rtol=1e-12, atol=0)
    assert found["num_tags_left_out_of_f1_macro"] == expected["left_out"]
    assert found["num_tags_in_f1_macro"] == logits.shape[1] - expected["left_out"]
    assert found["num_tags_with_positives"] == int(targets.any(dim=0).sum())
    assert found["num_images"] == len(logits)


def random_case(rows: int, tags: int, seed: int, levels: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(rows, tags, generator=generator) < torch.rand(tags, generator=generator)
    logits = torch.randn(rows, tags, generator=generator) * 2 + targets
    if levels is not None:
        logits = (logits * levels / 8 + 0.25).round() - 0.25
    return logits, targets


@pytest.mark.parametrize("levels", [None, 16, 2])
@pytest.mark.parametrize("threshold", [0.5, 0.2653, 0.9])
def test_scores_equal_scikit_learn_ties_included(levels, threshold):
    logits, targets = random_case(301, 23, seed=5, levels=levels)
    targets[:, 0] = True
    targets[:, 1] = False
    targets[:, 2], logits[:, 2] = False, -20.0
    assert_equals_scikit_learn(logits, targets, threshold)
    assert_equals_scikit_learn(logits.double() * math.pi, targets, threshold)


@given(
    rows=st.integers(1, 12), tags=st.integers(1, 5), seed=st.integers(0, 2**31), levels=st.sampled_from([None, 3, 9])
)
@settings(max_examples=60, deadline=None)
def test_small_evaluations_equal_scikit_learn(rows, tags, seed, levels):
    logits, targets = random_case(rows, tags, seed, levels)
    if targets.any():
        assert_equals_scikit_learn(logits, targets)


def test_one_image_of_one_tag():
    result = score(torch.tensor([[3.0]]), torch.tensor([[1]]))
    assert (result["mAP"], result["f1_macro"], result["f1_micro"]) == (1.0, 1.0, 1.0)
    assert result["average_precision"].tolist() == [1.0]


def test_equal_scores_give_the_share_of_positives():
    targets = torch.tensor([[1], [0], [0], [1], [0]])
    assert score(torch.zeros(5, 1), targets)["mAP"] == pytest.approx(0.4)


def test_without_positives_means_are_nan_and_tags_are_counted():
    result = score(torch.full((4, 3), -5.0), torch.zeros(4, 3))
    assert all(math.isnan(result[key]) for key in ("mAP", "f1_macro", "f1_micro"))
    assert bool(result["average_precision"].isnan().all())
    assert result["num_tags_with_positives"] == result["num_tags_in_f1_macro"] == 0
    assert result["num_tags_left_out_of_f1_macro"] == 3


def test_a_tag_never_present_but_predicted_counts_as_zero_in_macro_f1():
    result = score(torch.tensor([[5.0, 5.0], [5.0, -5.0]]), torch.tensor([[1, 0], [1, 0]]))
    assert result["f1_macro"] == 0.5
    assert result["num_tags_left_out_of_f1_macro"] == 0
    assert result["num_tags_with_positives"] == 1
    assert result["average_precision"].dtype == torch.float64


def test_logits_that_saturate_as_probabilities_are_still_ranked():
    logits = torch.tensor([[40.0], [60.0], [200.0], [1e4]])
    assert score(logits, torch.tensor([[0], [0], [0], [1]]))["mAP"] == 1.0


def test_threshold_is_named_and_taken_at_or_above():
    result = score(torch.tensor([[0.0], [-1e-7]]), torch.tensor([[1], [1]]))
    assert result["threshold"] == 0.5
    assert result["f1_micro"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("threshold", [1e-12, 0.1, 0.3, 0.7927, 1 - 1e-9])
def test_threshold_is_compared_as_in_float64(threshold):
    exact = math.log(threshold) - math.log1p(-threshold)
    near = np.float16(exact) + np.spacing(np.float16(exact)) * np.arange(-3, 4, dtype=np.float16)
    logits = torch.from_numpy(near)[:, None]
    hits = int((near.astype(np.float64) >= exact).sum())
    result = score(logits, torch.ones(7, 1), threshold)
    assert result["f1_micro"] == pytest.approx(2 * hits / (hits + 7), rel=1e-12)


def test_lists_batches_and_order_do_not_change_the_result():
    logits, targets = random_case(50, 9, seed=2, levels=16)
    whole = score(logits, targets)
    by_lists = MetricComputer(9)
    for rows in torch.randperm(50, generator=torch.Generator().manual_seed(0)).split(7):
        counts = targets[rows].sum(dim=1)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
        by_lists.update(logits[rows], targets[rows].nonzero()[:, 1].int(), offsets)
    assert_same(by_lists.compute(), whole)


def assert_same(found: MetricResult, expected: MetricResult) -> None:
    torch.testing.assert_close(found["average_precision"], expected["average_precision"], equal_nan=True)
    for key in set(expected) - {"average_precision"}:
        assert found[key] == pytest.approx(expected[key], rel=1e-12), key


def test_a_tag_listed_twice_counts_once():
    computer = MetricComputer(2)
    computer.update(torch.tensor([[1.0, 2.0]]), torch.tensor([1, 1]), torch.tensor([0, 2]))
    assert computer.compute()["f1_micro"] == pytest.approx(2 / 3)


def test_merged_parts_equal_the_whole_and_the_parts_stay_usable():
    logits, targets = random_case(40, 6, seed=3)
    first, second = MetricComputer(6), MetricComputer(6)
    first.update(logits[:15], targets[:15])
    second.update(logits[15:], targets[15:])
    alone = second.compute()
    first.merge(second)
    first.update(logits[:1], targets[:1])
    assert second.num_images == 25
    assert_same(second.compute(), alone)
    assert_same(first.compute(), score(torch.cat([logits, logits[:1]]), torch.cat([targets, targets[:1]])))


def test_reset_forgets_every_image():
    logits, targets = random_case(20, 4, seed=8)
    computer = MetricComputer(4)
    computer.update(*random_case(30, 4, seed=9))
    computer.reset()
    assert computer.num_images == 0
    computer.update(logits, targets)
    assert_same(computer.compute(), score(logits, targets))


def test_scores_are_copied_so_that_a_reused_buffer_does_no_harm():
    logits, targets = random_case(20, 4, seed=8)
    buffer, kept = logits.clone(), score(logits, targets)
    computer = MetricComputer(4)
    computer.update(buffer, targets)
    buffer.zero_()
    assert_same(computer.compute(), kept)


def test_chunks_of_tags_do_not_change_the_result(monkeypatch):
    logits, targets = random_case(30, 11, seed=4)
    whole = score(logits, targets)
    monkeypatch.setattr(store, "_KEYS_AT_A_TIME", 90)
    monkeypatch.setattr(evaluation_metrics, "_LOGITS_AT_A_TIME", 25)
    assert_same(score(logits, targets), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_ranked_by_their_exact_values(dtype):
    logits, targets = random_case(64, 5, seed=6)
    assert_equals_scikit_learn(logits.to(dtype), targets)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MetricComputer(0), "num_tags=0"),
        (lambda: MetricComputer(3, 1.0), "threshold=1.0"),
        (lambda: MetricComputer(3).compute(), "no image"),
        (lambda: MetricComputer(3).update(torch.zeros(2, 4), torch.zeros(2, 4)), r"\[2, 4\]; expected .* \[B, 3\]"),
        (lambda: MetricComputer(3).update(torch.zeros(2, 3), torch.zeros(3, 3)), r"targets have shape \[3, 3\]"),
        (lambda: MetricComputer(3).update(torch.zeros(2, 3), torch.full((2, 3), 0.9)), "other than 0 and 1"),
        (lambda: MetricComputer(3).update(torch.zeros(2, 3), torch.full((2, 3), math.nan)), "other than 0 and 1"),
        (lambda: MetricComputer(3).update(torch.zeros(2, 3), torch.tensor([3]), torch.tensor([0, 1, 1])), "holds 3"),
        (
            lambda: MetricComputer(2).update(torch.tensor([[0.0, 1.0], [2.0, math.nan]]), torch.zeros(2, 2)),
            "NaN, first at row 1, tag 1",
        ),
        (lambda: MetricComputer(3, logit_thresholds=[0.0, math.nan, 1.0]), r"1 NaN; expected \[3\]"),
        (lambda: MetricComputer(3).update(torch.zeros(2, 3), torch.zeros(2, 3), None, torch.zeros(1)), "image_ids"),
        (lambda: list(MetricComputer(3).curves([3])), "expected 0..2"),
        (lambda: MetricComputer(3).merge(MetricComputer(4)), "cannot merge"),
        (lambda: MetricComputer(3).add_arrays(MetricComputer(4).arrays()), "cannot add"),
        (lambda: MetricComputer(3).merge(MetricComputer(3, 0.4)), "threshold 0.4"),
    ],
)
def test_bad_arguments_are_refused_with_what_was_found(call, words):
    with pytest.raises((ValueError, DivergedError), match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_refused_batch_leaves_no_trace():
    logits, targets = random_case(10, 2, seed=1)
    computer = MetricComputer(2)
    computer.update(logits, targets)
    with pytest.raises(DivergedError, match="NaN"):
        computer.update(logits * math.nan, targets)
    assert_same(computer.compute(), score(logits, targets))
