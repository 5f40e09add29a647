"""Summaries: groups that cover every tag, calibration by its definition, means that say what they are over."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

from evaluation_metrics import MetricComputer
from tagger.metrics.calibration import EDGES, NUM_BINS
from tagger.metrics.keys import round_logits
from tagger.metrics.ranking import image_f1
from tagger.metrics.summary import FREQUENCY_EDGES, Mean, score_tags, summarise

ROWS, TAGS = 80, 12
CATEGORIES = ["general"] * 7 + ["rating"] * 3 + ["character"] * 2
TRAINING = np.array([0, 1, 9, 10, 29, 30, 250_000, 5, 50, 99, 100, 0])


@pytest.fixture(scope="module")
def case():
    generator = torch.Generator().manual_seed(1)
    targets = torch.rand(ROWS, TAGS, generator=generator) < torch.linspace(0, 0.5, TAGS)
    targets[:, 1] = False
    targets[:3, 1] = True
    logits = torch.randn(ROWS, TAGS, generator=generator) * 2 - 1 + 2 * targets
    computer = MetricComputer(TAGS, threshold=0.4)
    computer.update(logits, targets)
    return computer, round_logits(logits).numpy().astype(np.float64), targets.numpy()


def test_tag_scores_agree_with_compute(case):
    computer, _, _ = case
    found, result = score_tags(computer), computer.compute()
    np.testing.assert_allclose(found.average_precision, result["average_precision"].numpy(), rtol=1e-12)
    assert np.nanmean(found.f1) == pytest.approx(result["f1_macro"], rel=1e-12)
    assert np.array_equal(found.predicted.sum(), computer.per_image("predicted").sum())
    assert np.array_equal(found.hits.sum(), computer.per_image("hits").sum())


def test_buckets_of_training_counts_cover_every_tag_and_show_empty_ones(case):
    summary = summarise(case[0], TRAINING)
    assert [bucket.low for bucket in summary.by_frequency] == list(FREQUENCY_EDGES)
    for bucket in summary.by_frequency:
        high = math.inf if bucket.high is None else bucket.high
        assert bucket.num_tags == int(((bucket.low <= TRAINING) & (high >= TRAINING)).sum())
        assert bucket.empty == (bucket.num_tags == 0)
    assert sum(bucket.num_tags for bucket in summary.by_frequency) == TAGS
    assert {b.name for b in summary.by_frequency if b.empty} == {
        "300 to 999", "1,000 to 2,999", "3,000 to 9,999", "10,000 to 29,999", "30,000 to 99,999",
    }  # fmt: skip
    empty = next(b for b in summary.by_frequency if b.empty)
    assert empty.mAP == empty.f1_macro == empty.f1_micro == Mean(None, 0)
    assert summary.by_frequency[-1].name == "100,000 or more"


def test_groups_equal_scikit_learn_and_say_what_they_are_over(case):
    _, scores, truth = case
    predicted = scores >= math.log(0.4 / 0.6)
    summary = summarise(case[0], TRAINING, CATEGORIES)
    assert [group.name for group in summary.by_category] == ["general", "rating", "character"]
    assert summary.by_category[1].num_tags == 3
    for group in (summary.all_tags, *summary.by_category):
        tags = [i for i in range(TAGS) if group.name in ("all tags", CATEGORIES[i])]
        known = [i for i in tags if truth[:, i].any()]
        ap = np.mean([average_precision_score(truth[:, i], scores[:, i]) for i in known])
        assert group.mAP.over == len(known)
        assert group.mAP.value == pytest.approx(ap, rel=1e-12)
        decided = [i for i in tags if truth[:, i].any() or predicted[:, i].any()]
        macro = f1_score(truth[:, decided], predicted[:, decided], average="macro", zero_division=0)
        assert group.f1_macro.over == len(decided)
        assert group.f1_macro.value == pytest.approx(macro, rel=1e-12)
        micro = f1_score(truth[:, tags].ravel(), predicted[:, tags].ravel())
        assert group.f1_micro.value == pytest.approx(micro, rel=1e-12)
        assert group.num_positives == truth[:, tags].sum()


def test_coverage_counts_tags_by_their_positives(case):
    _, _, truth = case
    coverage, present = summarise(case[0], TRAINING).coverage, truth.sum(axis=0)
    assert coverage.without == (present == 0).sum() > 0
    assert coverage.few == ((present > 0) & (present < 5)).sum() > 0
    assert coverage.enough == (present >= 5).sum()
    assert coverage.without + coverage.few + coverage.enough == coverage.num_tags == TAGS


def test_calibration_error_follows_its_definition(case):
    _, scores, truth = case
    probability = 1 / (1 + np.exp(-scores))
    tags = np.arange(7)
    found = summarise(case[0], TRAINING, CATEGORIES).by_category[0].calibration
    places = np.digitize(probability[:, tags], EDGES[1:-1])
    wrong = 0.0
    for place in range(NUM_BINS):
        inside = places == place
        wrong += abs(probability[:, tags][inside].sum() - truth[:, tags][inside].sum())
        assert found.bins[place].num_decisions == inside.sum()
        if inside.any():
            assert found.bins[place].mean_probability == pytest.approx(probability[:, tags][inside].mean())
            assert found.bins[place].share_true == pytest.approx(truth[:, tags][inside].mean())
        else:
            assert found.bins[place].share_true is None
    assert found.num_decisions == ROWS * 7
    assert found.num_true == truth[:, tags].sum()
    assert found.expected_true == pytest.approx(probability[:, tags].sum())
    assert found.error == pytest.approx(wrong / (ROWS * 7))
    assert found.error_per_true == pytest.approx(wrong / truth[:, tags].sum())


def test_probabilities_that_come_true_as_often_as_they_say_have_no_error():
    logit = math.log(0.25 / 0.75)
    computer = MetricComputer(1)
    computer.update(torch.full((400, 1), logit), (torch.arange(400) % 4 == 0)[:, None])
    assert score_tags(computer).bins.calibration().error < 1e-4
    computer.update(torch.full((400, 1), logit), torch.ones(400, 1))
    assert score_tags(computer).bins.calibration().error == pytest.approx(0.375, abs=1e-4)


def test_images_are_scored_one_by_one(case):
    computer, scores, truth = case
    predicted = scores >= math.log(0.4 / 0.6)
    found = summarise(computer, TRAINING).per_image
    assert found.f1.over == found.tags.over == ROWS
    assert found.f1.value == pytest.approx(f1_score(truth, predicted, average="samples", zero_division=1), rel=1e-12)
    assert found.tags.value == truth.sum(axis=1).mean()
    assert found.predicted.value == predicted.sum(axis=1).mean()
    assert found.tag_quantiles[2] == np.median(truth.sum(axis=1))
    assert image_f1(*(np.zeros(1, np.int64) for _ in range(3))).tolist() == [1.0]


def test_a_summary_is_json_without_nan(case):
    json.dumps(dataclasses.asdict(summarise(case[0], TRAINING, CATEGORIES)), allow_nan=False)
    nothing = MetricComputer(3)
    nothing.update(torch.full((2, 3), -9.0), torch.zeros(2, 3))
    summary = summarise(nothing, np.zeros(3))
    json.dumps(dataclasses.asdict(summary), allow_nan=False)
    assert summary.all_tags.mAP == summary.all_tags.f1_macro == Mean(None, 0)
    assert summary.all_tags.f1_micro == Mean(None, 3)
    assert summary.intervals["mAP"].value is summary.intervals["f1_micro"].value is None
    assert summary.by_category == ()


def test_counts_and_categories_of_another_vocabulary_are_refused(case):
    with pytest.raises(ValueError, match=r"training_counts is of shape \[3\]; expected \[12\]"):
        summarise(case[0], [1, 2, 3])
    with pytest.raises(ValueError, match="categories are 2"):
        summarise(case[0], TRAINING, ["a", "b"])
