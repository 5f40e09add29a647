"""Drawing rows by their tags, with replacement: rare tags come more often than they occur.

A draw is a function of (seed, epoch, position), so these orders have no state and resume anywhere, as the plain one
does. An epoch has as many draws as there are rows; reserve stream and mirroring are those of every order. Refuses rows
without any tag of the vocabulary to choose by tag.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tagger.data.ragged import distinct
from tagger.data.sampler import RowSampler
from tagger.errors import InputError
from tagger.rng import mix, stable_id, uniform

_WEIGHTED_STREAM = stable_id("sampler/weighted")
_TAG_STREAM = stable_id("sampler/class aware/tag")
_MEMBER_STREAM = stable_id("sampler/class aware/row")
_CHUNK = 1 << 16

Rows = NDArray[np.int64]


class TaggedRows(Protocol):
    """The tags of an index's rows."""

    @property
    def num_tags(self) -> int:
        """Length of the vocabulary."""

    def known_tags(self, rows: Rows) -> tuple[Rows, Rows]:
        """The vocabulary's tags of rows: (indices [T], place of each in `rows` [T]); some may repeat."""


@dataclass(frozen=True)
class WeightedSampler(RowSampler):
    """Each draw takes row i with probability weight i / sum of weights.

    cumulative: float64 [N], the running sum of the rows' weights (8 bytes a row).
    """

    cumulative: NDArray[np.float64]

    @property
    def scheme(self) -> int:
        total = int(self.cumulative[-1:].view(np.int64)[0])
        return (mix(_WEIGHTED_STREAM, len(self), total) >> 11) or 1

    def rows_at(self, epoch: int, start: int, stop: int) -> Rows:
        positions = np.arange(start, stop, dtype=np.int64)
        drawn = uniform(mix(_WEIGHTED_STREAM, self.seed or 0, epoch, positions)) * self.cumulative[-1]
        places = np.searchsorted(self.cumulative, drawn, side="right")
        return self._take(np.minimum(places, len(self) - 1))  # the product may round up to the total


@dataclass(frozen=True)
class ClassAwareSampler(RowSampler):
    """Each draw takes a tag, all equally often, and then one of the rows that carry it, all equally often.

    offsets, members: the rows of each tag that has any, by place in `rows`: tag i has `members[offsets[i]:offsets[i +
    1]]`. int64 [tags + 1] and int32 (4 bytes for each tag of each row).
    """

    offsets: NDArray[np.int64]
    members: NDArray[np.int32]

    @property
    def scheme(self) -> int:
        return (mix(_TAG_STREAM, len(self), len(self.offsets), len(self.members)) >> 11) or 1

    def rows_at(self, epoch: int, start: int, stop: int) -> Rows:
        positions = np.arange(start, stop, dtype=np.int64)
        seed = self.seed or 0
        tags = mix(_TAG_STREAM, seed, epoch, positions) % np.uint64(len(self.offsets) - 1)
        first, end = self.offsets[tags], self.offsets[tags + np.uint64(1)]
        chosen = mix(_MEMBER_STREAM, seed, epoch, positions) % (end - first).astype(np.uint64)
        return self._take(self.members[first + chosen.astype(np.int64)])


def create_sampler(
    kind: str, table: TaggedRows, rows: NDArray[np.integer], seed: int, *, power: float, cap: float
) -> RowSampler:
    """The order of training rows: "uniform" (each once), "weighted" by their rarest tag, or "class_aware"."""
    if kind == "weighted":
        return weighted_sampler(table, rows, seed, power=power, cap=cap)
    if kind == "class_aware":
        return class_aware_sampler(table, rows, seed)
    return RowSampler(rows, seed)


def weighted_sampler(
    table: TaggedRows, rows: NDArray[np.integer], seed: int, *, power: float, cap: float
) -> WeightedSampler:
    """Weights by each row's rarest tag: (rows with that tag) ** -power, at most `cap` times the smallest weight.

    Only tags of the vocabulary count, ratings aside; a row without one has the smallest weight.
    """
    counts = _tag_counts(table, rows)
    rarest = np.full(len(rows), len(rows), dtype=np.int64)
    for tags, places in _tags_of(table, rows):
        np.minimum.at(rarest, places, counts[tags])
    weights = rarest.astype(np.float64) ** -power
    return WeightedSampler(rows, seed, np.cumsum(np.minimum(weights, weights.min() * cap)))


def class_aware_sampler(table: TaggedRows, rows: NDArray[np.integer], seed: int) -> ClassAwareSampler:
    """Draws by tag, over the tags of the vocabulary that some row carries, ratings aside.

    Raises InputError when there is none.
    """
    counts = _tag_counts(table, rows)
    if not counts.any():
        raise InputError(
            f"data.sampling=class_aware: none of the {len(rows)} training images has a tag of the vocabulary; "
            "use data.sampling=uniform, or lower vocabulary.min_frequency"
        )
    ends = np.cumsum(counts)
    free = ends - counts
    members = np.empty(int(ends[-1]), dtype=np.int32)
    for tags, places in _tags_of(table, rows):
        by_tag = np.argsort(tags, kind="stable")
        sorted_tags = tags[by_tag]
        found = np.bincount(sorted_tags, minlength=len(counts))
        rank = np.arange(len(tags)) - (np.cumsum(found) - found)[sorted_tags]
        members[free[sorted_tags] + rank] = places[by_tag]
        free += found
    offsets = np.concatenate([[0], ends[counts > 0]])
    return ClassAwareSampler(rows, seed, offsets, members)


def _tag_counts(table: TaggedRows, rows: NDArray[np.integer]) -> Rows:
    """int64 [C]: how many of the rows carry each tag of the vocabulary."""
    counts = np.zeros(table.num_tags, dtype=np.int64)
    for tags, _ in _tags_of(table, rows):
        counts += np.bincount(tags, minlength=len(counts))
    return counts


def _tags_of(table: TaggedRows, rows: NDArray[np.integer]) -> Iterator[tuple[Rows, Rows]]:
    """The vocabulary's tags of the rows, some rows at a time: (tags [T], the place in `rows` of each [T])."""
    for start in range(0, len(rows), _CHUNK):
        tags, places = table.known_tags(rows[start : start + _CHUNK].astype(np.int64))
        # Two of an index's tags may be one of the vocabulary's, and an image counts once.
        pairs = distinct(places * table.num_tags + tags)
        places, tags = np.divmod(pairs, table.num_tags)
        yield tags, places + start
