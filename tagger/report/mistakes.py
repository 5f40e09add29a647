"""The images on which a model is most sure and wrong, with small copies to look at: a collector of an evaluation.

Two kinds, each ranked by itself, one decision an image:

    extra    a tag that is predicted and not there; the strength is its logit. Missing labels show here.
    missed   a tag that is there and not predicted; the strength is the log-odds of how common the tag is, less its
             logit, in nats: how much less likely the image made the tag. So a rare tag, which scores low everywhere,
             does not head the list wherever it stands.

Logits are rounded to 16 bits first, as everywhere in evaluation. Refuses NaN logits and mirrored images.
"""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tagger.batch import Batch
from tagger.contact_sheet import Card, SheetTag
from tagger.metrics.keys import MAX_KEY, Keys, from_keys, lowest_keys, probability_of, to_keys
from tagger.tag_lists import tag_coordinates

Kind = Literal["extra", "missed"]
THUMBNAIL_SIDE = 160
MAX_TAGS = 10
_NO_KEY = np.int16(-MAX_KEY - 1)


@dataclass(frozen=True, order=True)
class Mistake:
    """One image and the tag that the model is most wrong about on it; sorts by strength, the strongest first.

    scores: (tag, logit, whether it is there, whether it is predicted) of the tags that are there or predicted, the
    highest first, at most MAX_TAGS and the tag itself always among them; num_more: how many more there are. image:
    uint8 [h, w, 3], without the bars of a letterbox, at most THUMBNAIL_SIDE on its long side.
    """

    sort_key: tuple[float, int]
    row: int = field(compare=False)
    kind: Kind = field(compare=False)
    tag: int = field(compare=False)
    logit: float = field(compare=False)
    scores: tuple[tuple[int, float, bool, bool], ...] = field(compare=False)
    num_more: int = field(compare=False)
    image: npt.NDArray[np.uint8] = field(compare=False, repr=False)

    @property
    def strength(self) -> float:
        """See the top of this file; nats."""
        return -self.sort_key[0]


class ConfidentMistakes:
    """Collects the `limit` strongest mistakes of each kind, batch by batch.

    The outcome is the same whatever the order of the batches. Memory: that many small copies of images, and one batch's
    scores. tag_shares: float [C], the share of training images with each tag, 0..1, for what counts as common.
    logit_thresholds: one logit or float [C]; a tag is predicted where its 16-bit logit is at or above it.
    """

    def __init__(self, limit: int, tag_shares: npt.ArrayLike, logit_thresholds: npt.ArrayLike) -> None:
        shares = np.asarray(tag_shares, dtype=np.float64)
        if limit < 1 or shares.ndim != 1 or not len(shares) or not ((shares >= 0) & (shares <= 1)).all():
            raise ValueError(f"limit={limit} and shares of {shares.shape} tags: expected at least 1 and 0..1 each")
        self.limit = limit
        self.num_tags = len(shares)
        # A tag of every image, or of none, is as common as one with half an image more, or less, in a million.
        within = np.clip(shares, 5e-7, 1 - 5e-7)
        self._log_odds = np.log(within) - np.log1p(-within)
        self._lowest = np.broadcast_to(lowest_keys(logit_thresholds), (self.num_tags,))
        self._kept: dict[Kind, list[Mistake]] = {"extra": [], "missed": []}

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Look at a batch on the host with its logits, float [B, C] on the CPU. Raises DivergedError for NaN."""
        if tuple(logits.shape) != (len(batch), self.num_tags):
            raise ValueError(f"logits are {list(logits.shape)}; expected [{len(batch)}, {self.num_tags}]")
        if bool(batch.mirrored.any()):
            raise ValueError("mistakes are told on images as they are; evaluate without mirroring")
        if not len(batch):
            return
        keys: Keys = to_keys(logits).numpy()
        places, tags = (
            found.numpy() for found in tag_coordinates(batch.tag_indices, batch.tag_offsets, len(batch), self.num_tags)
        )
        wrong = np.where(keys >= self._lowest, keys, _NO_KEY)
        wrong[places, tags] = _NO_KEY
        tag_of = wrong.argmax(axis=1)
        strongest = wrong[np.arange(len(batch)), tag_of]
        for place in np.flatnonzero(strongest > _NO_KEY).tolist():
            strength = float(from_keys(strongest[place]))
            self._offer("extra", strength, batch, place, int(tag_of[place]), keys[place])
        own = keys[places, tags]
        low = own < self._lowest[tags]
        places, tags, own = places[low], tags[low], own[low]
        strengths = self._log_odds[tags] - from_keys(own)
        order = np.lexsort((tags, -strengths, places))
        _, firsts = np.unique(places[order], return_index=True)
        for i in order[firsts].tolist():
            place = int(places[i])
            self._offer("missed", float(strengths[i]), batch, place, int(tags[i]), keys[place])

    def strongest(self, kind: Kind) -> list[Mistake]:
        """At most `limit`, the strongest first; ties in the order of rows."""
        return list(self._kept[kind])

    def merge(self, other: "ConfidentMistakes") -> None:
        """Add what another collector has seen of other images."""
        for kind, kept in self._kept.items():
            self._kept[kind] = sorted([*kept, *other._kept[kind]])[: self.limit]

    def _offer(self, kind: Kind, strength: float, batch: Batch, place: int, tag: int, keys: Keys) -> None:
        """keys: int16 [C] of the image."""
        kept, row = self._kept[kind], int(batch.row_ids[place])
        key = (-strength, row)
        if len(kept) == self.limit and key >= kept[-1].sort_key:
            return
        there = np.zeros(self.num_tags, np.bool_)
        there[batch.tag_indices[batch.tag_offsets[place] : batch.tag_offsets[place + 1]].numpy()] = True
        predicted = keys >= self._lowest
        shown = np.flatnonzero(there | predicted)
        shown = shown[np.argsort(-keys[shown].astype(np.int32), kind="stable")]
        listed = shown[:MAX_TAGS].tolist()
        if tag not in listed:
            listed[-1] = tag
        scores = zip(listed, from_keys(keys[listed]).tolist(), there[listed], predicted[listed], strict=True)
        image = thumbnail(batch.images[place], *batch.valid_sizes[place].tolist())
        insort(
            kept,
            Mistake(
                sort_key=key,
                row=row,
                kind=kind,
                tag=tag,
                logit=float(from_keys(keys[tag])),
                scores=tuple((i, logit, bool(is_there), bool(is_told)) for i, logit, is_there, is_told in scores),
                num_more=len(shown) - len(listed),
                image=image,
            ),
        )
        del kept[self.limit :]


def mistake_card(mistake: Mistake, tag_names: Sequence[str]) -> Card:
    """A mistake as a card of a contact sheet, the tag in question first."""
    tags = [
        SheetTag(tag_names[tag], probability_of(logit), "missed" if not told else "right" if there else "wrong")
        for tag, logit, there, told in sorted(mistake.scores, key=lambda score: score[0] != mistake.tag)
    ]
    return Card(mistake.image, f"{mistake.kind}: {tag_names[mistake.tag]}", tuple(tags), mistake.num_more)


def thumbnail(image: Tensor, height: int, width: int, side: int = THUMBNAIL_SIDE) -> npt.NDArray[np.uint8]:
    """The content of a prepared image, uint8 [3, H, W] -> uint8 [h, w, 3], made smaller where it is above `side`."""
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    content = image[:, top : top + height, left : left + width]
    longest = max(height, width)
    if longest > side:
        size = (max(1, round(height * side / longest)), max(1, round(width * side / longest)))
        small = torch.nn.functional.interpolate(content[None].float(), size=size, mode="area")[0]
        content = small.round().to(torch.uint8)
    return np.ascontiguousarray(content.permute(1, 2, 0).numpy()).copy()
