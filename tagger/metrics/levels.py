"""A curve at evenly spaced probabilities, for services that draw curves so, and which tags stand for a vocabulary."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tagger.metrics.curves import Counts, TagCurve

NUM_LEVELS = 101


@dataclass(frozen=True)
class Levels:
    """What taking a tag at or above each of K probabilities gives; level i stands for i / (K - 1), from 0 to 1.

    hits, predicted: int64 [K]. num_images: images (decisions) scored; num_positives: those that have the tag.
    """

    hits: Counts
    predicted: Counts
    num_images: int
    num_positives: int

    @classmethod
    def of(cls, curve: TagCurve, num_levels: int = NUM_LEVELS) -> "Levels":
        """The points of an exact curve."""
        probability = np.linspace(0.0, 1.0, num_levels)
        with np.errstate(divide="ignore"):
            logits = np.log(probability) - np.log1p(-probability)
        taken = np.searchsorted(-curve.logits.astype(np.float64), -logits, side="right")
        hits, predicted = (np.concatenate([[0], counts])[taken] for counts in (curve.hits, curve.predicted))
        return cls(hits, predicted, curve.num_images, curve.num_positives)

    @property
    def probability(self) -> npt.NDArray[np.float64]:
        """float64 [K], 0..1."""
        return np.linspace(0.0, 1.0, len(self.hits))

    @property
    def precision(self) -> npt.NDArray[np.float64]:
        """float64 [K]; NaN where nothing is taken."""
        return _shares(self.hits, self.predicted)

    @property
    def recall(self) -> npt.NDArray[np.float64]:
        """float64 [K]; NaN without positives."""
        return _shares(self.hits, np.full_like(self.hits, self.num_positives))

    @property
    def f1(self) -> npt.NDArray[np.float64]:
        """float64 [K]; NaN where nothing is taken and nothing is true."""
        return _shares(2 * self.hits, self.predicted + self.num_positives)


def tags_by_frequency(counts: npt.NDArray[np.integer], known: npt.NDArray[np.bool_], number: int = 4) -> list[int]:
    """Tags that stand for a vocabulary, at even steps from the most frequent to the rarest of those that are `known`.

    counts: int64 [C]; known: bool [C]. The same tags at every evaluation of a run; fewer than `number` where there are
    fewer.
    """
    ranked = np.flatnonzero(known)
    ranked = ranked[np.argsort(-counts[ranked], kind="stable")]
    if not len(ranked):
        return []
    places = np.unique(np.linspace(0, len(ranked) - 1, min(number, len(ranked))).round().astype(np.int64))
    return [int(tag) for tag in ranked[places]]


def _shares(part: Counts, whole: Counts) -> npt.NDArray[np.float64]:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)
