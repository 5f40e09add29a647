"""Average precision of scores of any precision, to measure what rounding to 16 bits costs.

Only a tag's positives are sorted; every other score is placed among them by binary search. Five times the work of
counting 16-bit scores, and it needs all scores at once: for tests and benchmarks. Refuses NaN.
"""

import math

import numpy as np
import numpy.typing as npt


def reference_average_precision(
    scores: npt.NDArray[np.floating], rows: npt.NDArray[np.integer], tags: npt.NDArray[np.integer]
) -> npt.NDArray[np.float64]:
    """AP of each tag, float64 [C], NaN without positives: scores [N, C], row and tag of each positive once."""
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN, which has no rank")
    order = np.argsort(tags, kind="stable")
    bounds = np.searchsorted(tags[order], np.arange(scores.shape[1] + 1))
    found = np.full(scores.shape[1], math.nan)
    for tag in range(scores.shape[1]):
        own = order[bounds[tag] : bounds[tag + 1]]
        if len(own):
            found[tag] = _average_precision(scores[:, tag], np.sort(scores[rows[own], tag]))
    return found


def _average_precision(scores: npt.NDArray[np.floating], positives: npt.NDArray[np.floating]) -> float:
    """Mean over the ascending positives of the precision at their score."""
    at_or_above = np.bincount(np.searchsorted(positives, scores, side="right"), minlength=len(positives) + 1)
    places = np.searchsorted(positives, positives, side="right")
    counts = at_or_above[::-1].cumsum()[::-1]
    firsts = np.searchsorted(positives, positives, side="left")
    return float(np.mean((len(positives) - firsts) / counts[places]))
