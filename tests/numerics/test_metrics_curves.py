"""Curves and operating points against scikit-learn on the same 16-bit scores."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve
from torch import Tensor

from evaluation_metrics import MetricComputer
from tagger.metrics.curves import OperatingPoint, TagCurve
from tagger.metrics.keys import round_logits

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def curves_of(logits: Tensor, targets: Tensor) -> list[TagCurve]:
    computer = MetricComputer(logits.shape[1])
    computer.update(logits, targets)
    return list(computer.curves())


def random_case(rows: int, tags: int, seed: int, step: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(rows, tags, generator=generator) < torch.rand(tags, generator=generator)
    logits = torch.randn(rows, tags, generator=generator) * 2 - 1 + targets
    return ((logits / step).round() * step if step else logits), targets


def scored(curve: TagCurve, scores: np.ndarray, truth: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tag without positives
        precision, recall, thresholds = precision_recall_curve(truth, scores)
    assert np.array_equal(curve.logits, thresholds[::-1])
    np.testing.assert_allclose(curve.precision_recall()[0], precision[:-1][::-1], **CLOSE)
    f1 = np.array([f1_score(truth, scores >= t, zero_division=np.nan) for t in curve.logits])
    np.testing.assert_allclose(curve.f1(), f1, **CLOSE)
    if not truth.any():
        assert math.isnan(curve.average_precision())
        assert curve.best_f1() is curve.equal_precision_recall() is None
        return
    np.testing.assert_allclose(curve.precision_recall()[1], recall[:-1][::-1], **CLOSE)
    np.testing.assert_allclose(curve.average_precision(), average_precision_score(truth, scores), **CLOSE)
    best = curve.best_f1()
    assert best.f1 == pytest.approx(f1.max(), rel=1e-12)
    assert best.logit == curve.logits[np.flatnonzero(curve.f1() == curve.f1().max())[0]]
    assert f1_score(truth, scores >= best.logit) == pytest.approx(best.f1, rel=1e-12)
    even = curve.equal_precision_recall()
    taken = [(scores >= t).sum() for t in curve.logits]
    assert abs((scores >= even.logit).sum() - truth.sum()) == min(abs(n - truth.sum()) for n in taken)
    if (scores >= even.logit).sum() == truth.sum():
        assert even.precision == even.recall == even.f1
    for wanted in (0.3, 0.8, 1.0):
        point = curve.at_precision(wanted)
        reached = precision[:-1][(precision[:-1] >= wanted - 1e-15) & (recall[:-1] > 0)]
        assert (point is None) == (len(reached) == 0)
        if point is not None:
            assert point.precision >= wanted
            assert point.recall == pytest.approx(recall[:-1][(precision[:-1] >= wanted - 1e-15)].max(), rel=1e-12)


@pytest.mark.parametrize("step", [0.0, 0.25, 3.0])
def test_curves_and_thresholds_equal_scikit_learn(step):
    logits, targets = random_case(50, 5, 1, step)
    targets[:, 0], targets[:, 1] = True, False
    for curve, scores, truth in zip(
        curves_of(logits, targets), round_logits(logits).numpy().T, targets.numpy().T, strict=True
    ):
        scored(curve, scores, truth)


@given(rows=st.integers(1, 9), seed=st.integers(0, 2**31), step=st.sampled_from([0.0, 2.0]))
@settings(max_examples=25, deadline=None)
def test_small_curves_equal_scikit_learn(rows, seed, step):
    logits, targets = random_case(rows, 2, seed, step)
    for curve, scores, truth in zip(
        curves_of(logits, targets), round_logits(logits).numpy().T, targets.numpy().T, strict=True
    ):
        scored(curve, scores, truth)


def test_a_threshold_of_any_value_takes_what_is_at_or_above_it():
    (curve,) = curves_of(torch.tensor([[2.0], [1.0], [1.0], [-3.0]]), torch.tensor([[1], [0], [1], [0]]))
    assert curve.at(1.0) == OperatingPoint(1.0, 2 / 3, 1.0, 0.8)
    assert curve.at(1.0001) == OperatingPoint(1.0001, 1.0, 0.5, 2 / 3)
    assert curve.at(-math.inf).precision == 0.5
    nothing = curve.at(2.5)
    assert math.isnan(nothing.precision)
    assert (nothing.recall, nothing.f1) == (0.0, 0.0)


def test_infinite_logits_are_ranked_at_the_ends():
    logits = torch.tensor([[torch.inf], [-torch.inf], [0.0], [7e4]])
    (curve,) = curves_of(logits, torch.tensor([[1], [0], [0], [0]]))
    assert curve.logits.tolist() == [65504.0, 0.0, -65504.0]
    assert curve.predicted.tolist() == [2, 3, 4]
    assert curve.average_precision() == 0.5


def test_chosen_tags_come_in_the_order_asked_for():
    logits, targets = random_case(30, 6, 2, 0.5)
    computer = MetricComputer(6)
    computer.update(logits, targets)
    chosen = list(computer.curves([4, 0, 4]))
    assert [curve.tag for curve in chosen] == [4, 0, 4]
    for curve in chosen:
        scored(curve, round_logits(logits).numpy()[:, curve.tag], targets.numpy()[:, curve.tag])
    assert list(computer.curves([])) == []


def test_the_curve_of_all_decisions_is_that_of_the_flattened_table():
    logits, targets = random_case(40, 5, 3, 0.5)
    computer = MetricComputer(5)
    computer.update(logits, targets)
    scored(computer.micro_curve(), round_logits(logits).numpy().ravel(), targets.numpy().ravel())


def test_every_tag_may_have_its_own_threshold():
    logits, targets = random_case(50, 4, 4, 0.25)
    thresholds = np.array([-0.3, 1.5, -math.inf, math.inf])
    computer = MetricComputer(4, logit_thresholds=thresholds)
    computer.update(logits, targets)
    predicted = round_logits(logits).numpy() >= thresholds
    result, truth = computer.compute(), targets.numpy()
    assert result["f1_micro"] == pytest.approx(f1_score(truth.ravel(), predicted.ravel()), rel=1e-12)
    assert result["f1_macro"] == pytest.approx(f1_score(truth, predicted, average="macro"), rel=1e-12)
    assert result["f1_per_image"] == pytest.approx(f1_score(truth, predicted, average="samples", zero_division=1))
    assert result["predicted_per_image"] == predicted.sum(axis=1).mean()
    assert result["tags_per_image"] == truth.sum(axis=1).mean()
    assert math.isnan(result["threshold"])
    assert np.array_equal(computer.per_image("hits"), (truth & predicted).sum(axis=1))
