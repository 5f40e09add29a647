"""How well tags are told: average precision and F1 over a whole evaluation, from logits.

Exact for logits rounded to 16 bits (`tagger.metrics.keys`): every rounded score is counted, so that ties count as ties
and nothing is binned. Refuses NaN logits, targets other than 0 and 1, shapes that do not fit, and a result without
images.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tagger.errors import DivergedError
from tagger.metrics.curves import Counts, TagCurve, tag_curve
from tagger.metrics.host import HostMemory, LateCopies
from tagger.metrics.keys import KEY_OFFSET, NUM_KEYS, logit_of, lowest_keys, refuse_nan, to_keys_unchecked
from tagger.metrics.ranking import image_f1, rank_positives
from tagger.metrics.store import Form, ScoreStore, codes
from tagger.tag_lists import tag_coordinates

# Rows of a batch that are worked on together on a CPU: their logits and keys fit the second-level cache.
_LOGITS_AT_A_TIME = 1 << 18
_PER_IMAGE = ("hits", "predicted", "present")


class MetricResult(TypedDict):
    """What ``MetricComputer.compute`` returns. A mean over nothing is NaN."""

    mAP: float
    """Mean average precision over the tags with a positive."""
    f1_macro: float
    """Mean F1 over the tags that are present or predicted in at least one image."""
    f1_micro: float
    """F1 of all decisions together."""
    f1_per_image: float
    """Mean over images of each image's F1; an image without tags for which none is predicted counts as 1."""
    tags_per_image: float
    """Mean number of tags of an image."""
    predicted_per_image: float
    """Mean number of tags predicted for an image."""
    threshold: float
    """The probability at or above which F1 takes a tag as predicted; NaN where each tag has its own."""
    average_precision: Tensor
    """[C] float64 on the CPU, NaN where a tag has no positive."""
    num_tags_with_positives: int
    num_tags_in_f1_macro: int
    num_tags_left_out_of_f1_macro: int
    num_images: int


class MetricComputer:
    """Counts logits and targets batch by batch; everything is then computed from the counts.

    Average precision is ``sum((R_n - R_n-1) * P_n)`` over distinct 16-bit scores, as in scikit-learn, not interpolated.
    F1 takes a tag as predicted where its 16-bit logit is at or above that of ``threshold`` (a probability, 0..1, both
    excluded), or the tag's own of ``logit_thresholds`` ([C] floats, infinite ones allowed).

    Holds 2 bytes for each image and tag, or, where that is less, 262 KB for each tag whatever the number of images
    (``form``; on the device where there is room), and 8 bytes for each positive. Above ``memory_bytes`` the scores lie
    in a temporary file below ``folder``. `expected_images` spares the change from one form to the other.
    Not safe for use by several threads; in a group of processes, each fills its own and one adds their ``arrays``.
    """

    def __init__(
        self,
        num_tags: int,
        threshold: float = 0.5,
        *,
        logit_thresholds: npt.ArrayLike | None = None,
        form: Form = "auto",
        expected_images: int | None = None,
        memory_bytes: int | None = None,
        folder: Path | None = None,
    ) -> None:
        if num_tags < 1:
            raise ValueError(f"num_tags={num_tags} is below 1; expected the size of the vocabulary")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold={threshold} is not between 0 and 1; it is a probability, e.g. 0.5")
        if logit_thresholds is None:
            thresholds = np.full(num_tags, logit_of(threshold))
        else:
            thresholds = np.array(logit_thresholds, dtype=np.float64)
            threshold = math.nan
        if thresholds.shape != (num_tags,) or np.isnan(thresholds).any():
            raise ValueError(
                f"logit_thresholds has shape {list(thresholds.shape)} and {int(np.isnan(thresholds).sum())} NaN; "
                f"expected [{num_tags}] floats without NaN"
            )
        self.num_tags = num_tags
        self.threshold = threshold
        self.logit_thresholds: npt.NDArray[np.float64] = thresholds
        self._lowest = lowest_keys(thresholds)
        self._form, self._expected_images = form, expected_images
        self._memory_bytes, self._folder = memory_bytes, folder
        self._memory: HostMemory | None = None
        self.reset()

    def reset(self) -> None:
        """Forget every image."""
        self.close()
        self._memory = HostMemory(self._memory_bytes, self._folder)
        self.store = ScoreStore(self.num_tags, self._memory, self._form, self._expected_images)
        self._copies = LateCopies()
        # Codes in the order of their images, and the same in ascending order once they were asked for.
        self._positives: list[Counts] = []
        self._ascending: Counts | None = None
        self._per_image: dict[str, list[npt.NDArray[np.integer]]] = {name: [] for name in _PER_IMAGE}
        self._num_images = 0
        self._lowest_on: dict[torch.device, Tensor] = {}

    def close(self) -> None:
        """Remove temporary files; only `reset` is of use afterwards."""
        if self._memory is not None:
            self._memory.close()

    @property
    def num_images(self) -> int:
        """Images seen since the last reset."""
        return self._num_images

    def update(
        self, logits: Tensor, targets: Tensor, tag_offsets: Tensor | None = None, image_ids: Tensor | None = None
    ) -> None:
        """Add a batch: logits [B, C] with multi-hot targets [B, C], or with flat tag indices and offsets [B + 1].

        Logits on any device, targets best on the CPU: nothing then waits for the device, and a NaN there is raised by
        a later call. `image_ids`, int64 [B], name the images for intervals whatever the order in which they come; by
        default images are numbered as they come.
        """
        if logits.ndim != 2 or logits.shape[1] != self.num_tags or not logits.is_floating_point():
            found = f"{logits.dtype} of shape {list(logits.shape)}"
            raise ValueError(f"logits are {found}; expected floats of shape [B, {self.num_tags}]")
        first, stop = self._num_images, self._num_images + len(logits)
        ids = torch.arange(first, stop) if image_ids is None else image_ids.detach().cpu().long()
        if ids.shape != (len(logits),):
            raise ValueError(f"image_ids has shape {list(ids.shape)}; expected one for each of {len(logits)} images")
        offsets = None if tag_offsets is None else tag_offsets.detach().cpu()
        places = _positive_places(logits.shape, targets.detach().cpu(), offsets)
        if not len(logits):
            return
        if logits.device.type == "cpu":
            refuse_nan(logits)
            parts = [
                self._count_rows(logits[rows], positives, ids[rows])
                for rows, positives in _row_parts(places, len(logits), self.num_tags)
            ]
            sent = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        else:
            nan_seen = torch.isnan(logits.amax()).view(1)
            sent = (*self._count_rows(logits, places.to(logits.device, non_blocking=True), ids), nan_seen)
        self._num_images = stop
        self._copies.send(sent, lambda tensors: self._receive(tensors, places.numpy()))

    def merge(self, other: "MetricComputer") -> None:
        """Add the images of another computer, which keeps them; the result does not depend on their order."""
        if other.num_tags != self.num_tags or not np.array_equal(other.logit_thresholds, self.logit_thresholds):
            raise ValueError(
                f"cannot merge metrics of {other.num_tags} tags at threshold {other.threshold} into "
                f"{self.num_tags} tags at {self.threshold}; both must agree"
            )
        self._drain()
        other._drain()
        self.store.merge(other.store)
        self._positives += other._positives
        self._ascending = None
        for name in _PER_IMAGE:
            self._per_image[name] += other._per_image[name]
        self._num_images += other._num_images

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """All that was counted, as plain arrays for another process; see `add_arrays`."""
        self._drain()
        return {
            "logit_thresholds": self.logit_thresholds,
            "positives": _joined(self._positives, np.int64),
            **{name: self.per_image(name) for name in _PER_IMAGE},
            **self.store.arrays(),
        }

    def add_arrays(self, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Add what another computer of the same tags and thresholds counted, e.g. that of another rank."""
        if not np.array_equal(arrays["logit_thresholds"], self.logit_thresholds):
            raise ValueError(
                f"cannot add metrics of {len(arrays['logit_thresholds'])} tags with other thresholds to "
                f"{self.num_tags} tags; both must agree"
            )
        self._drain()
        self.store.add_arrays(arrays)
        self._positives.append(np.asarray(arrays["positives"], dtype=np.int64))
        self._ascending = None
        for name in _PER_IMAGE:
            self._per_image[name].append(np.asarray(arrays[name], dtype=np.int64))
        self._num_images += len(arrays["hits"])

    def per_image(self, name: str) -> npt.NDArray[np.int64]:
        """int64 [N]: "hits", "predicted" or "present" tags of each image at the thresholds, or its "image_ids"."""
        self._drain()
        return self.store.image_ids if name == "image_ids" else _joined(self._per_image[name], np.int64)

    def positives(self) -> Counts:
        """`tagger.metrics.store.codes` of the key of every (image, tag) that is true, int64 [P], ascending."""
        self._drain()
        if self._ascending is None:
            self._ascending = np.sort(_joined(self._positives, np.int64))
        return self._ascending

    def positives_by_image(self) -> tuple[Counts, npt.NDArray[np.int64]]:
        """The same codes image by image, and the place (0..N-1, in order of coming) of each one's image."""
        self._drain()
        return _joined(self._positives, np.int64), np.repeat(np.arange(self._num_images), self.per_image("present"))

    def compute(self) -> MetricResult:
        """Score every image seen; more may follow."""
        self._drain()
        if self._num_images == 0:
            raise ValueError("no image to score; call update() with at least one")
        positives = self.positives()
        at_thresholds = codes(np.arange(self.num_tags), self._lowest)
        ranked, predicted = rank_positives(positives, self.store, at_thresholds)
        present, average_precision = ranked.present, ranked.average_precision
        hits = np.cumsum(present) - np.searchsorted(positives, at_thresholds)
        with_positives = present > 0
        counted = (predicted + present) > 0
        f1 = 2 * hits[counted] / (predicted + present)[counted]
        decisions = int(predicted.sum() + present.sum())
        return {
            "mAP": float(average_precision[with_positives].mean()) if with_positives.any() else math.nan,
            "f1_macro": float(f1.mean()) if counted.any() else math.nan,
            "f1_micro": 2 * int(hits.sum()) / decisions if decisions else math.nan,
            "f1_per_image": _mean(image_f1(*(self.per_image(name) for name in _PER_IMAGE))),
            "tags_per_image": int(present.sum()) / self._num_images,
            "predicted_per_image": int(predicted.sum()) / self._num_images,
            "threshold": self.threshold,
            "average_precision": torch.from_numpy(average_precision),
            "num_tags_with_positives": int(with_positives.sum()),
            "num_tags_in_f1_macro": int(counted.sum()),
            "num_tags_left_out_of_f1_macro": int(self.num_tags - counted.sum()),
            "num_images": self._num_images,
        }

    def curves(self, tags: Sequence[int] | None = None) -> Iterator[TagCurve]:
        """The curve of each tag (None: of all, in order), made one after the other."""
        positives = self.positives()
        chosen = np.arange(self.num_tags) if tags is None else np.asarray(tags, dtype=np.int64)
        if len(chosen) and not (chosen.min() >= 0 and chosen.max() < self.num_tags):
            raise ValueError(f"tags run from {chosen.min()} to {chosen.max()}; expected 0..{self.num_tags - 1}")
        bounds = np.searchsorted(positives, [chosen * NUM_KEYS, (chosen + 1) * NUM_KEYS])
        for tag, low, high, (keys, counts) in zip(
            chosen.tolist(), bounds[0].tolist(), bounds[1].tolist(), self.store.distinct(chosen), strict=True
        ):
            own = (positives[low:high] % NUM_KEYS - KEY_OFFSET).astype(np.int16)
            yield tag_curve(tag, keys, counts, own, self._num_images)

    def micro_curve(self) -> TagCurve:
        """The curve of all decisions of all tags together, as of one tag; its `tag` is -1."""
        self._drain()
        table = self.store.totals()
        cells = np.flatnonzero(table)
        own = np.sort(self.positives() % NUM_KEYS - KEY_OFFSET).astype(np.int16)
        keys = (cells - KEY_OFFSET).astype(np.int16)
        return tag_curve(-1, keys, table[cells], own, self._num_images * self.num_tags)

    def _count_rows(self, logits: Tensor, places: Tensor, image_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys of some images; the positives' keys int16 [P] and each image's predicted tags int32 [B]."""
        keys = to_keys_unchecked(logits)
        self.store.add(keys, image_ids.numpy())
        if keys.device not in self._lowest_on:
            self._lowest_on[keys.device] = torch.from_numpy(self._lowest).to(keys.device)
        return keys.view(-1)[places], predicted_tags(keys, self._lowest_on[keys.device])

    def _receive(self, tensors: tuple[Tensor, ...], places: npt.NDArray[np.int64]) -> None:
        keys, predicted = tensors[0].numpy(), tensors[1].numpy()
        if len(tensors) == 3 and bool(tensors[2]):
            raise DivergedError(f"logits hold NaN, first in a batch of {len(predicted)} images; the model has diverged")
        rows, tags = np.divmod(places, self.num_tags)
        taken = keys >= self._lowest[tags]
        self._positives.append(codes(tags, keys))
        self._ascending = None
        for name, values in (
            ("hits", np.bincount(rows[taken], minlength=len(predicted)).astype(np.int32)),
            ("predicted", predicted.astype(np.int32)),
            ("present", np.bincount(rows, minlength=len(predicted)).astype(np.int32)),
        ):
            self._per_image[name].append(values)

    def _drain(self) -> None:
        self._copies.drain()


def predicted_tags(keys: Tensor, lowest: Tensor) -> Tensor:
    """How many keys of each image [B, C] are at or above the tags' lowest [C]: int32 [B] on the keys' device."""
    if keys.device.type == "cpu":
        # torch compares int16 six times slower than numpy here.
        taken = torch.from_numpy(np.greater_equal(keys.numpy(), lowest.numpy()))
    else:
        taken = keys >= lowest
    return taken.sum(dim=1, dtype=torch.int32)


def _positive_places(shape: torch.Size, targets: Tensor, tag_offsets: Tensor | None) -> Tensor:
    """Where targets of either form, on the CPU, are true: ascending int64 places in the flat [B * C]."""
    if tag_offsets is not None:
        rows, tags = tag_coordinates(targets, tag_offsets, *shape)
        places = rows * shape[1] + tags
        return places if bool((places[1:] > places[:-1]).all()) else torch.unique(places)
    if targets.shape != shape:
        raise ValueError(
            f"targets have shape {list(targets.shape)} and logits {list(shape)}; expected one shape [B, C], "
            "or a flat list of tag indices together with tag_offsets"
        )
    present = targets != 0
    if not torch.equal(present.to(targets.dtype), targets):
        raise ValueError("targets hold numbers other than 0 and 1; expected multi-hot targets")
    return torch.from_numpy(np.flatnonzero(present.numpy()))


def _row_parts(places: Tensor, num_rows: int, num_tags: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows that fit the cache together, with the places of their positives counted from the first of them."""
    step = max(1, _LOGITS_AT_A_TIME // num_tags)
    for start in range(0, num_rows, step):
        bounds = torch.searchsorted(places, torch.tensor([start, start + step]) * num_tags)
        own = places[int(bounds[0]) : int(bounds[1])]
        yield slice(start, start + step), own - start * num_tags


def _joined(parts: Sequence[npt.NDArray[np.integer]], dtype: npt.DTypeLike) -> npt.NDArray[np.int64]:
    return np.concatenate(parts, dtype=dtype) if parts else np.empty(0, dtype=np.int64)


def _mean(values: npt.NDArray[np.float64]) -> float:
    return math.fsum(values) / len(values)
