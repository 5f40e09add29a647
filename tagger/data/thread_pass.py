"""One pass over an epoch in threads of this process.

A thread that hangs in a read or a decoder cannot be ended. So it is said which files the threads are at and where, and
a loader from which nothing comes for as long as a storage outage may last ends the run with a StorageError.
"""

import logging
import math
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import numpy as np

from tagger.data.batch_job import BatchJob, BatchSource, ImageSource, PreparedBatch
from tagger.data.patience import HANG_S, Stillness
from tagger.data.prefetch import BufferPool, OrderedPrefetcher
from tagger.data.quarantine import OUTAGE_S
from tagger.data.quarantine_log import KnownBad
from tagger.data.scan import printable
from tagger.data.watch import BOARD_CELLS, WatchedImages, rows_in_hand
from tagger.errors import StorageError

logger = logging.getLogger(__name__)

# A storage that fails is retried for OUTAGE_S, and a retry counts as a move: its own message comes first.
END_S = OUTAGE_S
_NAMED_FILES = 8
_STACK_FRAMES = 6


def prepare_in_threads(
    source: BatchSource,
    epoch: int,
    spans: Iterator[tuple[int, int]],
    known_bad: KnownBad,
    *,
    num_threads: int,
    max_in_flight: int,
) -> OrderedPrefetcher[PreparedBatch]:
    """The batches of an epoch given by their samples (start, stop), in order; `known_bad` files are not read.

    Memory: `max_in_flight` batches, and two in the hands of the consumer. Waiting for a batch raises StorageError when
    no image is begun for END_S.
    """
    watch = _Watch(source, known_bad)
    largest = min(source.plan.batch_size, len(source.sampler))
    pool = BufferPool(largest * math.prod(source.images.shape), max_in_flight + 2)
    stopping = threading.Event()
    return OrderedPrefetcher(
        (BatchJob(watch.source, pool, stopping, epoch, start, stop) for start, stop in spans),
        num_threads=num_threads,
        max_in_flight=max_in_flight,
        stopping=stopping,
        on_wait=watch.look,
    )


class _Watch:
    def __init__(self, source: BatchSource, known_bad: KnownBad) -> None:
        self._cells = np.zeros(BOARD_CELLS, dtype=np.int64)
        self._images = WatchedImages(replace(source.images, known_bad=known_bad), self._cells)
        self.source = replace(source, images=cast(ImageSource, self._images))
        self._stillness = Stillness()
        self._said = False

    def look(self) -> None:
        """Called every second or so while a batch is waited for."""
        still_s = self._stillness.seconds(self._cells.tobytes())
        if still_s > END_S:
            message = f"no image was loaded for {END_S:.0f} s{self._in_hand()}"
            raise StorageError(f"{message}; check these files and their disk")
        if still_s <= HANG_S:
            self._said = False
        elif not self._said:
            self._said = True
            message = (
                "no image was loaded for %.0f s%s; a thread of the trainer cannot be started again, and the run ends "
                "after %.0f s of it: check these files and their disk, or set data.num_processes=1, whose loader "
                "process is replaced when it hangs%s"
            )
            logger.error(message, HANG_S, self._in_hand(), END_S, self._stacks())

    def _in_hand(self) -> str:
        path_of = self.source.table.index.image_path
        names = [printable(path_of(row)) for row in rows_in_hand(self._cells)[:_NAMED_FILES]]
        return f", loading {', '.join(names)}" if names else ""

    def _stacks(self) -> str:
        frames = sys._current_frames()
        stacks = [traceback.format_stack(frames[i])[-_STACK_FRAMES:] for i in self._images.busy_threads if i in frames]
        return "".join(f"\nin a loader thread:\n{''.join(stack).rstrip()}" for stack in stacks[:_NAMED_FILES])
