"""How far predicted probabilities are from what came true, from the same counts as everything else.

Decisions (image, tag) are put into fixed bins by their predicted probability, narrow near 0 and 1 because nearly all
decisions about tags lie there. The error of a group of tags is ``sum over bins of |sum of probabilities - true ones|``
over all of the group's decisions, divided by the number of decisions (the expected calibration error), or by the number
of true ones (what it means for a tag that is seldom true: 1 is as wrong as never predicting it).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tagger.metrics.curves import TagCurve

EDGES = (0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
NUM_BINS = len(EDGES) - 1


@dataclass(frozen=True)
class Bin:
    """Decisions with a probability of at least `low` and below `high` (1 belongs to the last); None over nothing."""

    low: float
    high: float
    num_decisions: int
    mean_probability: float | None
    share_true: float | None


@dataclass(frozen=True)
class Calibration:
    """A group's errors as the module defines them; None over nothing.

    expected_true: the sum of all probabilities, to be compared with `num_true`.
    """

    num_decisions: int
    num_true: int
    expected_true: float
    error: float | None
    error_per_true: float | None
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class BinCounts:
    """Decisions, true ones and summed probabilities in each bin: [..., NUM_BINS] int64, int64, float64."""

    decisions: npt.NDArray[np.int64]
    true: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float64]

    @classmethod
    def zeros(cls, num_tags: int) -> "BinCounts":
        """Room for every tag."""
        shape = (num_tags, NUM_BINS)
        return cls(np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape))

    def count(self, row: int, curve: TagCurve) -> None:
        """Add a tag's decisions to a row."""
        decisions = np.diff(curve.predicted, prepend=0)
        probability = 1 / (1 + np.exp(-curve.logits.astype(np.float64)))
        bins = np.minimum(np.searchsorted(EDGES, probability, side="right") - 1, NUM_BINS - 1)
        self.decisions[row] += np.bincount(bins, decisions, NUM_BINS).astype(np.int64)
        self.true[row] += np.bincount(bins, np.diff(curve.hits, prepend=0), NUM_BINS).astype(np.int64)
        self.probability[row] += np.bincount(bins, decisions * probability, NUM_BINS)

    def calibration(self, tags: npt.NDArray[np.integer] | slice = slice(None)) -> Calibration:
        """The calibration of some rows' decisions together."""
        decisions, true = self.decisions[tags].sum(axis=0), self.true[tags].sum(axis=0)
        probability = self.probability[tags].sum(axis=0)
        wrong, all_decisions, all_true = np.abs(probability - true).sum(), int(decisions.sum()), int(true.sum())
        bins = [
            Bin(low, high, n, float(p) / n if n else None, t / n if n else None)
            for low, high, n, t, p in zip(
                EDGES[:-1], EDGES[1:], decisions.tolist(), true.tolist(), probability.tolist(), strict=True
            )
        ]
        return Calibration(
            num_decisions=all_decisions,
            num_true=all_true,
            expected_true=float(probability.sum()),
            error=float(wrong / all_decisions) if all_decisions else None,
            error_per_true=float(wrong / all_true) if all_true else None,
            bins=tuple(bins),
        )
