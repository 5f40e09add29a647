"""The first held-out images of the index with their scores, for pictures of an evaluation; a collector."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tagger.batch import Batch


@dataclass(frozen=True)
class Samples:
    """The first held-out images of the index: uint8 [3, H, W] each, logits [N, C] float32, tag indices; on the CPU."""

    images: tuple[Tensor, ...]
    logits: Tensor
    tags: tuple[tuple[int, ...], ...]


class FirstSamples:
    """Keeps the `count` images of the lowest rows: the same images in whatever order the batches come."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: list[_Sample] = []

    def add(self, host: Batch, logits: Tensor) -> None:
        """Look at a batch on the host; its logits [B, C] may be on any device."""
        if self._count == 0:
            return
        limit = self._kept[-1].row if len(self._kept) == self._count else None
        places = [i for i, row in enumerate(host.row_ids.tolist()) if limit is None or row < limit]
        if not places:
            return
        tags, scores = host.tag_lists(), logits[places].float().cpu()
        found = [
            _Sample(int(host.row_ids[i]), host.images[i].clone(), scores[n], tags[i]) for n, i in enumerate(places)
        ]
        self._kept = sorted([*self._kept, *found], key=lambda sample: sample.row)[: self._count]

    def joined(self) -> Samples:
        """What was kept, in the order of the rows."""
        if not self._kept:
            return Samples((), torch.empty(0, 0), ())
        _, images, logits, tags = zip(*self._kept, strict=True)
        return Samples(images, torch.stack(logits), tags)


class _Sample(NamedTuple):
    row: int
    image: Tensor
    logits: Tensor
    tags: tuple[int, ...]
