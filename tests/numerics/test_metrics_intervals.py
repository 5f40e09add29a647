"""Intervals: the bootstrap against drawing images by hand, influences against the bootstrap and finite differences."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from evaluation_metrics import MetricComputer
from tagger.metrics import intervals
from tagger.metrics.intervals import bootstrap_map, image_influence, map_interval, per_image_intervals
from tagger.metrics.keys import round_logits
from tagger.metrics.ranking import rank_positives


def random_case(rows: int, tags: int, seed: int, step: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(rows, tags, generator=generator) < torch.linspace(0.1, 0.5, tags)
    logits = torch.randn(rows, tags, generator=generator) * 2 - 1 + 1.5 * targets
    return ((logits / step).round() * step if step else logits), targets


def computer_of(logits: Tensor, targets: Tensor, form: str = "auto", order: Tensor | None = None) -> MetricComputer:
    computer = MetricComputer(logits.shape[1], form=form)
    for ids in (torch.arange(len(logits)) if order is None else order).split(64):
        computer.update(logits[ids], targets[ids], image_ids=ids)
    return computer


def weighted_map(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> float:
    known = [i for i in range(truth.shape[1]) if weights[truth[:, i]].sum() > 0]
    return np.mean([average_precision_score(truth[:, i], scores[:, i], sample_weight=weights) for i in known])


@pytest.mark.parametrize("step", [0.0, 0.5])
def test_drawn_maps_equal_scikit_learn_with_weights(step):
    logits, targets = random_case(40, 3, 1, step)
    targets[1:, 2] = False
    targets[0, 2] = True
    found = bootstrap_map(computer_of(logits, targets), draws=12, seed=5)
    generator = np.random.default_rng(5)
    for value in found:
        weights = np.bincount(generator.integers(40, size=40), minlength=40).astype(float)
        expected = weighted_map(round_logits(logits).numpy(), targets.numpy(), weights)
        assert value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("step", [0.0, 0.5])
def test_influence_is_the_derivative_by_an_images_weight(step):
    logits, targets = random_case(60, 4, 2, step)
    targets[:, 3] = False
    computer = computer_of(logits, targets)
    places, influence = image_influence(computer, rank_positives(computer.positives(), computer.store)[0])
    assert places.tolist() == list(range(60))
    scores, truth, h = round_logits(logits).numpy(), targets.numpy(), 1e-5
    for image in range(0, 60, 7):
        up, down = np.ones(60), np.ones(60)
        up[image], down[image] = 1 + h, 1 - h
        expected = (weighted_map(scores, truth, up) - weighted_map(scores, truth, down)) / (2 * h)
        assert influence[image] == pytest.approx(expected, abs=1e-9)
    assert influence.sum() == pytest.approx(0, abs=1e-12)


def test_influence_and_bootstrap_agree(monkeypatch):
    logits, targets = random_case(1500, 12, 3)
    computer = computer_of(logits, targets)
    drawn = map_interval(computer, draws=300)
    monkeypatch.setattr(intervals, "_DRAWS_AFFORDABLE", 0)
    influence = map_interval(computer)
    assert (drawn.method, influence.method) == ("bootstrap", "influence")
    assert drawn.value == influence.value == computer.compute()["mAP"]
    # The standard deviation of 300 draws is itself uncertain by 4 %.
    assert influence.standard_error == pytest.approx(drawn.standard_error, rel=0.15)
    assert drawn.low < drawn.value < drawn.high
    counted = map_interval(computer_of(logits, targets, "histograms"))
    assert counted == influence


def test_a_sample_of_images_stands_for_all_and_says_so(monkeypatch):
    logits, targets = random_case(4000, 6, 4)
    whole = computer_of(logits, targets)
    monkeypatch.setattr(intervals, "_DRAWS_AFFORDABLE", 0)
    exact = map_interval(whole)
    monkeypatch.setattr(intervals, "_INFLUENCES_AFFORDABLE", 1000 * 6)
    sampled = map_interval(whole)
    assert (sampled.method, sampled.num_images) == ("influence of a sample of images", 1000)
    assert sampled.standard_error == pytest.approx(exact.standard_error, rel=0.15)
    assert map_interval(computer_of(logits, targets, "histograms")) == sampled


def test_intervals_do_not_depend_on_the_order_of_images(monkeypatch):
    logits, targets = random_case(150, 4, 5, 0.5)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    first, second = computer_of(logits, targets), computer_of(logits, targets, order=order)
    assert intervals.intervals(first, draws=50, map_draws=20) == intervals.intervals(second, draws=50, map_draws=20)
    monkeypatch.setattr(intervals, "_DRAWS_AFFORDABLE", 0)
    assert map_interval(first) == map_interval(second)


def test_per_image_intervals_cover_as_drawing_by_hand_does():
    logits, targets = random_case(400, 6, 6)
    computer = computer_of(logits, targets)
    found = per_image_intervals(computer, draws=2000)
    hits, predicted, present = (computer.per_image(n).astype(float) for n in ("hits", "predicted", "present"))
    generator = np.random.default_rng(0)
    drawn = [generator.integers(400, size=400) for _ in range(2000)]
    by_hand = {
        "f1_micro": [2 * hits[d].sum() / (predicted[d].sum() + present[d].sum()) for d in drawn],
        "tags_per_image": [present[d].mean() for d in drawn],
        "predicted_per_image": [predicted[d].mean() for d in drawn],
        "f1_per_image": [
            np.where(predicted + present > 0, 2 * hits / np.maximum(predicted + present, 1), 1)[d].mean() for d in drawn
        ],
    }
    result = computer.compute()
    assert set(found) == set(by_hand)
    for name, values in by_hand.items():
        assert found[name].value == pytest.approx(result[name], rel=1e-12)
        assert found[name].standard_error == pytest.approx(np.std(values), rel=0.1)
        spread = np.std(values)
        assert [found[name].low, found[name].high] == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=spread / 4)


def test_nothing_to_draw_is_said():
    with pytest.raises(ValueError, match="no image"):
        intervals.intervals(MetricComputer(2))
    with pytest.raises(ValueError, match="use image_influence"):
        bootstrap_map(computer_of(*random_case(5, 2, 7), "histograms"), 3)
    (one,) = (map_interval(computer_of(torch.ones(1, 1), torch.ones(1, 1))),)
    assert (one.value, one.standard_error) == (1.0, 0.0)
