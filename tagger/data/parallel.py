"""Work on many items in threads, in order, with a bounded number of tasks under way and no list of results."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

_TASKS_A_THREAD = 4


def map_blocks(
    function: Callable[[range], Result], num_items: int, *, block: int, num_threads: int
) -> Generator[tuple[range, Result], None, None]:
    """(items, function(items)) for the blocks of 0 .. num_items - 1, in order; what `function` raises passes through.

    Close it to leave early: that waits for the tasks that have begun and drops the others.
    """
    executor = ThreadPoolExecutor(num_threads, thread_name_prefix="block")
    pending: deque[tuple[range, Future[Result]]] = deque()
    try:
        for start in range(0, num_items, block):
            items = range(start, min(start + block, num_items))
            pending.append((items, executor.submit(function, items)))
            if len(pending) >= _TASKS_A_THREAD * num_threads:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    finally:
        executor.shutdown(cancel_futures=True)
