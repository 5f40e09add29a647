"""Thresholds against brute force over every score, their limits, and what they refuse."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import f1_score, precision_score
from torch import Tensor

from evaluation_metrics import MetricComputer
from tagger.data.split import Part, Split, hashed_parts
from tagger.errors import InputError
from tagger.files import FormatError, NewerFormatError
from tagger.metrics.keys import logit_of, probability_of, round_logits
from tagger.metrics.thresholds import LeakError, Objective, TagThresholds, ThresholdGoal, decide, fit_thresholds

COUNTS = np.array([3, 5, 20, 25, 500, 2_000_000])
GOALS = (
    ThresholdGoal("f1"),
    ThresholdGoal("equal"),
    ThresholdGoal("precision", precision=0.7),
    ThresholdGoal("tags_per_image", tags_per_image=1.3),
)


def split_of(num_images: int, *, part: Part = Part.CALIB) -> Split:
    """The first images are of `part`, and one is of each other part."""
    parts = np.concatenate([np.full(num_images, part), [other for other in Part if other != part]])
    return Split(parts.astype(np.uint8), np.arange(len(parts), dtype=np.uint64))


def random_case(rows: int, seed: int, *, step: float = 0.0) -> tuple[Tensor, Tensor]:
    """Logits [rows, 6] and targets; the last tag is nowhere."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([0.05, 0.1, 0.2, 0.4, 0.9, 0.0])
    targets = torch.rand(rows, 6, generator=generator) < shares
    logits = torch.randn(rows, 6, generator=generator) * 2 - 1 + 2 * targets
    return round_logits((logits / step).round() * step if step else logits), targets


def scored(logits: Tensor, targets: Tensor) -> MetricComputer:
    computer = MetricComputer(logits.shape[1])
    computer.update(logits, targets)
    return computer


def fit(computer: MetricComputer, goal: ThresholdGoal, shrinkage: float) -> TagThresholds:
    split = split_of(computer.num_images)
    return fit_thresholds(computer, split, COUNTS, goal, weights_sha256="w", vocabulary_sha256="v", shrinkage=shrinkage)


def reached(goal: ThresholdGoal, scores: NDArray[np.float32], truth: NDArray[np.bool_], threshold: float) -> float:
    """How well a threshold does, the more the better, from its definition."""
    taken = scores >= threshold
    hits, num_taken, num_true = int((taken & truth).sum()), int(taken.sum()), int(truth.sum())
    if goal.objective == "f1":
        return 2 * hits / (num_taken + num_true)
    if goal.objective == "precision":
        return hits if hits and hits / num_taken >= goal.precision else -1
    return -abs(num_taken - num_true)


@pytest.mark.parametrize("goal", GOALS[:3], ids=lambda goal: goal.objective)
@given(rows=st.integers(1, 60), seed=st.integers(0, 1000), step=st.sampled_from([0.0, 0.5]))
@settings(max_examples=15)
def test_each_tags_own_threshold_is_the_best_of_all_scores(
    goal: ThresholdGoal, rows: int, seed: int, step: float
) -> None:
    logits, targets = random_case(rows, seed, step=step)
    if not targets.any():
        return
    fitted = fit(scored(logits, targets), goal, shrinkage=0)
    for tag in range(6):
        column, truth = logits[:, tag].numpy(), targets[:, tag].numpy()
        if truth.any():
            best = max(reached(goal, column, truth, threshold) for threshold in np.unique(column))
            assert reached(goal, column, truth, fitted.logits[tag]) == best
    for tags in ([0, 1], [2, 3], [4]):  # one bucket of training counts each
        column, truth = logits[:, tags].numpy().ravel(), targets[:, tags].numpy().ravel()
        nowhere = [tag for tag in tags if not targets[:, tag].any()]
        if truth.any() and nowhere:
            best = max(reached(goal, column, truth, threshold) for threshold in np.unique(column))
            assert reached(goal, column, truth, fitted.logits[nowhere[0]]) == best


def test_a_threshold_lies_midway_between_what_is_taken_and_what_is_not() -> None:
    logits = torch.tensor([[3.0], [1.0], [-1.0], [-2.0]]).expand(4, 6)
    targets = torch.tensor([[1], [1], [0], [0]], dtype=torch.bool).expand(4, 6)
    assert fit(scored(logits, targets), GOALS[0], 0).logits.tolist() == [0.0] * 6
    everywhere = torch.ones(4, 6, dtype=torch.bool)
    assert fit(scored(logits, everywhere), GOALS[0], 0).logits.tolist() == [-2.0] * 6


def test_where_no_score_is_precise_enough_nothing_is_taken() -> None:
    logits = torch.tensor([[2.0], [1.0], [0.0]]).expand(3, 6)
    targets = torch.tensor([[0], [0], [1]], dtype=torch.bool).expand(3, 6)
    fitted = fit(scored(logits, targets), ThresholdGoal("precision", precision=0.9), 0)
    assert decide(scored(logits, targets), fitted.logits).predicted.tolist() == [0] * 6
    assert 2.0 < fitted.logits[0] < 2.01


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.objective)
def test_support_says_whose_threshold_counts(goal: ThresholdGoal) -> None:
    computer = scored(*random_case(300, 3))
    own, one = fit(computer, goal, 0), fit(computer, goal, math.inf)
    assert (one.logits == one.global_logit).all() and own.global_logit == one.global_logit
    # Tags 0 and 1 are of one bucket, 5 is alone in its bucket and nowhere: it has the threshold of all.
    assert own.support[5] == 0 and own.logits[5] == own.global_logit
    between = [fit(computer, goal, k).logits for k in (1e-6, 1.0, 10.0, 100.0, 1e9)]
    np.testing.assert_allclose(between[0][:5], own.logits[:5], atol=1e-4)
    np.testing.assert_allclose(between[-1], one.global_logit, atol=1e-4)
    bucket = fit(computer, goal, 10.0)
    weight = bucket.support / (bucket.support + 10.0)
    alone = int(bucket.support[4])  # tag 4 is the one of its bucket with images
    shared = alone / (alone + 10.0) * own.logits[4] + 10.0 / (alone + 10.0) * own.global_logit
    assert bucket.logits[4] == pytest.approx(weight[4] * own.logits[4] + (1 - weight[4]) * shared, abs=1e-9)


def test_so_many_tags_as_asked_for_are_given() -> None:
    logits, targets = random_case(2000, 5)
    computer = scored(logits, targets)
    true = float(targets.float().sum(1).mean())
    for wanted in (0.5, 1.3, true):
        fitted = fit(computer, ThresholdGoal("tags_per_image", tags_per_image=wanted), 0)
        given = decide(computer, fitted.logits)
        # The last tag has no image and is given beyond that.
        assert given.predicted[:5].sum() / 2000 == pytest.approx(wanted, abs=0.01)
        np.testing.assert_allclose(given.predicted[:5], given.present[:5] * wanted / true, atol=1)
        assert given.tags_per_image == fitted.on_calib["tags_per_image"]


@pytest.mark.parametrize("form", ["keys", "histograms"])
def test_decisions_are_those_that_the_metrics_count(form: str) -> None:
    logits, targets = random_case(200, 7)
    thresholds = np.array([-1.0, 0.0, 0.33, 2.0, math.inf, -math.inf])
    computer = MetricComputer(6, logit_thresholds=thresholds, form=form)  # type: ignore[arg-type]
    computer.update(logits, targets)
    expected, found = computer.compute(), decide(computer, thresholds)
    assert (found.f1_macro, found.f1_micro) == (expected["f1_macro"], expected["f1_micro"])
    assert found.tags_per_image == expected["predicted_per_image"]
    assert found.num_counted == expected["num_tags_in_f1_macro"]
    taken = logits.numpy() >= thresholds
    assert found.predicted.tolist() == taken.sum(0).tolist()
    assert found.hits.tolist() == (taken & targets.numpy()).sum(0).tolist()
    assert found.precision == precision_score(targets.numpy().ravel(), taken.ravel())
    assert found.f1_micro == pytest.approx(f1_score(targets.numpy(), taken, average="micro"), rel=1e-12)


@pytest.mark.parametrize("part", [part for part in Part if part != Part.CALIB])
def test_images_of_another_part_are_refused(part: Part) -> None:
    logits, targets = random_case(40, 1)
    computer = MetricComputer(6)
    split = split_of(39)
    planted = int(np.flatnonzero(split.parts == part)[0])
    ids = torch.tensor([*range(39), planted])
    computer.update(logits, targets, image_ids=ids)
    message = f"of 40 images to fit thresholds on, 1 for {part.purpose} are not for that"
    with pytest.raises(LeakError, match=re.escape(message)):
        fit_thresholds(computer, split, COUNTS, GOALS[0], weights_sha256="w", vocabulary_sha256="v")


def test_images_that_the_split_does_not_know_are_refused() -> None:
    with pytest.raises(LeakError, match="2 of 40 images to fit thresholds on are not of this data set"):
        fit_thresholds(
            scored(*random_case(40, 1)),
            Split(np.full(38, Part.CALIB, np.uint8), np.arange(38, dtype=np.uint64)),
            COUNTS,
            GOALS[0],
            weights_sha256="w",
            vocabulary_sha256="v",
        )


@given(st.floats(0, 0.5), st.floats(0, 0.25), st.floats(0, 0.25), st.integers(0, 99))
@settings(max_examples=30)
def test_no_image_is_of_two_parts(val: float, calib: float, test: float, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, 2**63, 500).astype(np.uint64)
    split = Split(hashed_parts(ids, val, calib, test), ids)
    served = np.concatenate([split.rows(part) for part in Part])
    assert sorted(served.tolist()) == list(range(500))
    for part in Part:
        assert not split.others(part)[split.rows(part)].any()


def test_without_a_single_tag_nothing_can_be_fitted() -> None:
    with pytest.raises(InputError, match=r"none of the 4 calibration images has a tag .*; raise data\.calib_fraction"):
        fit(scored(torch.zeros(4, 6), torch.zeros(4, 6, dtype=torch.bool)), GOALS[0], 10)


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.objective)
def test_a_file_gives_back_what_was_written(goal: ThresholdGoal, tmp_path: Path) -> None:
    fitted = fit(scored(*random_case(50, 2)), goal, 10)
    path = tmp_path / "thresholds.json"
    path.write_bytes(fitted.to_json())
    loaded = TagThresholds.load(path)
    assert np.array_equal(loaded.logits, fitted.logits) and np.array_equal(loaded.support, fitted.support)
    assert replace(loaded, logits=fitted.logits, support=fitted.support) == fitted
    assert goal.describe() in loaded.summary()


@pytest.mark.parametrize(
    "change",
    [
        {"logits": [0.0]},
        {"logits": [0.0] * 5 + [None]},
        {"logits": [0.0] * 5 + ["high"]},
        {"support": [1, 2]},
        {"objective": "luck"},
        {"precision": 2},
        {"global_logit": None},
        {"weights_sha256": 3},
        {"on_calib": 5},
        {"num_images": "many"},
    ],
    ids=str,
)
def test_a_damaged_file_is_refused_by_name(change: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "thresholds.json"
    content = orjson.loads(fit(scored(*random_case(50, 2)), GOALS[0], 10).to_json())
    path.write_bytes(orjson.dumps({**content, **change}))
    with pytest.raises(FormatError, match=r"thresholds\.json are not complete") as raised:
        TagThresholds.load(path)
    assert "\n" not in str(raised.value)
    path.write_bytes(orjson.dumps({**content, "format_version": 2}))
    with pytest.raises(NewerFormatError, match="format_version 2, this program reads up to 1"):
        TagThresholds.load(path)


def test_thresholds_of_another_model_vocabulary_or_split_are_refused() -> None:
    fitted = fit(scored(*random_case(50, 2)), GOALS[0], 10)
    fitted.require_model("they", "w", "v")
    fitted.require_split("they", split_of(50))
    with pytest.raises(FormatError, match="they were fitted for other weights"):
        fitted.require_model("they", "another", "v")
    with pytest.raises(FormatError, match="they are of another vocabulary"):
        fitted.require_model("they", "w", "another")
    with pytest.raises(LeakError, match="they were fitted on the calibration images of another split"):
        fitted.require_split("they", split_of(49))


@given(st.floats(-60, 30))
def test_probabilities_and_logits_are_each_others_counterpart(logit: float) -> None:
    assert logit_of(probability_of(logit)) == pytest.approx(logit, rel=1e-6, abs=1e-6) or logit > 15
    assert (logit_of(0), logit_of(1), logit_of(0.5)) == (-math.inf, math.inf, 0.0)
    assert 0 <= probability_of(-65504) < probability_of(0) == 0.5 < probability_of(65504) <= 1


@pytest.mark.parametrize(
    ("objective", "precision", "tags"), [("precision", 0.0, None), ("tags_per_image", 0.9, None), ("f1", 1.5, None)]
)
def test_goals_that_make_no_sense_are_refused(objective: Objective, precision: float, tags: float | None) -> None:
    with pytest.raises(ValueError, match="is not above 0"):
        ThresholdGoal(objective, precision, tags)
