"""What an evaluation's counts say in groups: by frequency, by category, by image; no mean without its denominator.

Plain frozen dataclasses, which `dataclasses.asdict` turns into JSON; a mean over nothing is None, never NaN and never
left out. Refuses training counts or categories of another number of tags.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tagger.metrics.calibration import BinCounts, Calibration
from tagger.metrics.intervals import Interval, intervals
from tagger.metrics.ranking import ScoredImages, image_f1

# The lowest training count of each bucket; every count falls into exactly one.
FREQUENCY_EDGES = (0, 1, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
ENOUGH_POSITIVES = 5
_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Mean:
    """A mean and the number of tags or images it is over; None over none."""

    value: float | None
    over: int


@dataclass(frozen=True)
class TagScores:
    """Every tag's scores, arrays [C]: float64 with NaN where there is nothing to score, int64 counts, and bins.

    hits, predicted, present: images at the tag's threshold.
    """

    average_precision: npt.NDArray[np.float64]
    f1: npt.NDArray[np.float64]
    hits: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    present: npt.NDArray[np.int64]
    bins: BinCounts


@dataclass(frozen=True)
class Group:
    """Scores of some tags. name: what they have in common; num_positives: true (image, tag) in the evaluated images.

    mAP is over the tags with a positive, f1_macro over those present or predicted, f1_micro over all decisions (its
    `over` counts the group's tags).
    """

    name: str
    num_tags: int
    num_positives: int
    mAP: Mean
    f1_macro: Mean
    f1_micro: Mean
    calibration: Calibration

    @property
    def empty(self) -> bool:
        """Whether no tag belongs to it."""
        return self.num_tags == 0


@dataclass(frozen=True)
class FrequencyBucket(Group):
    """Tags with at least `low` training images and at most `high` (None: any number)."""

    low: int
    high: int | None


@dataclass(frozen=True)
class Coverage:
    """How many tags had how many positives in the evaluated images: none, 1 to 4, 5 or more."""

    num_tags: int
    without: int
    few: int
    enough: int


@dataclass(frozen=True)
class PerImage:
    """Means over images, and the (5, 25, 50, 75, 95) % quantiles of tags per image."""

    f1: Mean
    tags: Mean
    predicted: Mean
    quantile_shares: tuple[float, ...]
    tag_quantiles: tuple[float, ...]
    predicted_quantiles: tuple[float, ...]


@dataclass(frozen=True)
class Summary:
    """Everything that a page or a file says about an evaluation; `intervals` by the name of the score."""

    num_images: int
    num_tags: int
    all_tags: Group
    by_frequency: tuple[FrequencyBucket, ...]
    by_category: tuple[Group, ...]
    coverage: Coverage
    per_image: PerImage
    intervals: dict[str, Interval]


def score_tags(scored: ScoredImages) -> TagScores:
    """Every tag's scores, from one pass over the curves."""
    num_tags = scored.num_tags
    precision = np.full(num_tags, math.nan)
    counts = np.zeros((3, num_tags), np.int64)
    bins = BinCounts.zeros(num_tags)
    for tag, curve in enumerate(scored.curves()):
        precision[tag] = curve.average_precision()
        taken = int(np.searchsorted(-curve.logits, -scored.logit_thresholds[tag], side="right"))
        if taken:
            counts[:2, tag] = curve.hits[taken - 1], curve.predicted[taken - 1]
        counts[2, tag] = curve.num_positives
        bins.count(tag, curve)
    hits, predicted, present = counts
    both = predicted + present
    f1 = np.where(both > 0, 2 * hits / np.maximum(both, 1), math.nan)
    return TagScores(precision, f1, hits, predicted, present, bins)


def summarise(
    scored: ScoredImages,
    training_counts: npt.ArrayLike,
    categories: Sequence[str] | None = None,
    tag_scores: TagScores | None = None,
) -> Summary:
    """Everything about an evaluation. training_counts: int64 [C], images of the training part that have each tag.

    categories: each tag's category, [C]; None leaves them out. tag_scores: those of `score_tags`, if they are there.
    """
    counts = np.asarray(training_counts)
    if counts.shape != (scored.num_tags,) or (counts < 0).any():
        raise ValueError(f"training_counts is of shape {list(counts.shape)}; expected [{scored.num_tags}] counts >= 0")
    if categories is not None and len(categories) != scored.num_tags:
        raise ValueError(f"categories are {len(categories)}; expected one for each of {scored.num_tags} tags")
    tags = tag_scores or score_tags(scored)
    named = np.asarray(categories or [], dtype=object)
    everything = np.arange(scored.num_tags)
    return Summary(
        num_images=scored.num_images,
        num_tags=scored.num_tags,
        all_tags=_group("all tags", tags, everything),
        by_frequency=_by_frequency(tags, counts),
        by_category=tuple(
            _group(name, tags, np.flatnonzero(named == name)) for name in dict.fromkeys(categories or [])
        ),
        coverage=Coverage(
            num_tags=scored.num_tags,
            without=int((tags.present == 0).sum()),
            few=int(((tags.present > 0) & (tags.present < ENOUGH_POSITIVES)).sum()),
            enough=int((tags.present >= ENOUGH_POSITIVES).sum()),
        ),
        per_image=_per_image(scored),
        intervals=intervals(scored),
    )


def _by_frequency(tags: TagScores, counts: npt.NDArray[np.integer]) -> tuple[FrequencyBucket, ...]:
    buckets = []
    for low, above in zip(FREQUENCY_EDGES, [*FREQUENCY_EDGES[1:], None], strict=True):
        members = np.flatnonzero((counts >= low) & (counts < (math.inf if above is None else above)))
        high = None if above is None else above - 1
        name = f"{low:,} or more" if high is None else f"{low:,}" if high == low else f"{low:,} to {high:,}"
        buckets.append(FrequencyBucket(**vars(_group(name, tags, members)), low=low, high=high))
    return tuple(buckets)


def _group(name: str, tags: TagScores, members: npt.NDArray[np.integer]) -> Group:
    hits, predicted, present = (int(values[members].sum()) for values in (tags.hits, tags.predicted, tags.present))
    decided = predicted + present
    return Group(
        name=name,
        num_tags=len(members),
        num_positives=present,
        mAP=_mean(tags.average_precision[members]),
        f1_macro=_mean(tags.f1[members]),
        f1_micro=Mean(2 * hits / decided if decided else None, len(members)),
        calibration=tags.bins.calibration(members),
    )


def _per_image(scored: ScoredImages) -> PerImage:
    hits, predicted, present = (scored.per_image(name) for name in ("hits", "predicted", "present"))
    return PerImage(
        f1=_mean(image_f1(hits, predicted, present)),
        tags=_mean(present.astype(np.float64)),
        predicted=_mean(predicted.astype(np.float64)),
        quantile_shares=_SHARES,
        tag_quantiles=tuple(np.quantile(present, _SHARES).tolist()),
        predicted_quantiles=tuple(np.quantile(predicted, _SHARES).tolist()),
    )


def _mean(values: npt.NDArray[np.float64]) -> Mean:
    """Over what is not NaN; summed exactly, so that the order does not matter."""
    there = values[~np.isnan(values)]
    return Mean(math.fsum(there) / len(there) if len(there) else None, len(there))
