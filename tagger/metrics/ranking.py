"""Every true (image, tag) ranked within its tag: what average precision and its uncertainty are made of."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tagger.metrics.curves import Counts, TagCurve
from tagger.metrics.keys import NUM_KEYS
from tagger.metrics.store import ScoreStore


class ScoredImages(Protocol):
    """What the functions of this package ask of `evaluation_metrics.MetricComputer`."""

    num_tags: int
    store: ScoreStore
    logit_thresholds: npt.NDArray[np.float64]

    @property
    def num_images(self) -> int:
        """N."""

    def per_image(self, name: str) -> npt.NDArray[np.int64]:
        """int64 [N]: "hits", "predicted", "present" or "image_ids"."""

    def curves(self, tags: Sequence[int] | None = None) -> Iterator[TagCurve]:
        """Each tag's curve, one after the other."""

    def positives(self) -> Counts:
        """Ascending codes of the true (image, tag)."""

    def positives_by_image(self) -> tuple[Counts, npt.NDArray[np.int64]]:
        """The same codes image by image, and the place (0..N-1) of each one's image."""


@dataclass(frozen=True)
class RankedPositives:
    """The distinct keys of each tag's positives, as ascending `codes`, all arrays int64 of the same length [K].

    tags: each one's tag; times: positives with that key; hits_from, counts_from: positives, and images, with that key
    or a higher one. present: int64 [C], positives of each tag.
    """

    codes: Counts
    tags: Counts
    times: Counts
    hits_from: Counts
    counts_from: Counts
    present: Counts

    @property
    def precision(self) -> npt.NDArray[np.float64]:
        """Precision at each key, float64 [K]."""
        return np.asarray(self.hits_from / self.counts_from)

    @cached_property
    def average_precision(self) -> npt.NDArray[np.float64]:
        """float64 [C], NaN where a tag has no positive.

        The mean over the positives of the precision at their score is ``sum((R_n - R_n-1) * P_n)``, ties and all.
        """
        summed = np.bincount(self.tags, weights=self.times * self.precision, minlength=len(self.present))
        return np.where(self.present > 0, summed / np.maximum(self.present, 1), math.nan)


def rank_positives(
    positives: Counts, store: ScoreStore, others: Counts | None = None
) -> tuple[RankedPositives, Counts]:
    """The ranking of ascending `positives`, and how many images are at or above ascending `others` in theirs.

    Both come from one pass over the scores.
    """
    others = np.empty(0, np.int64) if others is None else others
    present = np.bincount(positives // NUM_KEYS, minlength=store.num_tags)
    firsts = np.flatnonzero(np.diff(positives, prepend=-1))
    wanted = positives[firsts]
    queries = np.concatenate([wanted, others])
    order = np.argsort(queries, kind="stable")
    counts = np.empty(len(queries), np.int64)
    counts[order] = store.counts_from(queries[order])
    tags = wanted // NUM_KEYS
    ranked = RankedPositives(
        codes=wanted,
        tags=tags,
        times=np.diff(firsts, append=len(positives)),
        hits_from=np.cumsum(present)[tags] - firsts,
        counts_from=counts[: len(wanted)],
        present=present,
    )
    return ranked, counts[len(wanted) :]


def image_f1(
    hits: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], present: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """F1 of each image, float64 of the same shape; 1 where it has no tags and none is predicted."""
    both = predicted + present
    return np.where(both > 0, 2 * hits / np.maximum(both, 1), 1.0)
