"""Which samples of an epoch make which batch, and the shape of its images: for one process or for one of several ranks.

A batch is a function of (plan, epoch, start, stop); a position is a number of samples that all ranks together have
consumed. In training every rank has the same number of batches and, at each step, the same shape. Refuses fewer rows
than ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tagger.data.buckets import Shape, aspects_of, nearest_shape
from tagger.data.sampler import Permutation, RowSampler
from tagger.errors import InputError
from tagger.preprocess import Preprocess
from tagger.rng import mix, stable_id

Rows = NDArray[np.int64]

# With windows of this many batches 9 % of the rows of an even mix of aspects leave their bucket at 448 pixels, all of
# them for the next one; with 16 batches it is 27 %.
WINDOW_BATCHES = 64
_OFFSET_STREAM = stable_id("batch plan/offset")
_TURN_STREAM = stable_id("batch plan/turn")
_RESERVE_CANDIDATES = 64
_CHUNK = 1 << 20


class Span(NamedTuple):
    """One batch of one rank: samples `start` to `stop`; `done` are those that all ranks have consumed with it."""

    start: int
    stop: int
    done: int


@dataclass(frozen=True)
class Spans:
    """The batches of one rank from some sample of an epoch on, cut as they are asked for.

    pieces: the first samples of this rank's batches, and the sample at which the last batch of the piece ends.
    """

    pieces: tuple[tuple[range, int], ...]
    batch_size: int
    ahead: int  # samples of each step that belong to ranks before this one
    step: int  # samples of one step of all ranks

    def __len__(self) -> int:
        return sum(len(starts) for starts, _ in self.pieces)

    def __iter__(self) -> Iterator[Span]:
        for starts, end in self.pieces:
            for start in starts:
                yield Span(start, min(start + self.batch_size, end), min(start - self.ahead + self.step, end))

    def done_after(self, num_batches: int) -> int:
        """The samples that all ranks have consumed with the first `num_batches`, 1 .. len(self)."""
        for starts, end in self.pieces:
            if num_batches <= len(starts):
                return min(starts[num_batches - 1] - self.ahead + self.step, end)
            num_batches -= len(starts)
        raise IndexError(f"{num_batches} batches more than there are")


class Grouping(NamedTuple):
    """What the order inside a window depends on, and the samples before which nothing is left to serve."""

    hash: int
    whole: int


class BatchPlan(Protocol):
    """How the samples of an epoch become batches."""

    @property
    def sampler(self) -> RowSampler: ...

    @property
    def batch_size(self) -> int:
        """Images of the largest batch of one rank."""

    def spans(self, start: int) -> Spans:
        """This rank's batches from a sample on."""

    def rows_at(self, epoch: int, start: int, stop: int) -> Rows:
        """int64 [stop - start]: the rows of a batch."""

    def shape_at(self, epoch: int, start: int) -> Shape:
        """(height, width) of the images of the batch that holds a sample."""

    def reserve_row(self, epoch: int, position: int, attempt: int) -> int:
        """The row that stands in for a refused one at a position."""

    def grouping(self, samples: int) -> Grouping | None:
        """What a position after `samples` must say beside them; None where the sampler's order is served as it is."""

    def resume_at(self, samples: int, grouping: Grouping | None) -> int:
        """Where to go on from a position: at `samples`, or before them where the order inside windows is another."""

    def start_near(self, samples: int) -> int:
        """The place in an epoch nearest to `samples` that can be gone on from after any other plan's batches."""


@dataclass(frozen=True)
class PlainPlan:
    """Batches cut from the sampler's order.

    Training (`sampler.seed` given): batches of equal size, the incomplete last one left out; fewer rows than one step
    of all ranks are one step. Validation: every row once, the last batch of a group smaller; a rank may then have one
    batch less than another. groups: (end, shape) of each run of samples with one shape; batches do not cross an end.
    """

    sampler: RowSampler
    batch_size: int
    groups: tuple[tuple[int, Shape], ...]
    rank: int = 0
    world_size: int = 1

    @property
    def step(self) -> int:
        """Samples of one step of all ranks."""
        return self.batch_size * self.world_size

    def spans(self, start: int) -> Spans:
        ahead, pieces, begin = self.rank * self.batch_size, [], 0
        for end, _ in self.groups:
            first, last = max(start, begin), end
            if self.sampler.seed is not None:
                last = first + (end - first) // self.step * self.step
            if first < last:
                pieces.append((range(first + ahead, last, self.step), last))
            begin = end
        return Spans(tuple(pieces), self.batch_size, ahead, self.step)

    def rows_at(self, epoch: int, start: int, stop: int) -> Rows:
        return self.sampler.rows_at(epoch, start, stop)

    def shape_at(self, epoch: int, start: int) -> Shape:
        del epoch
        return next(shape for end, shape in self.groups if start < end)

    def reserve_row(self, epoch: int, position: int, attempt: int) -> int:
        return self.sampler.reserve_row(epoch, position, attempt)

    def grouping(self, samples: int) -> Grouping | None:
        del samples
        return None

    def resume_at(self, samples: int, grouping: Grouping | None) -> int:
        return samples if grouping is None else grouping.whole

    def start_near(self, samples: int) -> int:
        return samples


class _Window(NamedTuple):
    """The batches of a window in the order in which they are served."""

    begin: int
    rows: Rows
    buckets: NDArray[np.int64]  # of each batch


class BucketPlan:
    """Training batches of one shape each, for aspect buckets.

    The sampler's order is cut into windows of 64 batches (of all ranks together), up to 127 where an epoch holds more
    than one, fewer where it is shorter. Inside a window rows are grouped by bucket. A bucket's rows seldom fill whole
    batches: what is left over, the rows whose aspect is nearest to the next bucket's, goes to that bucket. Where the
    cuts fall is drawn for each window so that on average every bucket has as many batches as its rows ask for, rare
    ones too. So no row is lost or repeated, and an epoch leaves out less than one step of all ranks, as without
    buckets. The groups' batches are then shuffled.

    Resuming at any batch is exact while the rows, their sizes, the shapes and the step of all ranks (batch size x world
    size) are those of the position. Where one of them has changed, the window of the position and the new one have
    different orders: it goes on from the last boundary of the new windows before which every image was served. No image
    is lost; those between that boundary and the position come a second time in that epoch.

    widths, heights: integer, over the whole index; 0 counts as square. Time and memory are those of one window.
    """

    def __init__(
        self,
        sampler: RowSampler,
        batch_size: int,
        shapes: tuple[Shape, ...],
        widths: NDArray[np.integer],
        heights: NDArray[np.integer],
        *,
        rank: int = 0,
        world_size: int = 1,
        window_batches: int = WINDOW_BATCHES,
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self._shapes = shapes
        self._widths = widths
        self._heights = heights
        self._ahead = rank * batch_size
        self._step = batch_size * world_size
        self._num_steps = len(sampler) // self._step
        self._end = self._num_steps * self._step
        self._num_windows = max(1, self._num_steps // window_batches)
        self._hash = self._hash_order(window_batches)
        self._kept: tuple[tuple[int, int], _Window] | None = None

    def spans(self, start: int) -> Spans:
        starts = range(start + self._ahead, self._end, self._step)
        return Spans(((starts, self._end),), self.batch_size, self._ahead, self._step)

    def rows_at(self, epoch: int, start: int, stop: int) -> Rows:
        window = self._window(epoch, start)
        return window.rows[start - window.begin : stop - window.begin].copy()

    def shape_at(self, epoch: int, start: int) -> Shape:
        return self._shapes[self._bucket_at(epoch, start)]

    def reserve_row(self, epoch: int, position: int, attempt: int) -> int:
        """Of the next rows of the reserve stream, the first of the batch's bucket, or else of the nearest."""
        attempts = attempt * _RESERVE_CANDIDATES + np.arange(_RESERVE_CANDIDATES)
        rows = self.sampler.reserve_rows(epoch, position, attempts)
        distances = np.abs(nearest_shape(self._shapes, self._aspects(rows)) - self._bucket_at(epoch, position))
        return int(rows[distances.argmin()])

    def grouping(self, samples: int) -> Grouping | None:
        # What an ended epoch leaves out is not to be served in it any more, at whatever batch size it goes on.
        return Grouping(self._hash, len(self.sampler) if samples >= self._end else self._boundary(samples))

    def resume_at(self, samples: int, grouping: Grouping | None) -> int:
        if grouping is not None and grouping.hash == self._hash and samples % self._step == 0:
            return samples
        return self._boundary(samples if grouping is None else grouping.whole)

    def start_near(self, samples: int) -> int:
        before = self._boundary(samples)
        next_step = self._first_step(self._number(before // self._step) + 1) if before < self._end else self._num_steps
        after = next_step * self._step if next_step < self._num_steps else len(self.sampler)
        return before if samples - before <= after - samples else after

    def _first_step(self, window: int) -> int:
        return window * self._num_steps // self._num_windows

    def _boundary(self, samples: int) -> int:
        """The last boundary of windows at or before a number of samples; the end, where no step is left after them."""
        if len(self.sampler) - samples < self._step:
            return self._end
        return self._first_step(self._number(samples // self._step)) * self._step

    def _number(self, step: int) -> int:
        return ((step + 1) * self._num_windows - 1) // self._num_steps

    def _window(self, epoch: int, sample: int) -> _Window:
        number = self._number(sample // self._step)
        kept = self._kept
        if kept is None or kept[0] != (epoch, number):
            kept = (epoch, number), self._arrange(epoch, number)
            self._kept = kept  # one assignment, so that any thread may read it
        return kept[1]

    def _bucket_at(self, epoch: int, sample: int) -> int:
        window = self._window(epoch, sample)
        return int(window.buckets[(sample - window.begin) // self._step])

    def _aspects(self, rows: Rows) -> NDArray[np.float64]:
        return aspects_of(self._widths[rows], self._heights[rows])

    def _arrange(self, epoch: int, number: int) -> _Window:
        begin, end = (self._first_step(window) * self._step for window in (number, number + 1))
        rows = self.sampler.rows_at(epoch, begin, end)
        aspects = self._aspects(rows)
        counts = np.bincount(nearest_shape(self._shapes, aspects), minlength=len(self._shapes))
        key = mix(self.sampler.seed or 0, epoch, number)
        # One offset for all cuts: a bucket of n rows has n / step batches on average, whatever the others hold.
        ends = (np.cumsum(counts) + mix(_OFFSET_STREAM, key) % self._step) // self._step * self._step
        buckets = np.empty(len(rows), dtype=np.int64)
        sizes = np.diff(ends, prepend=0)
        buckets[np.argsort(aspects, kind="stable")] = np.repeat(np.arange(len(self._shapes)), sizes)
        # Stable: inside a bucket the rows keep the sampler's order, so that batches mix all its aspects.
        batches = np.argsort(buckets, kind="stable").reshape(-1, self._step)
        batches = batches[Permutation(len(batches), mix(_TURN_STREAM, key))(np.arange(len(batches)))]
        return _Window(begin, rows[batches.ravel()], buckets[batches[:, 0]])

    def _hash_order(self, window_batches: int) -> int:
        total = mix(self._step, window_batches, *(side for shape in self._shapes for side in shape))
        rows = self.sampler.rows
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            sizes = mix(self._widths[part], self._heights[part], np.arange(start, start + len(part)))
            total ^= int(np.bitwise_xor.reduce(sizes))
        return total >> 11


def create_plan(
    sampler: RowSampler,
    preprocess: Preprocess,
    batch_size: int,
    sizes: NDArray[np.integer] | None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> BatchPlan:
    """The plan of a loader: of training where the sampler has a seed, else of validation.

    sizes: integer [rows of the index, 2], (width, height) of the images, 0 where unknown; read for buckets only, which
    need them. Raises InputError for fewer rows to train on than ranks.
    """
    if not 0 <= rank < world_size or batch_size < 1:
        raise ValueError(f"rank {rank} of {world_size}, batches of {batch_size}: a rank is 0..{world_size - 1}")
    if sampler.seed is not None:
        batch_size = min(batch_size, len(sampler) // world_size)
        if batch_size == 0:
            raise InputError(f"{len(sampler)} images for training on {world_size} ranks; start fewer or add images")
    shapes = preprocess.shapes
    if not shapes:
        square = preprocess.image_size, preprocess.image_size
        return PlainPlan(sampler, batch_size, ((len(sampler), square),), rank, world_size)
    assert sizes is not None, "aspect buckets without the images' sizes"
    widths, heights = sizes[:, 0], sizes[:, 1]
    if sampler.seed is not None:
        return BucketPlan(sampler, batch_size, shapes, widths, heights, rank=rank, world_size=world_size)
    buckets = nearest_shape(shapes, aspects_of(widths[sampler.rows], heights[sampler.rows])).astype(np.uint8)
    grouped = replace(sampler, rows=sampler.rows[np.argsort(buckets, kind="stable")])
    ends = np.cumsum(np.bincount(buckets, minlength=len(shapes)))
    groups = tuple((int(end), shape) for end, shape in zip(ends, shapes, strict=True))
    return PlainPlan(grouped, batch_size, groups, rank, world_size)
