"""Everything about a few named tags: their curves, what is said in their place, and the images that speak against them.

Confusions are counted at the thresholds, image by image, in two tables:

    missed   of the images that have the tag and do not get it: which tags they get without having them
    wrong    of the images that get the tag without having it: which tags they have and do not get

Each other tag comes with its count among those images and with its rate in all images; tags are listed by how far the
count exceeds what that rate gives (count - rate * images), those above 0 alone, so that a tag which is wrong everywhere
does not head every list. The hardest images are those that have the tag with the lowest score, and those that lack it
with the highest. Refuses NaN logits; memory is that of a few rows of tags for each named one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tagger.batch import Batch
from tagger.metrics.curves import OperatingPoint, TagCurve
from tagger.metrics.keys import from_keys, lowest_keys, to_keys
from tagger.metrics.ranking import ScoredImages
from tagger.tag_lists import tag_coordinates

NUM_POINTS = 200


@dataclass(frozen=True)
class CurvePoint:
    """Taking the tag at or above `logit`: the images predicted, and those of them that have it."""

    logit: float
    score: float
    predicted: int
    hits: int
    precision: float
    recall: float | None


@dataclass(frozen=True)
class Confusion:
    """Another tag, in how many of the table's images, and the share of all images in which the same is true of it."""

    tag: int
    count: int
    rate: float


@dataclass(frozen=True)
class Confusions:
    """One of the two tables: over `num_images` images, the other tags from the most surprising down."""

    num_images: int
    others: tuple[Confusion, ...]


@dataclass(frozen=True)
class HardImage:
    """A row of the index with the tag's score there, 0..1."""

    row: int
    score: float


@dataclass(frozen=True)
class TagDetail:
    """All about one tag. at_threshold, best_f1 and equal are None where nothing is there to say it of.

    lowest: images that have the tag, the lowest score first; highest: images that lack it, the highest first.
    """

    tag: int
    num_images: int
    num_positives: int
    average_precision: float | None
    at_threshold: OperatingPoint
    best_f1: OperatingPoint | None
    equal: OperatingPoint | None
    curve: tuple[CurvePoint, ...]
    missed: Confusions
    wrong: Confusions
    lowest: tuple[HardImage, ...]
    highest: tuple[HardImage, ...]


class TagDetails:
    """Collects batches for some tags of a model's outputs; the same result in whatever order the images come."""

    def __init__(
        self, tags: Sequence[int], num_tags: int, logit_thresholds: npt.ArrayLike, *, num_hard: int = 10
    ) -> None:
        """logit_thresholds: one number, or float [num_tags]. num_hard: images of each kind that are kept."""
        self.tags = tuple(dict.fromkeys(tags))
        self.num_images = 0
        self._thresholds = np.broadcast_to(np.asarray(logit_thresholds, np.float64), (num_tags,))
        self._lowest_keys = lowest_keys(self._thresholds)
        self._num_hard = num_hard
        # Images in which a tag is predicted and not true, and true and not predicted: [C].
        self._said, self._unsaid = np.zeros(num_tags, np.int64), np.zeros(num_tags, np.int64)
        self._missed = np.zeros((len(self.tags), num_tags), np.int64)
        self._wrong = np.zeros((len(self.tags), num_tags), np.int64)
        self._hard: list[tuple[_Lowest, _Lowest]] = [(_none(), _none()) for _ in self.tags]

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Look at a batch on the host with its logits, float32 [B, C] on the CPU."""
        keys = to_keys(logits).numpy()
        predicted = keys >= self._lowest_keys
        present = np.zeros(predicted.shape, np.bool_)
        places, columns = tag_coordinates(batch.tag_indices, batch.tag_offsets, *predicted.shape)
        present[places.numpy(), columns.numpy()] = True
        said, unsaid = predicted & ~present, present & ~predicted
        self.num_images += len(batch)
        self._said += said.sum(axis=0)
        self._unsaid += unsaid.sum(axis=0)
        rows = batch.row_ids.numpy()
        for place, tag in enumerate(self.tags):
            self._missed[place] += said[unsaid[:, tag]].sum(axis=0)
            self._wrong[place] += unsaid[said[:, tag]].sum(axis=0)
            has, own = present[:, tag], keys[:, tag].astype(np.int32)
            low, high = self._hard[place]
            self._hard[place] = (
                _lowest(low, own[has], rows[has], self._num_hard),
                _lowest(high, -own[~has], rows[~has], self._num_hard),
            )

    def details(self, scored: ScoredImages) -> list[TagDetail]:
        """What was found, in the order of the tags; `scored` has counted the same images."""
        assert scored.num_images == self.num_images
        curves = scored.curves(self.tags)
        return [self._detail(place, curve) for place, curve in enumerate(curves)]

    def _detail(self, place: int, curve: TagCurve) -> TagDetail:
        tag = curve.tag
        low, high = self._hard[place]
        return TagDetail(
            tag=tag,
            num_images=curve.num_images,
            num_positives=curve.num_positives,
            average_precision=curve.average_precision() if curve.num_positives else None,
            at_threshold=curve.at(float(self._thresholds[tag])),
            best_f1=curve.best_f1(),
            equal=curve.equal_precision_recall(),
            curve=curve_points(curve),
            missed=self._confusions(self._missed[place], int(self._unsaid[tag]), self._said),
            wrong=self._confusions(self._wrong[place], int(self._said[tag]), self._unsaid),
            lowest=_hard_images(low[0], low[1]),
            highest=_hard_images(-high[0], high[1]),
        )

    def _confusions(
        self, counts: npt.NDArray[np.int64], num_images: int, everywhere: npt.NDArray[np.int64]
    ) -> Confusions:
        rates = everywhere / max(1, self.num_images)
        excess = counts - rates * num_images
        found = np.flatnonzero((counts > 0) & (excess > 0))
        ranked = found[np.argsort(-excess[found], kind="stable")]
        others = tuple(Confusion(int(tag), int(counts[tag]), float(rates[tag])) for tag in ranked)
        return Confusions(num_images, others)


def curve_points(curve: TagCurve, num_points: int = NUM_POINTS) -> tuple[CurvePoint, ...]:
    """At most `num_points` of a curve from the highest score down, the first and the last among them.

    Where there are more, they are spread evenly over the hits, which is over recall.
    """
    chosen = np.arange(len(curve.logits))
    if len(chosen) > num_points:
        last = int(curve.hits[-1])
        wanted = np.linspace(0, last, num_points - 2) if last else np.linspace(0, len(chosen) - 1, num_points - 2)
        inner = np.searchsorted(curve.hits, wanted) if last else wanted.astype(np.int64)
        chosen = np.unique(np.concatenate([[0], inner, [len(chosen) - 1]]))
    precision, recall = curve.precision_recall()
    logits = curve.logits.astype(np.float64)
    return tuple(
        CurvePoint(
            logit=float(logits[i]),
            score=float(_scores(logits[i])),
            predicted=int(curve.predicted[i]),
            hits=int(curve.hits[i]),
            precision=float(precision[i]),
            recall=float(recall[i]) if curve.num_positives else None,
        )
        for i in chosen.tolist()
    )


# Keys in ascending order, ties by row, and their rows.
_Lowest = tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]


def _none() -> _Lowest:
    return np.empty(0, np.int32), np.empty(0, np.int64)


def _lowest(so_far: _Lowest, keys: npt.NDArray[np.int32], rows: npt.NDArray[np.int64], count: int) -> _Lowest:
    keys, rows = np.concatenate([so_far[0], keys]), np.concatenate([so_far[1], rows])
    order = np.lexsort((rows, keys))[:count]
    return keys[order], rows[order]


def _hard_images(keys: npt.NDArray[np.int32], rows: npt.NDArray[np.int64]) -> tuple[HardImage, ...]:
    scores = _scores(from_keys(keys).astype(np.float64))
    return tuple(HardImage(row, score) for row, score in zip(rows.tolist(), scores.tolist(), strict=True))


def _scores(logits: npt.ArrayLike) -> npt.NDArray[np.float64]:
    # As tanh, which does not overflow.
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * np.asarray(logits, np.float64))))
