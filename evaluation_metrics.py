"""How well tags are told: average precision and F1 over a whole evaluation, from logits.

Exact: every score is kept and ranked as it came, so that ties count as ties and nothing saturates. Refuses NaN logits,
targets other than 0 and 1, shapes that do not fit, and a result without images.
"""

import math
from collections.abc import Iterator
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tagger.errors import DivergedError
from tagger.tag_lists import tag_coordinates

# Scores sorted at a time: 128 MiB of float32.
_SCORES_AT_A_TIME = 1 << 25

Scores = npt.NDArray[np.floating]


class MetricResult(TypedDict):
    """What ``MetricComputer.compute`` returns. A mean over nothing is NaN."""

    mAP: float
    """Mean average precision over the tags with a positive."""
    f1_macro: float
    """Mean F1 over the tags that are present or predicted in at least one image."""
    f1_micro: float
    """F1 of all decisions together."""
    threshold: float
    """The probability at or above which F1 takes a tag as predicted."""
    average_precision: Tensor
    """[C] float64 on the CPU, NaN where a tag has no positive."""
    num_tags_with_positives: int
    num_tags_in_f1_macro: int
    num_tags_left_out_of_f1_macro: int
    num_images: int


class MetricComputer:
    """Collects logits and targets batch by batch, then scores them all at once.

    Average precision is ``sum((R_n - R_n-1) * P_n)`` over distinct scores, as in scikit-learn, not interpolated. F1
    takes a tag as predicted where its probability is at or above ``threshold`` (0..1, both excluded).

    Holds 4 bytes of host memory for each image and tag (8 for float64 logits) and 8 to 12 for each positive: 20,000
    images of 20,000 tags take 1.6 GB. ``compute`` adds at most 128 MiB, or one tag's scores where those are more.
    Not safe for use by several threads; in a group of processes, each fills its own and one merges them.
    """

    def __init__(self, num_tags: int, threshold: float = 0.5) -> None:
        if num_tags < 1:
            raise ValueError(f"num_tags={num_tags} is below 1; expected the size of the vocabulary")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold={threshold} is not between 0 and 1; it is a probability, e.g. 0.5")
        self.num_tags = num_tags
        self.threshold = threshold
        self.reset()

    def reset(self) -> None:
        """Forget every image."""
        self._scores: list[Scores] = []
        self._positive_tags: list[npt.NDArray[np.int32]] = []
        self._positive_scores: list[Scores] = []

    @property
    def num_images(self) -> int:
        """Images seen since the last reset."""
        return sum(len(block) for block in self._scores)

    def update(self, logits: Tensor, targets: Tensor, tag_offsets: Tensor | None = None) -> None:
        """Add a batch: logits [B, C] with multi-hot targets [B, C], or with flat tag indices and offsets [B + 1].

        Any device; the logits are copied to the host, which waits for them.
        """
        if logits.ndim != 2 or logits.shape[1] != self.num_tags or not logits.is_floating_point():
            found = f"{logits.dtype} of shape {list(logits.shape)}"
            raise ValueError(f"logits are {found}; expected floats of shape [B, {self.num_tags}]")
        dtype = torch.promote_types(logits.dtype, torch.float32)
        scores = logits.detach().to("cpu", dtype, copy=True).contiguous().numpy()
        present = _present(scores.shape, targets.detach().cpu(), None if tag_offsets is None else tag_offsets.cpu())
        if scores.size and np.isnan(scores.min()):
            row, tag = np.argwhere(np.isnan(scores))[0]
            raise DivergedError(f"logits hold NaN, first at row {row}, tag {tag}; the model has diverged")
        rows, tags = np.nonzero(present)
        self._scores.append(scores)
        self._positive_tags.append(tags.astype(np.int32))
        self._positive_scores.append(scores[rows, tags])

    def merge(self, other: "MetricComputer") -> None:
        """Add the images of another computer, which keeps them; the result does not depend on their order."""
        if (other.num_tags, other.threshold) != (self.num_tags, self.threshold):
            raise ValueError(
                f"cannot merge metrics of {other.num_tags} tags at threshold {other.threshold} into "
                f"{self.num_tags} tags at {self.threshold}; both must agree"
            )
        self._scores += list(other._scores)
        self._positive_tags += list(other._positive_tags)
        self._positive_scores += list(other._positive_scores)

    def compute(self) -> MetricResult:
        """Score every image seen; more may follow."""
        num_images = self.num_images
        if num_images == 0:
            raise ValueError("no image to score; call update() with at least one")
        average_precision = np.full(self.num_tags, np.nan)
        # Per tag: true positives, predicted, present.
        counts = np.zeros((3, self.num_tags), dtype=np.int64)
        for tag, (scores, positives) in enumerate(self._ranked_tags()):
            lowest = _lowest_predicted(self.threshold, scores.dtype)
            if len(positives):
                average_precision[tag] = _average_precision(scores, positives)
            counts[:, tag] = (_count_from(positives, lowest), _count_from(scores, lowest), len(positives))
        hits, predicted, present = counts
        counted = (predicted + present) > 0
        with_positives = present > 0
        f1 = 2 * hits[counted] / (predicted + present)[counted]
        decisions = int(predicted.sum() + present.sum())
        return {
            "mAP": float(average_precision[with_positives].mean()) if with_positives.any() else math.nan,
            "f1_macro": float(f1.mean()) if counted.any() else math.nan,
            "f1_micro": 2 * int(hits.sum()) / decisions if decisions else math.nan,
            "threshold": self.threshold,
            "average_precision": torch.from_numpy(average_precision),
            "num_tags_with_positives": int(with_positives.sum()),
            "num_tags_in_f1_macro": int(counted.sum()),
            "num_tags_left_out_of_f1_macro": int(self.num_tags - counted.sum()),
            "num_images": num_images,
        }

    def _ranked_tags(self) -> Iterator[tuple[Scores, Scores]]:
        """For each tag, all its scores and those of its positives, both ascending."""
        positive_tags = np.concatenate(self._positive_tags)
        positive_scores = np.concatenate(self._positive_scores)
        order = np.lexsort((positive_scores, positive_tags))
        ranked_positives = positive_scores[order]
        bounds = np.searchsorted(positive_tags[order], np.arange(self.num_tags + 1))
        tags_at_a_time = max(1, _SCORES_AT_A_TIME // self.num_images)
        for start in range(0, self.num_tags, tags_at_a_time):
            stop = min(start + tags_at_a_time, self.num_tags)
            ranked = np.concatenate([block[:, start:stop].T for block in self._scores], axis=1)
            ranked.sort(axis=1)
            for tag in range(start, stop):
                yield ranked[tag - start], ranked_positives[bounds[tag] : bounds[tag + 1]]


def _present(shape: tuple[int, ...], targets: Tensor, tag_offsets: Tensor | None) -> npt.NDArray[np.bool_]:
    """Targets of either form, on the CPU, as a bool table of ``shape``."""
    if tag_offsets is not None:
        table = torch.zeros(shape, dtype=torch.bool)
        table[tag_coordinates(targets, tag_offsets, *shape)] = True
        return table.numpy()
    if tuple(targets.shape) != shape:
        raise ValueError(
            f"targets have shape {list(targets.shape)} and logits {list(shape)}; expected one shape [B, C], "
            "or a flat list of tag indices together with tag_offsets"
        )
    present = targets != 0
    if not torch.equal(present.to(targets.dtype), targets):
        raise ValueError("targets hold numbers other than 0 and 1; expected multi-hot targets")
    return present.numpy()


def _count_from(ranked: Scores, lowest: Scores | np.floating) -> npt.NDArray[np.int64] | np.int64:
    """How many of the ascending scores are at or above each of ``lowest``."""
    return len(ranked) - np.searchsorted(ranked, lowest, side="left")


def _average_precision(ranked: Scores, ranked_positives: Scores) -> float:
    """Mean over the positives of the precision at their score, which is ``sum((R_n - R_n-1) * P_n)``, ties and all."""
    hits = _count_from(ranked_positives, ranked_positives)
    return float(np.mean(hits / _count_from(ranked, ranked_positives)))


def _lowest_predicted(threshold: float, dtype: np.dtype[np.floating]) -> np.floating:
    """The lowest logit of ``dtype`` whose probability is at or above ``threshold``, compared in float64.

    Probabilities of large logits round to 1 and would all pass a threshold close to it; their logits do not.
    """
    exact = math.log(threshold) - math.log1p(-threshold)
    rounded = dtype.type(exact)
    return rounded if float(rounded) >= exact else np.nextafter(rounded, dtype.type(np.inf))
