"""Images that leave on a board which of them is being loaded: whoever dies or hangs cannot say it any more."""

import itertools
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagger.data.batch_job import ImageSource

# int64 cells of a board: items begun, then the row (+ 1) in each thread's hands, 0 for none.
BOARD_CELLS = 128


class WatchedImages:
    """Stands in for an ImageSource in all that a batch asks of one. Safe from any thread."""

    def __init__(self, images: ImageSource, cells: NDArray[np.int64]) -> None:
        """`cells`: the board, int64 [BOARD_CELLS]."""
        self._images = images
        self._cells = cells.data
        self._places: dict[int, int] = {}
        self._threads = itertools.count()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._images, name)

    @property
    def busy_threads(self) -> list[int]:
        """Idents of the threads that load an image now."""
        return [thread for thread, place in list(self._places.items()) if self._cells[place]]

    def load_into(self, row: int, *arguments: Any, **options: Any) -> Any:
        """As the source's own."""
        thread = threading.get_ident()
        place = self._places.get(thread)
        if place is None:
            place = self._places[thread] = 1 + next(self._threads) % (BOARD_CELLS - 1)
        self._cells[0] += 1  # a race between threads may lose one; that it moves is what counts
        self._cells[place] = row + 1
        try:
            return self._images.load_into(row, *arguments, **options)
        finally:
            self._cells[place] = 0


def rows_in_hand(cells: NDArray[np.int64]) -> list[int]:
    """The rows that a board says are being loaded."""
    return [int(cell) - 1 for cell in cells[1:] if cell]
