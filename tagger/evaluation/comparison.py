"""Two models on the same images and tags: which is better, by how much, how surely, and at which tags.

Differences are the second model's score less the first's, and pairs of scores of the same image stay together. mAP:
images are drawn anew, the same for both, where that is affordable, else each image's influence on the difference
(`tagger.metrics.intervals`). F1 of images and of all decisions: images drawn anew. F1 macro, and the AP of each tag:
influence. An interval is the difference plus and minus 1.96 standard errors, and over which images were held out, not
over trainings. Refuses counts of other images, tags or positives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tagger.errors import InputError
from tagger.metrics.intervals import SEED, Z, bootstrap_map, can_draw, influence_size, tag_influences
from tagger.metrics.keys import NUM_KEYS, lowest_keys
from tagger.metrics.ranking import ScoredImages, image_f1, rank_positives
from tagger.metrics.summary import ENOUGH_POSITIVES, score_tags
from tagger.metrics.thresholds import decide

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """A score of both models, over `over` tags or images; all None over nothing. num_images: behind the error."""

    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None
    standard_error: float | None
    over: int
    what: str
    method: str
    num_images: int


@dataclass(frozen=True)
class TagChange:
    """A tag's AP by both models, over `positives` images that have it; z: the difference in standard errors."""

    tag: int
    positives: int
    a: float
    b: float
    difference: float
    standard_error: float

    @property
    def z(self) -> float:
        if self.standard_error:
            return self.difference / self.standard_error
        return math.copysign(math.inf, self.difference) if self.difference else 0.0


@dataclass(frozen=True)
class Comparison:
    """changes: every supported tag (at least `ENOUGH_POSITIVES` positives), the most won first.

    one_rule: whether both models' F1 is at the same thresholds; where not, F1 at 0.5 for all tags of both is there too,
    without an interval.
    won, lost: those whose difference is beyond 1.96 standard errors; were the models alike, about `by_chance` would be.
    """

    num_images: int
    num_tags: int
    scores: dict[str, Difference]
    changes: tuple[TagChange, ...]
    num_unsupported: int
    one_rule: bool

    @property
    def won(self) -> tuple[TagChange, ...]:
        return tuple(change for change in self.changes if change.z > Z)

    @property
    def lost(self) -> tuple[TagChange, ...]:
        return tuple(change for change in reversed(self.changes) if change.z < -Z)

    @property
    def by_chance(self) -> float:
        return 0.05 * len(self.changes)


def compare(a: ScoredImages, b: ScoredImages, draws: int = 1000, map_draws: int = 200) -> Comparison:
    """Compare two models' counts of the same images (by id) and the same tags. Raises ValueError for others."""
    order_a, order_b = (np.argsort(scored.per_image("image_ids"), kind="stable") for scored in (a, b))
    ids = [scored.per_image("image_ids")[order] for scored, order in ((a, order_a), (b, order_b))]
    if a.num_tags != b.num_tags or not np.array_equal(ids[0], ids[1]):
        raise InputError(
            f"{a.num_images} images of {a.num_tags} tags and {b.num_images} of {b.num_tags}; both must read the same"
        )
    if len(np.unique(ids[0])) != len(ids[0]):
        raise ValueError("an image was scored twice; its id must name one image")
    ranked_a, ranked_b = (rank_positives(scored.positives(), scored.store)[0] for scored in (a, b))
    if not np.array_equal(ranked_a.present, ranked_b.present):
        raise ValueError("the images have other tags in the two evaluations; give both the same truth")
    present = ranked_a.present
    pairs = _Pairs(a, b)
    values = [scored.average_precision for scored in (ranked_a, ranked_b)]
    map_influence, errors = np.zeros(pairs.num_images), np.zeros(a.num_tags)
    places_a, of_a = tag_influences(a, ranked_a, influence_size(a))
    places_b, of_b = tag_influences(b, ranked_b, influence_size(b))
    assert np.array_equal(places_a, pairs.places[0]) and np.array_equal(places_b, pairs.places[1])
    for (tag, one), (_, other) in zip(of_a, of_b, strict=True):
        influence = other[pairs.orders[1]] - one[pairs.orders[0]]
        map_influence += influence
        errors[tag] = pairs.error(influence)
    known = np.flatnonzero(present)
    mean = [float(scores[known].mean()) if len(known) else math.nan for scores in values]
    method, map_error = pairs.method, pairs.error(map_influence / max(1, len(known)))
    if len(known) and can_draw(a, map_draws) and can_draw(b, map_draws):
        # One seed and images in the order of their ids: both are scored on the same draws.
        drawn = bootstrap_map(b, map_draws) - bootstrap_map(a, map_draws)
        method, map_error = "bootstrap", float(np.std(drawn, ddof=1))
    scores = {
        "mAP": _difference(mean[0], mean[1], map_error, len(known), "tags with a positive", method, pairs.num_images),
        "f1_macro": pairs.f1_macro(known),
        **_of_images(a, b, order_a, order_b, draws),
    }
    one_rule = bool(np.array_equal(a.logit_thresholds, b.logit_thresholds))
    if not one_rule:
        scores |= _at_half(a, b, known)
    changes = [
        TagChange(tag, int(present[tag]), one, other, other - one, float(errors[tag]))
        for tag in known.tolist()
        if present[tag] >= ENOUGH_POSITIVES
        for one, other in [(float(values[0][tag]), float(values[1][tag]))]
    ]
    return Comparison(
        num_images=a.num_images,
        num_tags=a.num_tags,
        scores=scores,
        changes=tuple(sorted(changes, key=lambda change: (-change.difference, change.tag))),
        num_unsupported=a.num_tags - len(changes),
        one_rule=one_rule,
    )


def _at_half(a: ScoredImages, b: ScoredImages, known: npt.NDArray[np.integer]) -> dict[str, Difference]:
    macro, micro = [], []
    for scored in (a, b):
        told = decide(scored, np.zeros(scored.num_tags))
        both = (told.predicted + told.present)[known]
        macro.append(float((2 * told.hits[known] / both).mean()) if len(known) else math.nan)
        micro.append(told.f1_micro)
    method, num_images = "none", a.num_images
    return {
        "f1_macro_at_0.5": _difference(
            macro[0], macro[1], math.nan, len(known), "tags with a positive", method, num_images
        ),
        "f1_micro_at_0.5": _difference(
            micro[0], micro[1], math.nan, num_images * a.num_tags, "decisions", method, num_images
        ),
    }


def common_tags(known: Sequence[str], sides: Sequence[Sequence[str]]) -> list[str]:
    """The tags that all know, in the order of `known`, which names the truth. Raises InputError without any."""
    shared = set.intersection(*(set(tags) for tags in sides))
    common = [tag for tag in known if tag in shared]
    if not common:
        raise InputError(f"the models, of {' and '.join(str(len(tags)) for tags in sides)} tags, have none in common")
    return common


class _Pairs:
    """The images whose keys are looked at one by one, in both evaluations, in the order of their ids."""

    def __init__(self, a: ScoredImages, b: ScoredImages) -> None:
        self._both = (a, b)
        self._samples = [scored.store.sample(influence_size(scored)) for scored in self._both]
        self.places = [sample.places for sample in self._samples]
        ids = [scored.per_image("image_ids")[places] for scored, places in zip(self._both, self.places, strict=True)]
        self.orders = [np.argsort(own, kind="stable") for own in ids]
        # Samples are chosen by a hash of the id, so both hold the same images.
        assert np.array_equal(ids[0][self.orders[0]], ids[1][self.orders[1]])
        self.num_images = len(ids[0])
        self.method = "influence" if self.num_images == a.num_images else "influence of a sample of images"

    def error(self, influence: Floats) -> float:
        """The standard error that influences of the sample [n] stand for."""
        return math.sqrt(self._both[0].num_images / self.num_images * math.fsum((influence**2).tolist()))

    def f1_macro(self, known: npt.NDArray[np.integer]) -> Difference:
        """Of the mean F1 of some tags, each of which has a positive."""
        means, influences = [], []
        for scored, sample, order in zip(self._both, self._samples, self.orders, strict=True):
            tags, places = score_tags(scored), sample.places
            decided = (tags.predicted + tags.present).astype(np.float64)
            codes, images = scored.positives_by_image()
            position = np.full(scored.num_images, -1)
            position[places] = np.arange(len(places))
            of_tag, images = (codes // NUM_KEYS)[position[images] >= 0], position[images[position[images] >= 0]]
            by_tag = np.argsort(of_tag, kind="stable")
            bounds = np.searchsorted(of_tag[by_tag], np.arange(scored.num_tags + 1))
            lowest = lowest_keys(scored.logit_thresholds)
            influence = np.zeros(len(places))
            for place, tag in enumerate(known.tolist()):
                taken = (sample.columns(known[place : place + 1])[0] >= lowest[tag]).astype(np.float64)
                own = images[by_tag[bounds[tag] : bounds[tag + 1]]]
                change = -tags.f1[tag] * taken
                change[own] += 2 * taken[own] - tags.f1[tag]
                influence += change / decided[tag]
            means.append(float(tags.f1[known].mean()) if len(known) else math.nan)
            influences.append(influence[order] / max(1, len(known)))
        error = self.error(influences[1] - influences[0])
        return _difference(means[0], means[1], error, len(known), "tags with a positive", self.method, self.num_images)


def _of_images(
    a: ScoredImages, b: ScoredImages, order_a: npt.NDArray[np.int64], order_b: npt.NDArray[np.int64], draws: int
) -> dict[str, Difference]:
    """Scores that follow from the images' counters; images of equal counters are drawn together."""
    names = ("hits", "predicted")
    counters = [a.per_image("present")[order_a]]
    counters += [s.per_image(name)[order] for s, order in ((a, order_a), (b, order_b)) for name in names]
    distinct, times = np.unique(np.stack(counters), axis=1, return_counts=True)
    present, hits_a, predicted_a, hits_b, predicted_b = distinct
    terms = np.stack(
        [*distinct, image_f1(hits_a, predicted_a, present), image_f1(hits_b, predicted_b, present)]
    ).astype(np.float64)
    num_images, generator = a.num_images, np.random.default_rng(SEED)
    drawn = [terms @ generator.multinomial(num_images, times / num_images).astype(np.float64) for _ in range(draws)]
    sums = np.stack([terms @ times.astype(np.float64), *drawn]).T

    def micro(hits: Floats, predicted: Floats) -> Floats:
        decided = predicted + sums[0]
        return np.where(decided > 0, 2 * hits / np.maximum(decided, 1), math.nan)

    scores = {
        "f1_micro": (micro(sums[1], sums[2]), micro(sums[3], sums[4]), a.num_images * a.num_tags, "decisions"),
        "f1_per_image": (sums[5] / num_images, sums[6] / num_images, num_images, "images"),
        "predicted_per_image": (sums[2] / num_images, sums[4] / num_images, num_images, "images"),
    }
    return {
        name: _difference(
            float(one[0]), float(other[0]), _spread(other[1:] - one[1:]), over, what, "bootstrap", num_images
        )
        for name, (one, other, over, what) in scores.items()
    }


def _spread(values: Floats) -> float:
    there = values[~np.isnan(values)]
    return float(np.std(there, ddof=1)) if len(there) > 1 else math.nan


def _difference(a: float, b: float, error: float, over: int, what: str, method: str, num_images: int) -> Difference:
    if math.isnan(a) or math.isnan(b):
        one, other = (None if math.isnan(value) else value for value in (a, b))
        return Difference(one, other, None, None, None, None, over, what, method, num_images)
    if math.isnan(error):
        return Difference(a, b, b - a, None, None, None, over, what, method, num_images)
    return Difference(a, b, b - a, b - a - Z * error, b - a + Z * error, error, over, what, method, num_images)
