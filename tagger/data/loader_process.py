"""A loader process: prepares the batches it is granted in shared memory and reports each over its pipe.

Started by `tagger.data.ring` and by nobody else. It imports what decoding needs, no model and no CUDA. It leaves Ctrl-C
and termination to the process that started it, and ends when that one does: its commands come by a pipe, and the
pipe's end is its own.
"""

import contextlib
import faulthandler
import json
import logging
import math
import os
import queue
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from tagger.data.batch_job import BatchJob, BatchSource, ImageSource, PreparedBatch
from tagger.data.messages import Begin, Done, End, Ended, Failed, Grant, LogLine, Ready, Sender, received, shared
from tagger.data.prefetch import Job, OrderedPrefetcher
from tagger.data.shared_block import PAGE_BYTES, SharedBlock
from tagger.data.watch import BOARD_CELLS, WatchedImages
from tagger.stop import SIGNALS

_ERROR_EXIT = 3
_NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Setup:
    """What a process is told on its command line, as JSON. `*_handle` and `*_bytes` name SharedBlocks."""

    number: int
    num_processes: int
    num_threads: int
    slot_bytes: int
    ring_handle: int | str
    ring_bytes: int
    source_handle: int | str
    source_bytes: int
    source_sizes: list[int]
    log_level: int
    dump_after_s: float


def board_bytes(num_processes: int) -> int:
    """Bytes at the start of the ring's block that say what each process is doing, whole pages."""
    return -(-num_processes * BOARD_CELLS * 8 // PAGE_BYTES) * PAGE_BYTES


def board_of(block: SharedBlock, num_processes: int) -> NDArray[np.int64]:
    """int64 [num_processes, BOARD_CELLS], a view."""
    cells = block.array[: num_processes * BOARD_CELLS * 8].view(np.int64)
    return cells.reshape(num_processes, BOARD_CELLS)


class _Slot:
    """The memory of one slot, as `BatchJob` takes it."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.memory = memory

    def take(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, NDArray[np.uint8]]:
        lent = self.memory[: math.prod(shape)].reshape(shape)
        return torch.from_numpy(lent), lent

    def keep(self, images: torch.Tensor) -> None:
        """See that the images are here: what is left of a batch without its refused ones is a copy elsewhere."""
        if images.data_ptr() != self.memory.ctypes.data:
            self.memory[: images.numel()] = images.numpy().reshape(-1)


class _Stop(threading.Event):
    """Set by whoever ends a pass; wakes the thread that waits for the next grant."""

    def __init__(self, granted: "queue.SimpleQueue[Grant | None]") -> None:
        super().__init__()
        self._granted = granted

    def set(self) -> None:
        super().set()
        self._granted.put(None)


class _Pass:
    """One pass over an epoch: granted batches go in, in order; prepared ones go out in the same order."""

    def __init__(self, source: BatchSource, slots: list[_Slot], num_threads: int, epoch: int, sender: Sender) -> None:
        self._source = source
        self._slots = slots
        self._epoch = epoch
        self._sender = sender
        self._granted: queue.SimpleQueue[Grant | None] = queue.SimpleQueue()
        self._pending: deque[Grant] = deque()
        self._stopping = _Stop(self._granted)
        self._prefetcher: OrderedPrefetcher[PreparedBatch] = OrderedPrefetcher(
            self._jobs(), num_threads=num_threads, max_in_flight=_NO_LIMIT, stopping=self._stopping
        )
        self._reporter = threading.Thread(target=self._report, name="reporter", daemon=True)
        self._reporter.start()

    @property
    def busy(self) -> bool:
        return bool(self._pending)

    def grant(self, grant: Grant) -> None:
        self._pending.append(grant)
        self._granted.put(grant)

    def end(self) -> None:
        """Drop what is not prepared. Ends the process where a thread hangs: it could write to a slot later."""
        self._prefetcher.close()
        self._reporter.join()
        if any(thread.name.startswith("loader-") for thread in threading.enumerate()):
            os._exit(_ERROR_EXIT)

    def _jobs(self) -> Iterator[Job[PreparedBatch]]:
        while (grant := self._granted.get()) is not None:
            slot = self._slots[grant.slot]
            yield BatchJob(self._source, slot, self._stopping, self._epoch, grant.start, grant.stop)

    def _report(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            while self._report_next():
                pass

    def _report_next(self) -> bool:
        try:
            prepared = next(self._prefetcher)
            grant = self._pending[0]
            if prepared.batch is not None:
                self._slots[grant.slot].keep(prepared.batch.images)
            done = Done.of(grant.number, prepared)
        except StopIteration:
            return False
        except BaseException as error:
            self._sender.send(Failed.of(self._pending[0].number, error, traceback.format_exc()))
            self._pending.clear()
            return False
        self._pending.popleft()
        self._sender.send(done)
        return True


class _LogToParent(logging.Handler):
    def __init__(self, sender: Sender, level: int) -> None:
        super().__init__(level)
        self._sender = sender
        self.setFormatter(logging.Formatter("%(message)s"))  # with the traceback, where there is one

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self._sender.send(LogLine(record.name, record.levelno, self.format(record)))


class _Worker:
    def __init__(self, setup: Setup, sender: Sender) -> None:
        ring = SharedBlock.attach(setup.ring_bytes, setup.ring_handle)
        self._source: BatchSource = shared(
            SharedBlock.attach(setup.source_bytes, setup.source_handle), setup.source_sizes
        )
        self._cells = board_of(ring, setup.num_processes)[setup.number]
        self._cells[1:] = 0
        slots = ring.array[board_bytes(setup.num_processes) :].reshape(-1, setup.slot_bytes)
        self._slots = [_Slot(memory) for memory in slots]
        self._setup = setup
        self._sender = sender
        self._pass: _Pass | None = None
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def obey(self, command: Begin | Grant | End) -> None:
        if isinstance(command, Begin):
            images = replace(self._source.images, known_bad=command.known_bad)
            source = replace(self._source, images=cast(ImageSource, WatchedImages(images, self._cells)))
            self._pass = _Pass(source, self._slots, self._setup.num_threads, command.epoch, self._sender)
        elif isinstance(command, Grant):
            assert self._pass is not None
            self._pass.grant(command)
        else:
            if self._pass is not None:
                self._pass.end()
            self._pass = None
            self._sender.send(Ended())

    def _watch(self) -> None:
        """Have the stacks written when nothing was begun for a while, by a thread that needs no interpreter lock."""
        dump_after_s = self._setup.dump_after_s
        pause = threading.Event()
        seen = -1
        while True:
            current = self._pass
            begun = int(self._cells[0])
            if current is None or not current.busy:
                faulthandler.cancel_dump_traceback_later()
                seen = -1
            elif begun != seen:
                faulthandler.dump_traceback_later(dump_after_s)
                seen = begun
            pause.wait(min(1.0, dump_after_s / 10))


def main() -> None:
    """Obey the commands of the process that started this one, until it closes their pipe or is gone."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    sender = Sender(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # what a library prints must not come between the messages
    torch.set_num_threads(1)
    setup = Setup(**json.loads(sys.argv[1]))
    logging.basicConfig(level=setup.log_level, handlers=[_LogToParent(sender, setup.log_level)])
    worker = _Worker(setup, sender)
    with contextlib.suppress(BrokenPipeError):
        sender.send(Ready())
        for command in received(sys.stdin.buffer):
            worker.obey(command)
    # At once, whatever the threads are at: nobody is left to want it.
    os._exit(0)


if __name__ == "__main__":
    main()
