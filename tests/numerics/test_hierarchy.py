"""Hierarchical metrics against their definitions, tag by tag in plain Python."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tagger.batch import Batch
from tagger.errors import DivergedError
from tagger.metrics.hierarchy import HierarchyMetrics
from tagger.ontology import Ontology, relate

TAGS = ("animal", "cat", "dog", "puppy", "day", "night", "sky")
ONTOLOGY = Ontology(
    implications={"cat": ("animal",), "dog": ("animal",), "puppy": ("dog",)},
    exclusive=(("day", "night"), ("cat", "dog"), ("day", "unlearnt")),
)
RELATIONS = relate(ONTOLOGY, TAGS)
ABOVE = {tag: set(ONTOLOGY.closed(tag)) - {tag} for tag in TAGS}


def batch_of(lists: list[list[int]]) -> Batch:
    offsets = torch.tensor([0, *np.cumsum([len(tags) for tags in lists])], dtype=torch.int32)
    indices = torch.tensor([tag for tags in lists for tag in sorted(tags)], dtype=torch.int32)
    size = len(lists)
    images = torch.zeros((size, 3, 1, 1), dtype=torch.uint8)
    return Batch(images, indices, offsets, torch.arange(size), torch.ones((size, 2)), torch.zeros(size, dtype=bool))


def draw(seed: int, number: int) -> tuple[Batch, torch.Tensor]:
    generator = np.random.default_rng(seed)
    lists = [np.flatnonzero(row).tolist() for row in generator.random((number, len(TAGS))) < 0.3]
    logits = torch.from_numpy(generator.normal(0, 3, (number, len(TAGS)))).half().float()
    return batch_of(lists), logits


def closed(tags: set[str]) -> set[str]:
    return {name for tag in tags for name in ONTOLOGY.closed(tag)}


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.booleans())
def test_scores_are_those_of_the_definitions(seed: int, number: int, per_tag: bool) -> None:
    batch, logits = draw(seed, number)
    thresholds = np.random.default_rng(seed + 1).normal(0, 1, len(TAGS)) if per_tag else np.full(len(TAGS), 0.5)
    metrics = HierarchyMetrics(RELATIONS, len(TAGS), thresholds if per_tag else 0.5)
    metrics.add(batch, logits)
    found = metrics.compute()

    rows = logits.double().tolist()
    told = [{t for t, x, low in zip(TAGS, row, thresholds, strict=True) if x >= low} for row in rows]
    there = [{TAGS[i] for i in tags} for tags in batch.tag_lists()]
    for score, kept in ((found.all_tags, set(TAGS)), (found.related_tags, set(TAGS[:4]))):
        pairs = [(closed(a) & kept, closed(b) & kept) for a, b in zip(told, there, strict=True)]
        hits = sum(len(a & b) for a, b in pairs)
        predicted, present = sum(len(a) for a, _ in pairs), sum(len(b) for _, b in pairs)
        expected = (
            hits / predicted if predicted else math.nan,
            hits / present if present else math.nan,
            2 * hits / (predicted + present) if predicted + present else math.nan,
        )
        assert (score.precision, score.recall, score.f1) == pytest.approx(expected, abs=0, nan_ok=True)
    decisions = [(image, tag) for image, tags in enumerate(told) for tag in tags if ABOVE[tag]]
    kept_to = [ABOVE[tag] <= told[image] for image, tag in decisions]
    assert found.child_decisions == len(decisions)
    assert found.consistency == pytest.approx(sum(kept_to) / len(kept_to) if kept_to else math.nan, nan_ok=True)
    scores = [dict(zip(TAGS, (1 / (1 + math.exp(-x)) for x in row), strict=True)) for row in rows]
    excess = [max(0.0, p[tag] - p[above]) for p in scores for tag in TAGS for above in ABOVE[tag]]
    assert len(excess) == found.num_pairs * number == 4 * number
    assert found.mean_violation == pytest.approx(sum(excess) / len(excess), abs=2**-23)
    for group, names in zip(found.groups, ({"day", "night"}, {"cat", "dog"}), strict=True):
        assert {TAGS[i] for i in group.tags} == names
        assert group.decided == sum(bool(tags & names) for tags in told)
        assert group.violated == sum(names <= tags for tags in told)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 5), min_size=1, max_size=4))
@settings(max_examples=25)
def test_parts_add_up_to_the_same_bits_in_any_order(seed: int, sizes: list[int]) -> None:
    parts = [draw(seed + number, size) for number, size in enumerate(sizes)]
    whole = HierarchyMetrics(RELATIONS, len(TAGS), 0.0)
    for part in parts:
        whole.add(*part)
    merged = HierarchyMetrics(RELATIONS, len(TAGS), 0.0)
    for part in reversed(parts):
        other = HierarchyMetrics(RELATIONS, len(TAGS), 0.0)
        other.add(*part)
        merged.merge(other)
    assert np.array_equal(merged.state, whole.state)
    assert repr(merged.compute()) == repr(whole.compute())
    with pytest.raises(ValueError, match="metrics of 9 tags do not fit 7"):
        whole.merge(HierarchyMetrics(RELATIONS, 9, 0.0))


def test_a_near_miss_keeps_the_credit_for_common_ancestors() -> None:
    metrics = HierarchyMetrics(RELATIONS, len(TAGS), 0.0)
    logits = torch.full((1, len(TAGS)), -4.0)
    logits[0, TAGS.index("cat")] = 4.0
    metrics.add(batch_of([[TAGS.index("dog")]]), logits)
    found = metrics.compute()
    assert (found.all_tags.precision, found.all_tags.recall) == (0.5, 0.5)  # animal of {cat, animal}, {dog, animal}
    assert found.consistency == 0.0 and found.child_decisions == 1


def test_without_relations_it_is_plain_counting_and_nothing_is_nan_that_has_a_number() -> None:
    metrics = HierarchyMetrics(relate(Ontology(), TAGS), len(TAGS), 0.0)
    batch, logits = draw(3, 6)
    metrics.add(batch, logits)
    found = metrics.compute()
    told, there = logits.numpy() >= 0, batch.dense_targets(len(TAGS)).numpy() > 0
    assert found.all_tags.precision == (told & there).sum() / told.sum()
    assert math.isnan(found.related_tags.f1) and math.isnan(found.consistency) and math.isnan(found.mean_violation)
    assert found.groups == () and found.num_pairs == 0


def test_bad_logits_are_refused() -> None:
    metrics = HierarchyMetrics(RELATIONS, len(TAGS), 0.0)
    batch, logits = draw(0, 2)
    with pytest.raises(ValueError, match=r"logits of shape \[2, 3\] for 2 images and 7 tags"):
        metrics.add(batch, logits[:, :3])
    logits[1, 2] = math.nan
    with pytest.raises(DivergedError, match="row 1, tag 2"):
        metrics.add(batch, logits)
    assert metrics.compute().num_images == 0
