import gc
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from tagger.data.prefetch import BufferPool, OrderedPrefetcher, default_num_threads


class SquareJob:
    """Squares of start .. start + size - 1; `act` runs before each item."""

    def __init__(self, start: int, size: int, act: Callable[[int], None]) -> None:
        self.num_items = size
        self._start = start
        self._act = act
        self._squares = [-1] * size

    def fill(self, item: int) -> None:
        self._act(self._start + item)
        self._squares[item] = (self._start + item) ** 2

    def finish(self) -> list[int]:
        assert -1 not in self._squares
        return self._squares


def jobs(num_jobs: int, size: int = 7, act: Callable[[int], None] = lambda _: None) -> Iterator[SquareJob]:
    return (SquareJob(number * size, size, act) for number in range(num_jobs))


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader-")]


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    assert condition()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not loader_threads()


@pytest.mark.parametrize("num_threads", [1, 2, 5, 16])
@pytest.mark.parametrize("max_in_flight", [1, 3])
@pytest.mark.parametrize("size", [1, 7, 40])
def test_results_come_in_order_whatever_the_threads(num_threads: int, max_in_flight: int, size: int) -> None:
    delays = np.random.default_rng(0).uniform(0, 2e-4, 20 * size)
    work = jobs(20, size, lambda item: time.sleep(delays[item]))
    with OrderedPrefetcher(work, num_threads=num_threads, max_in_flight=max_in_flight) as prefetcher:
        found = list(prefetcher)
    assert [square for result in found for square in result] == [item**2 for item in range(20 * size)]


def test_no_more_batches_are_begun_than_allowed() -> None:
    begun = 0

    def counted() -> Iterator[SquareJob]:
        nonlocal begun
        for job in jobs(20):
            begun += 1
            yield job

    with OrderedPrefetcher(counted(), num_threads=4, max_in_flight=3) as prefetcher:
        for taken in range(5):
            wait_until(lambda taken=taken: begun == taken + 3)
            time.sleep(0.01)
            assert begun == taken + 3
            next(prefetcher)


def test_work_is_done_by_several_threads_at_once() -> None:
    barrier = threading.Barrier(4, timeout=5)
    with OrderedPrefetcher(jobs(1, 4, lambda _: barrier.wait()), num_threads=4, max_in_flight=1) as prefetcher:
        assert list(prefetcher) == [[0, 1, 4, 9]]


def test_a_worker_error_is_raised_in_the_place_of_its_batch() -> None:
    def fail(item: int) -> None:
        if item == 23:
            raise RuntimeError("disk on fire")

    prefetcher = OrderedPrefetcher(jobs(10, 7, fail), num_threads=3, max_in_flight=4)
    assert [next(prefetcher)[0] for _ in range(3)] == [0, 49, 196]
    with pytest.raises(RuntimeError, match="disk on fire"):
        next(prefetcher)
    assert not loader_threads()
    assert list(prefetcher) == []


def test_an_error_while_planning_comes_after_the_batches_before_it() -> None:
    def broken() -> Iterator[SquareJob]:
        yield from jobs(2)
        raise KeyError("row 7")

    prefetcher = OrderedPrefetcher(broken(), num_threads=3, max_in_flight=5)
    assert len([next(prefetcher), next(prefetcher)]) == 2
    with pytest.raises(KeyError, match="row 7"):
        next(prefetcher)


def test_an_error_in_finish_is_raised() -> None:
    class Unfinished(SquareJob):
        def finish(self) -> list[int]:
            raise ValueError("odd")

    prefetcher = OrderedPrefetcher(iter([Unfinished(0, 3, lambda _: None)]), num_threads=2, max_in_flight=1)
    with pytest.raises(ValueError, match="odd"):
        next(prefetcher)


def test_closing_in_the_middle_ends_every_thread_and_the_iteration() -> None:
    prefetcher = OrderedPrefetcher(jobs(1000), num_threads=4, max_in_flight=4)
    next(prefetcher)
    prefetcher.close()
    prefetcher.close()
    assert not loader_threads()
    assert list(prefetcher) == []


def test_a_generator_that_is_left_closes_its_prefetcher() -> None:
    def batches() -> Iterator[list[int]]:
        with OrderedPrefetcher(jobs(1000), num_threads=4, max_in_flight=4) as prefetcher:
            yield from prefetcher

    for _ in batches():
        break
    gc.collect()
    assert not loader_threads()


def test_ctrl_c_in_the_consumer_closes() -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        OrderedPrefetcher(jobs(1000), num_threads=4, max_in_flight=4) as prefetcher,
    ):
        next(prefetcher)
        raise KeyboardInterrupt


def test_a_forgotten_prefetcher_is_stopped_by_the_collector() -> None:
    prefetcher = OrderedPrefetcher(jobs(1000), num_threads=4, max_in_flight=4)
    next(prefetcher)
    del prefetcher
    gc.collect()
    wait_until(lambda: not loader_threads())


def test_closing_wakes_a_job_that_waits() -> None:
    stopping = threading.Event()
    waiting = threading.Event()

    def wait(_: int) -> None:
        waiting.set()
        assert stopping.wait(10)

    prefetcher = OrderedPrefetcher(jobs(3, 7, wait), num_threads=2, max_in_flight=2, stopping=stopping)
    assert waiting.wait(5)
    started = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - started < 2


def test_the_wait_of_the_consumer_is_measured() -> None:
    slow = OrderedPrefetcher(jobs(3, 1, lambda _: time.sleep(0.03)), num_threads=1, max_in_flight=1)
    assert len(list(slow)) == 3
    assert 0.05 < slow.wait_seconds < 1.0
    fast = OrderedPrefetcher(jobs(3, 1), num_threads=1, max_in_flight=3)
    time.sleep(0.05)
    next(fast)
    assert fast.wait_seconds == 0.0
    fast.close()


def test_nothing_to_do_ends_at_once() -> None:
    assert list(OrderedPrefetcher(jobs(0), num_threads=3, max_in_flight=2)) == []


@pytest.mark.parametrize("wrong", [{"num_threads": 0, "max_in_flight": 1}, {"num_threads": 1, "max_in_flight": 0}])
def test_no_threads_and_no_batches_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        OrderedPrefetcher(jobs(1), **wrong)


def test_the_default_number_of_threads_is_bounded() -> None:
    assert 1 <= default_num_threads() <= 8


def test_a_buffer_is_used_again_only_when_no_tensor_is_left_on_it() -> None:
    pool = BufferPool(12, capacity=2)
    first, memory = pool.take((4, 3))
    memory[:] = 7
    view = first[1:2]
    address = first.data_ptr()
    second, _ = pool.take((4, 3))
    assert second.data_ptr() != address
    del first, memory
    third, _ = pool.take((4, 3))
    assert third.data_ptr() != address
    assert (view == 7).all()
    del view
    fourth, again = pool.take((4, 3))
    assert fourth.data_ptr() == address
    again[:] = 9
    assert pool.take((2, 2))[0].shape == (2, 2)
    assert torch.equal(fourth, torch.full((4, 3), 9, dtype=torch.uint8))


def test_a_pool_keeps_no_more_than_its_capacity() -> None:
    pool = BufferPool(2, capacity=2)
    held = [pool.take((2,))[0] for _ in range(5)]
    addresses = {tensor.data_ptr() for tensor in held}
    held.clear()
    again = [pool.take((2,))[0] for _ in range(2)]
    assert {tensor.data_ptr() for tensor in again} <= addresses
