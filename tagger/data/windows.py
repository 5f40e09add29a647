"""Batches grouped into the windows of one update each (gradient accumulation), from any position to the last epoch.

They come from one loader for each phase of the run, which may change inside an epoch: positions count samples, so the
next loader goes on where the one before it stopped. Refuses a loader that gives fewer batches than its plan has.
"""

from bisect import bisect_left
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Protocol

from tagger.batch import Batch
from tagger.data.epoch_order import EpochOrder, EpochRest
from tagger.data.phases import PhasePlan
from tagger.errors import DataFailureError


class EpochLoader(Protocol):
    """A loader whose batches carry the position that resumes after them."""

    @property
    def order(self) -> EpochOrder:
        """Where its batches lie."""

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch` from its first batch at the next iteration."""

    def seek(self, position: Mapping[str, int]) -> None:
        """Start after `position` at the next iteration."""

    def __iter__(self) -> Generator[tuple[Batch, dict[str, int]], None, None]:
        """The batches that remain of the epoch."""

    def close(self) -> None:
        """End what runs in the background; iterating again starts it again."""


@dataclass(frozen=True)
class Window:
    """The batches of one update, the position that resumes after them, and whether they end their epoch.

    `phase` numbers the phases of the run from 0.
    """

    batches: tuple[Batch, ...]
    position: dict[str, int]
    epoch: int
    ends_epoch: bool
    phase: int = 0

    @property
    def num_images(self) -> int:
        """Images of all batches."""
        return sum(len(batch) for batch in self.batches)


@dataclass(frozen=True)
class Leg:
    """Batches in a row, of one rank, in one epoch and one phase, from `position` (None: the epoch's start)."""

    phase: int
    epoch: int
    position: Mapping[str, int] | None
    num_batches: int
    ends_epoch: bool


@dataclass(frozen=True)
class Feed:
    """The loaders of a run's phases, and how they take turns; an update takes `size` batches of one phase.

    A phase ends with an update, the first that reaches the place where the next one starts; with aspect buckets the
    first that ends a window of its order there. The last window of an epoch may be shorter.
    """

    loaders: Sequence[EpochLoader]
    plan: PhasePlan
    size: int

    def legs(self, position: Mapping[str, int] | None, epoch: int) -> Iterator[Leg]:
        """From `position` in `epoch` (None: its start) to the end of the last epoch; looked up, no loader moves."""
        while epoch < self.plan.num_epochs:
            phase = self.plan.phase_at(epoch, position)
            rest = self.loaders[phase].order.rest(epoch, position)
            if not len(rest):
                epoch, position = epoch + 1, None
                continue
            ends_phase = partial(self._ends_phase, phase, rest)
            windows = 1 + bisect_left(range(1, self._windows(len(rest))), True, key=ends_phase)
            num_batches = min(windows * self.size, len(rest))
            after = rest.position_after(num_batches)
            beyond = self.loaders[self.plan.phase_at(epoch, after)].order.rest(epoch, after)
            yield Leg(phase, epoch, position, num_batches, not len(beyond))
            position = after

    def left(self, position: Mapping[str, int] | None, epoch: int) -> tuple[int, ...]:
        """The updates of each phase that `accumulation_windows` of the same arguments gives."""
        updates = [0] * len(self.loaders)
        for leg in self.legs(position, epoch):
            updates[leg.phase] += self._windows(leg.num_batches)
        return tuple(updates)

    def loader_at(self, position: Mapping[str, int] | None, epoch: int) -> EpochLoader:
        """Whose turn it is after a position."""
        return self.loaders[self.plan.phase_at(epoch, position)]

    def close(self) -> None:
        """End what runs in the background of any loader."""
        for loader in self.loaders:
            loader.close()

    def _ends_phase(self, phase: int, rest: EpochRest, windows: int) -> bool:
        """Whether the phase is over after so many windows of what is left of an epoch."""
        return self.plan.phase_at(rest.epoch, rest.position_after(windows * self.size)) > phase

    def _windows(self, num_batches: int) -> int:
        return -(-num_batches // self.size)


def accumulation_windows(feed: Feed, position: Mapping[str, int] | None, first_epoch: int) -> Iterator[Window]:
    """The windows of a run up to its last epoch.

    `position` lies in `first_epoch`; None starts that epoch from its first batch. What a loader runs in the background
    ends with its phase. Raises DataFailureError where a batch is missing, before any of its window is used.
    """
    before: EpochLoader | None = None
    for leg in feed.legs(position, first_epoch):
        loader = feed.loaders[leg.phase]
        if before is not None and before is not loader:
            before.close()
        before = loader
        if leg.position is None:
            loader.set_epoch(leg.epoch)
        else:
            loader.seek(leg.position)
        remaining = leg.num_batches
        # Closed here, since a phase may end with batches of its epoch still on their way.
        with closing(iter(loader)) as batches:
            while remaining > 0:
                wanted = min(feed.size, remaining)
                taken = list(islice(batches, wanted))
                if len(taken) < wanted:  # other ranks would wait for what this one no longer has
                    raise DataFailureError(
                        f"epoch {leg.epoch + 1} is {wanted - len(taken)} batches short: every image of a batch was "
                        "refused, and its stand-ins too; mend or remove the images that the log names"
                    )
                remaining -= len(taken)
                ends_epoch = leg.ends_epoch and remaining == 0
                yield Window(tuple(batch for batch, _ in taken), taken[-1][1], leg.epoch, ends_epoch, leg.phase)
