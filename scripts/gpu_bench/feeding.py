"""Whether the loader keeps the device fed: images a second from files in the page cache, and the share of time waited.

The step is a sleep of the time that one takes, which leaves the cores to the loader as a GPU does.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dataset_loader import DataLoader
from scripts.benchmark_loader import endless, open_loader, timed_pass
from scripts.figures import Figure, figure
from scripts.gpu_bench.bench import Bench
from scripts.loader_workloads import make_photographs
from tagger.batch import Batch
from tagger.data.prefetch import num_cores

_STEPS = 8


def loader(bench: Bench) -> Iterator[Figure]:
    """Rates of the loader alone, then beside steps of the rates that were measured for the networks."""
    bench.check_time()
    size = bench.scale.loader_batch
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        number = bench.scale.loader_batches * size  # so that an epoch seldom ends
        make_photographs(scratch / "images", number, bench.scale.loader_photographs)
        for image_size in sorted({case.image_size for case in bench.scale.steps}):
            words = [f"data.image_size={image_size}", f"training.batch_size={size}"]
            if bench.on_gpu:
                words.append("training.device=cuda")
            feed = open_loader(scratch, *words)
            try:
                batches = endless(feed)
                yield from _rates(bench, feed, batches, image_size)
                for case in bench.scale.steps:
                    if case.image_size == image_size and case.name in bench.images_per_s:
                        yield _waiting(bench, feed, batches, case.name)
            finally:
                feed.close()


def _rates(bench: Bench, feed: DataLoader, batches: Iterator[Batch], image_size: int) -> Iterator[Figure]:
    """Images a second, and images a second of CPU time, which does not depend on how many cores there are."""
    name = f"loader, 1 MP JPEG -> {image_size}"
    _take(batches, feed.options.prefetch_batches + 1)  # those that are prepared before
    wall, cpu = [], []
    for _ in range(bench.scale.rounds):
        bench.check_time()
        started = time.perf_counter()
        cpu.append(timed_pass(lambda: _take(batches, _STEPS)))
        wall.append(_STEPS * bench.scale.loader_batch / (time.perf_counter() - started))
    yield figure(f"{name}: images/s", wall, note=f"{num_cores()} cores")
    yield figure(f"{name}: images a CPU second", cpu)


def _take(batches: Iterator[Batch], number: int) -> int:
    return sum(len(next(batches)) for _ in range(number))


def _waiting(bench: Bench, feed: DataLoader, batches: Iterator[Batch], name: str) -> Figure:
    """Share of the time for which a network that takes the measured time waits for its batch."""
    step_s = bench.scale.loader_batch / bench.images_per_s[name]
    for _ in range(feed.options.prefetch_batches):  # until as much is prepared as in a run that goes on
        time.sleep(step_s)
    shares = []
    for _ in range(bench.scale.rounds):
        bench.check_time()
        waited, started = feed.wait_seconds, time.perf_counter()
        for _ in range(_STEPS):
            next(batches)
            time.sleep(step_s)
        shares.append((feed.wait_seconds - waited) / (time.perf_counter() - started))
    goal = (0.005 if name.startswith("L@") else 0.03) if bench.on_gpu else None
    rate = f"at {bench.images_per_s[name]:.0f} images/s"
    return figure(f"waiting for data, {name}", shares, goal, lower_is_better=True, note=rate)
