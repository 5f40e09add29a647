"""Batches prepared in background threads, handed out in order, a bounded number of them in flight.

Knows nothing of images: a job says how many items it has, fills one at a time, and becomes a result. Which thread fills
which item never shows in the result. A worker's exception is kept and raised by the `next` that would have returned
its batch.
"""

import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

logger = logging.getLogger(__name__)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_LARGEST_CHUNK = 8
# On Windows a wait without a timeout does not let Ctrl-C through.
_WAKE_S = 0.5
_JOIN_S = 20.0


class Job(Protocol[T_co]):
    """The work of one batch; different items may be filled by different threads at the same time."""

    @property
    def num_items(self) -> int: ...

    def fill(self, item: int) -> None:
        """Prepare one item, 0 .. num_items - 1."""

    def finish(self) -> T_co:
        """The result, once every item is filled."""


def num_cores() -> int:
    """Cores for this process: those that it may use, shared with the other ranks of a run on this machine."""
    affinity = vars(os).get("sched_getaffinity")
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    sharing = os.environ.get("LOCAL_WORLD_SIZE", "1")  # as torchrun sets it
    return max(1, cores // max(1, int(sharing))) if sharing.isdecimal() else cores


def default_num_threads(num_processes: int = 0) -> int:
    """Decode threads for this machine: one a core, at most 8 in each of the processes that they are spread over."""
    return min(8 * max(num_processes, 1), num_cores())


class BufferPool:
    """Memory for batches that is used again once nobody holds a tensor on it.

    A fresh 38 MB batch costs 15 ms of page faults (64 images of 448 px), 4 % of decoding it. Safe from any thread.
    """

    def __init__(self, num_bytes: int, capacity: int) -> None:
        """`num_bytes` of the largest batch; `capacity` is how many are kept for use again."""
        self._num_bytes = num_bytes
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=capacity)

    def take(self, shape: tuple[int, ...]) -> tuple[Tensor, NDArray[np.uint8]]:
        """A uint8 tensor of a shape, contents undefined, and the same memory as an array to fill it through.

        The memory comes back by itself when no tensor on it is left; keep the tensor as long as the array.
        """
        try:
            memory = self._free.popleft()
        except IndexError:
            memory = np.empty(self._num_bytes, dtype=np.uint8)
        lent = memory[: math.prod(shape)].reshape(shape)
        # The finalizer runs wherever the last reference dies; deque operations are atomic.
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent), lent


class _Slot(Generic[T]):
    """A job in flight."""

    def __init__(self, job: Job[T] | None, error: BaseException | None = None) -> None:
        self.job = job
        self.error = error
        self.result: T | None = None
        self.next_item = 0
        self.num_unfilled = job.num_items if job is not None else 0
        self.done = job is None


class _Shared(Generic[T]):
    """What workers and consumer share. Workers hold no reference to the prefetcher, so that it can be collected."""

    def __init__(self, jobs: Iterator[Job[T]], num_threads: int, max_in_flight: int, stopping: threading.Event) -> None:
        self.jobs = jobs
        self.num_threads = num_threads
        self.max_in_flight = max_in_flight
        self.lock = threading.RLock()  # re-entrant: a garbage collection inside may call stop()
        self.work = threading.Condition(self.lock)
        self.ready = threading.Condition(self.lock)
        self.slots: deque[_Slot[T]] = deque()
        self.filling: _Slot[T] | None = None
        self.planning = False
        self.exhausted = False
        self.stopping = stopping

    def run_worker(self) -> None:
        while (chunk := self._take()) is not None:
            slot, start, stop = chunk
            self._fill(slot, start, stop)

    def stop(self) -> None:
        with self.lock:
            self.stopping.set()
            self.slots.clear()
            self.filling = None
            self.work.notify_all()
            self.ready.notify_all()

    def _take(self) -> tuple[_Slot[T], int, int] | None:
        """The next items to fill, planning the next batch where none is left; None when there is nothing more to do."""
        while True:
            with self.lock:
                while not self.stopping.is_set() and self.filling is None:
                    if self.exhausted:
                        return None
                    if not self.planning and len(self.slots) < self.max_in_flight:
                        self.planning = True
                        break
                    self.work.wait()
                if self.stopping.is_set():
                    return None
                slot = self.filling
                if slot is not None:
                    return self._cut(slot)
            self._plan()

    def _cut(self, slot: _Slot[T]) -> tuple[_Slot[T], int, int]:
        assert slot.job is not None
        size = max(1, min(_LARGEST_CHUNK, slot.job.num_items // self.num_threads))
        start = slot.next_item
        slot.next_item = min(start + size, slot.job.num_items)
        if slot.next_item == slot.job.num_items:
            self.filling = None
            self.work.notify()
        return slot, start, slot.next_item

    def _plan(self) -> None:
        """Bring the next job in flight; one thread at a time, outside the lock."""
        slot: _Slot[T] | None = None
        try:
            job = next(self.jobs, None)
            if job is not None:
                assert job.num_items > 0, "a batch without items"
                slot = _Slot(job)
        except BaseException as error:
            slot = _Slot(None, error)
        with self.lock:
            self.planning = False
            if self.stopping.is_set():
                return
            if slot is None or slot.job is None:
                self.exhausted = True
            if slot is not None:
                self.slots.append(slot)
                self.filling = slot if slot.job is not None else None
            self.work.notify_all()
            self.ready.notify_all()

    def _fill(self, slot: _Slot[T], start: int, stop: int) -> None:
        job = slot.job
        assert job is not None
        try:
            for item in range(start, stop):
                if self.stopping.is_set():
                    return
                if slot.error is None:
                    job.fill(item)
        except BaseException as error:
            slot.error = slot.error or error
        with self.lock:
            slot.num_unfilled -= stop - start
            if slot.num_unfilled:
                return
        try:
            if slot.error is None:
                slot.result = job.finish()
        except BaseException as error:
            slot.error = error
        with self.lock:
            slot.job = None
            slot.done = True
            self.ready.notify_all()


class OrderedPrefetcher(Generic[T]):
    """Iterator over the results of `jobs`, in their order, prepared ahead by `num_threads` threads.

    At most `max_in_flight` jobs are begun and not yet handed out. `jobs` is advanced in the threads, by one at a time.
    Close it (or use it as a context manager); leaving it to the garbage collector or the interpreter's exit stops the
    threads too.
    """

    def __init__(
        self,
        jobs: Iterator[Job[T]],
        *,
        num_threads: int,
        max_in_flight: int,
        stopping: threading.Event | None = None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        """`stopping` is set when the threads are told to end, so that a job that waits for something can give up.

        `on_wait` is called every half second or so while a result is waited for; what it raises, the consumer gets.
        """
        if num_threads < 1 or max_in_flight < 1:
            raise ValueError(f"num_threads={num_threads}, max_in_flight={max_in_flight}: each must be at least 1")
        self.wait_seconds = 0.0
        self._on_wait = on_wait
        self._shared: _Shared[T] = _Shared(jobs, num_threads, max_in_flight, stopping or threading.Event())
        self._threads = [
            threading.Thread(target=self._shared.run_worker, name=f"loader-{number}", daemon=True)
            for number in range(num_threads)
        ]
        # Daemon threads alone would be cut off in the middle of native code at exit: the finalizer runs before that.
        self._finalizer = weakref.finalize(self, _shut_down, self._shared, self._threads)
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> "OrderedPrefetcher[T]":
        return self

    def __next__(self) -> T:
        """The next result. Raises what a worker raised for it, and closes; `wait_seconds` adds up the time blocked."""
        shared = self._shared
        with shared.lock:
            if not (shared.slots and shared.slots[0].done):
                started = time.perf_counter()
                try:
                    while not self._is_settled():
                        shared.ready.wait(_WAKE_S)
                        self._on_wait()
                finally:
                    self.wait_seconds += time.perf_counter() - started
            slot = shared.slots.popleft() if shared.slots else None
            shared.work.notify()
        if slot is None:
            self.close()
            raise StopIteration
        if slot.error is not None:
            self.close()
            raise slot.error
        return cast(T, slot.result)

    def _is_settled(self) -> bool:
        shared = self._shared
        if shared.slots:
            return shared.slots[0].done
        return shared.stopping.is_set() or (shared.exhausted and not shared.planning)

    def close(self) -> None:
        """Stop the threads and wait for them: each finishes the item in its hands. Calling it again does nothing."""
        self._finalizer()

    def __enter__(self) -> "OrderedPrefetcher[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _shut_down(shared: _Shared[T], threads: list[threading.Thread]) -> None:
    shared.stop()
    end = time.monotonic() + _JOIN_S
    for thread in threads:
        # A collector that runs in a worker must not wait for that worker.
        if thread is not threading.current_thread() and thread.ident is not None:
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                logger.warning(
                    "%s did not end within %.0f s: a read hangs; it ends with the process", thread.name, _JOIN_S
                )
