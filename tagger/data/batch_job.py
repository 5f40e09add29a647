"""One batch in the making: which rows, their pixels and their tags.

A batch is a function of (source, epoch, start, stop). A source is plain data that can be sent to another process, and a
job reports what it refused instead of judging it: threads and processes do the same work. Refuses, with an
AssertionError, to touch a row that is held out.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tagger.batch import Batch
from tagger.data.batch_plan import BatchPlan
from tagger.data.decode import DecodeError, DecodeOptions, RefusedImage, decode
from tagger.data.image_reader import ImageReader
from tagger.data.index import MetadataIndex
from tagger.data.quarantine import SYSTEM_CLOCK, Clock, Refusal, UndecodableFile, retry_transient
from tagger.data.quarantine_log import KnownBad
from tagger.data.ragged import gather, pack
from tagger.data.sampler import RowSampler
from tagger.data.scan import printable
from tagger.ontology import Expansion, Ontology, expand
from tagger.preprocess import Preprocess

Rows = NDArray[np.int64]
Flags = NDArray[np.bool_]

# A stand-in that is in the batch already is passed over, unless the set is too small to have another.
_DISTINCT_ATTEMPTS = 16
# More refusals in a row than any failure budget puts up with: whoever judges the batch then ends the run.
_MAX_ATTEMPTS = 64
_ROWS_AT_A_TIME = 1 << 18


class Coin(Protocol):
    """Which images are to be mirrored in an epoch: bool [N] for `image_ids`, uint64 [N]."""

    def toss(self, image_ids: NDArray[np.uint64], epoch: int) -> Flags: ...


@dataclass(frozen=True)
class TagTable:
    """The tags of an index's rows as indices of one vocabulary. Safe to read from any thread.

    index_of: int64 by the index's own tag number, -1 where the vocabulary lacks the tag. index_of_rating: int64 by the
    index's rating code, likewise. num_tags: length of the vocabulary. expansion: with an ontology, the indices that
    each of the index's own tags stands for, in place of `index_of`.
    """

    index: MetadataIndex
    index_of: NDArray[np.int64]
    index_of_rating: NDArray[np.int64]
    num_tags: int
    expansion: Expansion | None = None

    @classmethod
    def create(
        cls,
        index: MetadataIndex,
        number_of: Callable[[str], int | None],
        rating_tags: Sequence[str],
        num_tags: int,
        ontology: Ontology | None = None,
    ) -> "TagTable":
        """The table of a vocabulary that numbers tags by `number_of`; `rating_tags` in the order of rating codes."""
        numbers = np.array([_or_minus_1(number_of(tag)) for tag in index.tag_names], dtype=np.int64)
        ratings = np.array([-1, *(_or_minus_1(number_of(tag)) for tag in rating_tags)], dtype=np.int64)
        expansion = None if ontology is None else expand(ontology, index.tag_names, number_of)
        return cls(index, numbers, ratings, num_tags, expansion)

    def own_tags(self, rows: Rows) -> tuple[Rows, Rows]:
        """The index's own tag numbers of rows, in vocabulary or not: (numbers [T], place of each in `rows` [T])."""
        return self.index.gather_tags(rows)

    def known_tags(self, rows: Rows) -> tuple[Rows, Rows]:
        """The vocabulary's tags of rows, ratings aside: (indices [T], place of each in `rows` [T]); some may repeat."""
        numbers, places = self.own_tags(rows)
        if self.expansion is not None:
            tags, sources = gather(self.expansion.offsets, self.expansion.values, numbers)
            return tags, places[sources]
        tags = self.index_of[numbers]
        known = tags >= 0
        return tags[known], places[known]

    def tags(
        self, rows: Rows, mirrored: Flags, mirror_of: NDArray[np.int32] | None
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(tag_indices int32 [T], tag_offsets int32 [N + 1]) of rows, ascending and unique within a row.

        mirrored: bool [N]; where true, each tag is replaced through `mirror_of`, int32 [C].
        """
        tags, places = self.known_tags(rows)
        ratings = self.index_of_rating[self.index.ratings[rows]]
        rated = np.flatnonzero(ratings >= 0)
        tags, places = np.concatenate([tags, ratings[rated]]), np.concatenate([places, rated])
        if mirror_of is not None:
            tags = np.where(mirrored[places], mirror_of[tags], tags)
        return pack(tags, places, len(rows), self.num_tags)

    def count(self, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        """How many of some rows carry each tag of the vocabulary, int64 [C]."""
        found = np.zeros(self.num_tags, dtype=np.int64)
        for start in range(0, len(rows), _ROWS_AT_A_TIME):
            part = np.asarray(rows[start : start + _ROWS_AT_A_TIME], dtype=np.int64)
            tags, _ = self.tags(part, np.zeros(len(part), dtype=np.bool_), None)
            found += np.bincount(tags, minlength=self.num_tags)
        return found


def _or_minus_1(number: int | None) -> int:
    return -1 if number is None else number


@dataclass(frozen=True)
class Mirroring:
    """Which images are mirrored and what their tags become.

    mirror_of: int32 [C] over the vocabulary. forbids: bool over the index's own tags, so that a rare `text` that the
    vocabulary dropped still forbids.
    """

    coin: Coin
    mirror_of: NDArray[np.int32]
    forbids: Flags

    def decide(self, table: TagTable, rows: Rows, epoch: int) -> tuple[Flags, Flags]:
        """(mirrored bool [N], vetoed bool [N]): the coin says mirror, and the tags allow it or not."""
        wanted = self.coin.toss(table.index.image_ids[rows], epoch)
        numbers, places = table.own_tags(rows)
        forbidden = np.bincount(places[self.forbids[numbers]], minlength=len(rows)) > 0
        return wanted & ~forbidden, wanted & forbidden


@dataclass(frozen=True)
class LoadedImage:
    """content_size: (height, width) of the image inside the model's form. partial: pixels are missing, and that was
    allowed. mended: the file was in quarantine and has changed. missed_cache: there is a shrink cache, and it did not
    have the image as it is now.
    """

    content_size: tuple[int, int]
    partial: bool
    mended: bool
    missed_cache: bool


@dataclass(frozen=True)
class ImageSource:
    """From a row to its pixels in the model's form. `known_bad` are files that are refused without reading them."""

    reader: ImageReader
    preprocess: Preprocess
    decoding: DecodeOptions
    known_bad: KnownBad = field(default_factory=KnownBad)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3, height, width) of an image in the model's form; of aspect buckets, the square, which none exceeds."""
        side = self.preprocess.image_size
        return 3, side, side

    def load_into(self, row: int, memory: NDArray[np.uint8], *, mirror: bool) -> LoadedImage:
        """Fill `memory`, uint8 [3, H, W] of the batch's shape, with a row's image.

        Raises RefusedImage for the file's own faults; errors of the storage pass through.
        """
        name = printable(self.reader.index.image_path(row)) if self.known_bad.entries else ""
        suspect = self.known_bad.knows(name)
        found = self.reader.read(row, partial(self.known_bad.reason, name) if suspect else None)
        try:
            fit = partial(self.preprocess.content_size, shape=memory.shape[1:])
            decoded = decode(found.content, self.decoding, fit)
        except DecodeError as error:
            raise UndecodableFile(error, found.facts, found.content) from error
        size = self.preprocess.apply_into(decoded.pixels, memory, mirror=mirror, full_size=decoded.full_size)
        return LoadedImage(size, decoded.partial, suspect, found.missed_cache)


@dataclass(frozen=True)
class BatchSource:
    """What the batches of one loader have in common. `held_out`, bool over the index, is true for rows never served."""

    table: TagTable
    images: ImageSource
    plan: BatchPlan
    mirroring: Mirroring | None
    held_out: Flags
    clock: Clock = SYSTEM_CLOCK

    @property
    def sampler(self) -> RowSampler:
        return self.plan.sampler

    @property
    def refills(self) -> bool:
        """Training refills a refused image's slot; validation leaves it out, or its scores would be of other images."""
        return self.sampler.seed is not None

    @property
    def largest_batch_bytes(self) -> int:
        """Memory that the images of a full batch take."""
        return min(self.plan.batch_size, len(self.sampler)) * math.prod(self.images.shape)


class BatchMemory(Protocol):
    """Where batches get the memory of their images."""

    def take(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, NDArray[np.uint8]]:
        """A uint8 tensor of a shape, contents undefined, and the same memory as an array to fill it through."""


class Outcome(NamedTuple):
    """What became of one attempt to use a row of the index: `refused` is None where its image was used.

    Flags as in LoadedImage.
    """

    row: int
    refused: Refusal | None
    partial: bool = False
    mended: bool = False
    missed_cache: bool = False


@dataclass(frozen=True)
class PreparedBatch:
    """`batch` is None when every image of it was refused; `outcomes` are its attempts in a fixed order."""

    batch: Batch | None
    num_vetoed: int
    outcomes: tuple[Outcome, ...]


class BatchJob:
    """One batch: samples `start` to `stop` of an epoch. A `tagger.data.prefetch.Job`."""

    def __init__(
        self, source: BatchSource, memory: BatchMemory, stopping: threading.Event, epoch: int, start: int, stop: int
    ) -> None:
        self._source = source
        self._stopping = stopping
        self._epoch = epoch
        self._start = start
        self._rows = source.plan.rows_at(epoch, start, stop)
        self._mirrored, self._vetoed = self._decide(self._rows)
        self._images, self._memory = memory.take((len(self._rows), 3, *source.plan.shape_at(epoch, start)))
        self._sizes = np.zeros((len(self._rows), 2), dtype=np.int32)
        self._outcomes: list[Outcome | None] = [None] * len(self._rows)

    @property
    def num_items(self) -> int:
        return len(self._rows)

    def fill(self, item: int) -> None:
        """Pixels of one item into its place, or why not. Waits for storage that fails; StorageError after an outage."""
        self._outcomes[item] = self._prepare(item)

    def finish(self) -> PreparedBatch:
        """The batch, refused images replaced or left out."""
        outcomes = [outcome for outcome in self._outcomes if outcome is not None]
        usable = np.array([outcome.refused is None for outcome in outcomes])
        if self._source.refills:
            for item in np.flatnonzero(~usable):
                usable[item] = self._refill(int(item), outcomes)
        if not usable.any():
            return PreparedBatch(None, 0, tuple(outcomes))
        images = self._images if usable.all() else self._picked(usable)
        rows, mirrored = self._rows[usable], self._mirrored[usable]
        mirror_of = self._source.mirroring.mirror_of if self._source.mirroring is not None else None
        tags, offsets = self._source.table.tags(rows, mirrored, mirror_of)
        arrays = (tags, offsets, rows, self._sizes[usable], mirrored)
        batch = Batch(images, *map(torch.from_numpy, arrays))
        return PreparedBatch(batch, int(self._vetoed.sum()), tuple(outcomes))

    def _picked(self, usable: Flags) -> torch.Tensor:
        return torch.from_numpy(self._memory[usable])

    def _refill(self, item: int, outcomes: list[Outcome]) -> bool:
        """Put a stand-in in a refused image's slot; slot by slot, so that a batch holds no image twice."""
        tried = 0
        for attempt in range(_DISTINCT_ATTEMPTS + _MAX_ATTEMPTS):
            row = self._source.plan.reserve_row(self._epoch, self._start + item, attempt)
            if attempt < _DISTINCT_ATTEMPTS and row in self._rows:
                continue
            one = slice(item, item + 1)
            self._rows[item] = row
            self._mirrored[one], self._vetoed[one] = self._decide(self._rows[one])
            outcomes.append(self._prepare(item))
            if outcomes[-1].refused is None:
                return True
            tried += 1
            if tried == _MAX_ATTEMPTS:
                break
        return False

    def _decide(self, rows: Rows) -> tuple[Flags, Flags]:
        held_out = rows[self._source.held_out[rows]]
        if held_out.size:  # not an assert statement, which -O removes
            raise AssertionError(f"row {held_out[0]} is held out and was about to be served")
        if self._source.mirroring is None:
            return np.zeros(len(rows), dtype=np.bool_), np.zeros(len(rows), dtype=np.bool_)
        return self._source.mirroring.decide(self._source.table, rows, self._epoch)

    def _prepare(self, item: int) -> Outcome:
        row = int(self._rows[item])
        path = self._source.table.index.image_path
        try:
            try:
                loaded = self._load(item)
            except (OSError, MemoryError):
                clock = self._source.clock
                loaded = retry_transient(lambda: self._load(item), path(row), self._stopping, clock=clock)
        except RefusedImage as error:
            return Outcome(row, Refusal.of(path(row), error))
        self._sizes[item] = loaded.content_size
        return Outcome(row, None, loaded.partial, loaded.mended, loaded.missed_cache)

    def _load(self, item: int) -> LoadedImage:
        row, mirror = int(self._rows[item]), bool(self._mirrored[item])
        return self._source.images.load_into(row, self._memory[item], mirror=mirror)
