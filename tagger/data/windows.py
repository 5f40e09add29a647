"""Batches grouped into the windows of one update each (gradient accumulation), from any position to the last epoch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from tagger.batch import Batch


class EpochLoader(Protocol):
    """A loader whose batches carry the position that resumes after them."""

    def __len__(self) -> int:
        """Batches of a whole epoch."""

    @property
    def batches_remaining(self) -> int:
        """Batches that the next iteration yields."""

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch` from its first batch at the next iteration."""

    def seek(self, position: Mapping[str, int]) -> None:
        """Start after `position` at the next iteration."""

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, int]]]:
        """The batches that remain of the epoch."""


@dataclass(frozen=True)
class Window:
    """The batches of one update, the position that resumes after them, and whether they end their epoch."""

    batches: tuple[Batch, ...]
    position: dict[str, int]
    epoch: int
    ends_epoch: bool

    @property
    def num_images(self) -> int:
        """Images of all batches."""
        return sum(len(batch) for batch in self.batches)


def accumulation_windows(
    loader: EpochLoader, position: Mapping[str, int] | None, first_epoch: int, num_epochs: int, size: int
) -> Iterator[Window]:
    """Windows of `size` batches up to the end of epoch `num_epochs - 1`; the last one of an epoch may be shorter.

    `position` lies in `first_epoch`; None starts that epoch from its first batch.
    """
    for epoch in range(first_epoch, num_epochs):
        if epoch == first_epoch and position is not None:
            loader.seek(position)
        else:
            loader.set_epoch(epoch)
        remaining = loader.batches_remaining
        batches = iter(loader)
        while remaining > 0:
            taken = list(islice(batches, size))
            assert taken, f"the loader ended {remaining} batches early"
            remaining -= len(taken)
            yield Window(tuple(batch for batch, _ in taken), taken[-1][1], epoch, remaining == 0)


def windows_left(
    loader: EpochLoader, position: Mapping[str, int] | None, first_epoch: int, num_epochs: int, size: int
) -> int:
    """How many windows `accumulation_windows` yields for the same arguments; leaves the loader at `position`."""
    if first_epoch >= num_epochs:
        return 0
    if position is None:
        loader.set_epoch(first_epoch)
    else:
        loader.seek(position)
    return -(-loader.batches_remaining // size) + (num_epochs - first_epoch - 1) * -(-len(loader) // size)
