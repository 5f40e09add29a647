"""Accumulation windows cover every batch once, from any position."""

from collections.abc import Iterator, Mapping

import pytest
import torch

from tagger.batch import Batch
from tagger.data.windows import accumulation_windows, windows_left


class CountingLoader:
    """Epochs of `sizes` images a batch; a batch's row ids are (epoch, batch)."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def batches_remaining(self) -> int:
        return len(self.sizes) - self.start

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.start = epoch, 0

    def seek(self, position: Mapping[str, int]) -> None:
        self.epoch, self.start = position["epoch"], position["batch"]

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, int]]]:
        start, self.start = self.start, 0
        for number in range(start, len(self.sizes)):
            size = self.sizes[number]
            empty = torch.zeros(0, dtype=torch.int32)
            images = torch.zeros(size, 3, 1, 1, dtype=torch.uint8)
            ids = torch.tensor([self.epoch, number])
            yield Batch(images, empty, empty, ids, empty, empty), {"epoch": self.epoch, "batch": number + 1}


def seen(
    loader: CountingLoader, position: dict[str, int] | None, epoch: int, epochs: int, size: int
) -> list[list[int]]:
    windows = list(accumulation_windows(loader, position, epoch, epochs, size))
    assert windows_left(loader, position, epoch, epochs, size) == len(windows)
    return [batch.row_ids.tolist() for window in windows for batch in window.batches]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_batch_of_every_epoch_comes_once_and_in_order(size: int) -> None:
    expected = [[epoch, batch] for epoch in range(3) for batch in range(4)]
    assert seen(CountingLoader([2] * 4), None, 0, 3, size) == expected


def test_a_window_never_crosses_an_epoch_and_the_last_one_says_so() -> None:
    windows = list(accumulation_windows(CountingLoader([2, 2, 1]), None, 0, 2, 2))
    assert [(len(w.batches), w.num_images, w.epoch, w.ends_epoch) for w in windows] == [
        (2, 4, 0, False),
        (1, 1, 0, True),
        (2, 4, 1, False),
        (1, 1, 1, True),
    ]


def test_resuming_goes_on_after_the_position() -> None:
    loader = CountingLoader([1] * 4)
    assert seen(loader, {"epoch": 1, "batch": 3}, 1, 3, 2) == [[1, 3], [2, 0], [2, 1], [2, 2], [2, 3]]


def test_resuming_at_the_end_of_an_epoch_starts_the_next_one() -> None:
    assert seen(CountingLoader([1] * 2), {"epoch": 0, "batch": 2}, 0, 2, 1) == [[1, 0], [1, 1]]


def test_a_finished_run_has_no_window_left() -> None:
    assert seen(CountingLoader([1] * 2), {"epoch": 1, "batch": 2}, 1, 2, 1) == []
    assert windows_left(CountingLoader([1]), {"epoch": 3, "batch": 1}, 3, 2, 1) == 0
