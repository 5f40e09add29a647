"""One tag's ranking as counts at its distinct scores, and the operating points that follow from it.

All from integers: a point is the division of two counts, so the same counts give the same numbers to the last bit.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tagger.metrics.keys import Keys, from_keys

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class OperatingPoint:
    """What taking a tag at or above `logit` gives; precision is NaN where nothing is taken, recall where none is true.

    f1 is NaN where nothing is taken and none is true.
    """

    logit: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class TagCurve:
    """A tag's distinct 16-bit scores with the number of images, and of positives, at or above each.

    tag: index in the vocabulary, -1 for all decisions of all tags together. logits: float32 [K], descending.
    predicted, hits: int64 [K]. num_images: images (decisions) scored; num_positives: those that have the tag.
    """

    tag: int
    logits: npt.NDArray[np.float32]
    predicted: Counts
    hits: Counts
    num_images: int
    num_positives: int

    def average_precision(self) -> float:
        """``sum((R_n - R_n-1) * P_n)`` over the distinct scores, as in scikit-learn; NaN without positives."""
        if not self.num_positives:
            return math.nan
        gained = np.diff(self.hits, prepend=0)
        return float((gained * (self.hits / self.predicted)).sum() / self.num_positives)

    def precision_recall(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Precision and recall at each distinct score, float64 [K] each; recall is NaN without positives."""
        recall = self.hits / self.num_positives if self.num_positives else np.full(len(self.hits), math.nan)
        return self.hits / self.predicted, recall

    def f1(self) -> npt.NDArray[np.float64]:
        """F1 at each distinct score, float64 [K]."""
        return np.asarray(2 * self.hits / (self.predicted + self.num_positives))

    def best_f1(self) -> OperatingPoint | None:
        """The highest score among those of the best F1; None without positives."""
        return self._point(int(np.argmax(self.f1()))) if self.num_positives else None

    def equal_precision_recall(self) -> OperatingPoint | None:
        """Where precision and recall are closest, which is where as many images are taken as have the tag.

        Of two equally close scores the higher; None without positives.
        """
        if not self.num_positives:
            return None
        return self._point(int(np.argmin(np.abs(self.predicted - self.num_positives))))

    def at_precision(self, precision: float) -> OperatingPoint | None:
        """The lowest score whose precision is at least `precision` (0..1); None where there is none.

        Lowest means most recall; a point without hits does not count.
        """
        reached = np.flatnonzero((self.hits > 0) & (self.hits / self.predicted >= precision))
        return self._point(int(reached[-1])) if len(reached) else None

    def at(self, logit: float) -> OperatingPoint:
        """The point of a threshold of any value: images whose 16-bit score is at or above it are taken."""
        taken = int(np.searchsorted(-self.logits.astype(np.float64), -logit, side="right"))
        if taken:
            return self._values(logit, int(self.hits[taken - 1]), int(self.predicted[taken - 1]))
        return self._values(logit, 0, 0)

    def _point(self, place: int) -> OperatingPoint:
        return self._values(float(self.logits[place]), int(self.hits[place]), int(self.predicted[place]))

    def _values(self, logit: float, hits: int, predicted: int) -> OperatingPoint:
        positives = self.num_positives
        return OperatingPoint(
            logit,
            hits / predicted if predicted else math.nan,
            hits / positives if positives else math.nan,
            2 * hits / (predicted + positives) if predicted + positives else math.nan,
        )


def tag_curve(tag: int, keys: Keys, counts: Counts, positive_keys: Keys, num_images: int) -> TagCurve:
    """A curve from ascending distinct keys [K] with their counts, and the ascending keys of the positives [P]."""
    hits = len(positive_keys) - np.searchsorted(positive_keys, keys, side="left")
    return TagCurve(
        tag=tag,
        logits=from_keys(keys[::-1]),
        predicted=np.cumsum(counts[::-1], dtype=np.int64),
        hits=hits[::-1].astype(np.int64),
        num_images=num_images,
        num_positives=len(positive_keys),
    )
