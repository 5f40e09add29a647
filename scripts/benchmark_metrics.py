"""What exact metrics cost, beside torchmetrics in the same run: ratios against stated goals.

1. Time for each (image, tag) at 50,000 images x 5,000 tags: ours, every image and tag, against torchmetrics' exact
   average precision (its update on whole batches, its compute on some tags at all images) and its update with 200 bins
   (on a few images), measured in turns and scaled.
2. Peak memory at that size: ours measured, torchmetrics' measured on some of the tags and scaled, each in a process of
   its own.
3. 300,000 images x 20,000 tags: our time for each (image, tag) on some of the tags, memory by formula and the same
   formula checked on those tags.
4. What rounding scores to 16 bits changes: average precision against that of the float32 scores.
"""

import argparse
import importlib.util
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from evaluation_metrics import MetricComputer
from tagger.command import command
from tagger.errors import InputError
from tagger.metrics.reference import reference_average_precision
from tagger.metrics.store import COUNTED_TOGETHER, SAMPLE_SIZE, TABLES_AT_A_TIME, histogram_bytes, stored_bytes
from tagger.options import Parser, whole

IMAGES, TAGS, BATCH = 50_000, 5_000, 256
LARGE_IMAGES, LARGE_TAGS = 300_000, 20_000
TAGS_PER_IMAGE = 36
BINS = 200
# The parts on which the other side, and the large set, are measured.
TAGS_OF_EXACT, IMAGES_OF_BINNED, TAGS_OF_LARGE, TAGS_OF_MEMORY = 32, 8, 200, 200
POOL = 4


@dataclass(frozen=True)
class Batches:
    """A few batches, taken in turns: logits [B, C] float32, dense targets int64, tag indices and offsets."""

    logits: list[Tensor]
    dense: list[Tensor]
    listed: list[tuple[Tensor, Tensor]]

    def logits_of(self, number: int) -> Tensor:
        """Logits of a batch by its number, a little different in every round through the pool."""
        return self.logits[number % POOL] + 0.001 * (number // POOL)


def make_batches(rows: int, num_tags: int, seed: int = 0) -> Batches:
    """Batches as of a trained tagger: rare tags, most logits far below 0."""
    generator = torch.Generator().manual_seed(seed)
    rate = torch.rand(num_tags, generator=generator) ** 3
    rate *= min(1.0, TAGS_PER_IMAGE / TAGS) * num_tags / rate.sum()
    logits, dense, listed = [], [], []
    for _ in range(POOL):
        present = torch.rand(rows, num_tags, generator=generator) < rate
        scores = torch.randn(rows, num_tags, generator=generator) * 1.5 + torch.logit(rate.clamp(1e-4, 0.9))
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), present.sum(dim=1).cumsum(0)])
        logits.append(scores + 4 * present)
        dense.append(present.long())
        listed.append((present.nonzero()[:, 1].int(), offsets.int()))
    return Batches(logits, dense, listed)


def ours(batches: Batches, computer: MetricComputer, first: int, count: int) -> None:
    """Update with some batches."""
    for number in range(first, first + count):
        computer.update(batches.logits_of(number), *batches.listed[number % POOL])


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Times:
    """Nanoseconds for each (image, tag): medians of their rounds."""

    update: float
    compute: float
    exact_update: float
    exact_compute: float
    binned_update: float

    @property
    def against_exact(self) -> float:
        """How many times quicker than exact torchmetrics, update and compute together."""
        return (self.exact_update + self.exact_compute) / (self.update + self.compute)

    @property
    def against_binned(self) -> float:
        """How many times quicker than the binned update, our compute included."""
        return self.binned_update / (self.update + self.compute)


def measure_times(images: int, tags: int) -> Times:
    """All of ours, and parts of torchmetrics' between our batches."""
    from torchmetrics.classification import MultilabelAveragePrecision  # type: ignore[import-not-found]

    batches = make_batches(BATCH, tags)
    computer = MetricComputer(tags, expected_images=images)
    rounds = 5
    count = images // BATCH // rounds
    update, exact, binned, computed = [], [], [], []
    column = torch.cat([batches.logits_of(n)[:, :TAGS_OF_EXACT] for n in range(images // BATCH + 1)])[:images]
    truth = torch.cat([batches.dense[n % POOL][:, :TAGS_OF_EXACT] for n in range(images // BATCH + 1)])[:images]
    for number in range(rounds):
        # Adding to the logits, which makes the batches differ, is no part of the update.
        adding = timed(lambda: [batches.logits_of(n) for n in range(count)])
        update.append(timed(partial(ours, batches, computer, number * count, count)) - adding)
        metric = MultilabelAveragePrecision(tags, average=None, thresholds=None)
        exact.append(timed(partial(metric.update, batches.logits[0], batches.dense[0])))
        few = slice(0, IMAGES_OF_BINNED)
        metric = MultilabelAveragePrecision(tags, average=None, thresholds=BINS)
        binned.append(timed(partial(metric.update, batches.logits[0][few], batches.dense[0][few])))
        metric = MultilabelAveragePrecision(TAGS_OF_EXACT, average=None, thresholds=None)
        metric.update(column, truth)
        if number < 3:
            computed.append(timed(metric.compute))
    compute = [timed(computer.compute) for _ in range(3)]
    scored = computer.num_images * tags
    return Times(
        update=statistics.median(update) / (count * BATCH * tags) * 1e9,
        compute=statistics.median(compute) / scored * 1e9,
        exact_update=statistics.median(exact) / (BATCH * tags) * 1e9,
        exact_compute=statistics.median(computed) / (images * TAGS_OF_EXACT) * 1e9,
        binned_update=statistics.median(binned) / (IMAGES_OF_BINNED * tags) * 1e9,
    )


def peak_bytes(work: Callable[..., None], *arguments: object) -> int:
    """How much a process of its own grows at most while it does some work after a first, small round of it."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_watched, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        return int(receiver.recv())
    except EOFError:
        raise SystemExit("error: the process whose memory was measured ended early") from None
    finally:
        process.join()


def _watched(sender: Connection, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    work(BATCH, 20)
    process = psutil.Process()
    before, peak, done = process.memory_info().rss, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    work(*arguments)
    done.set()
    watcher.join()
    sender.send(max(0, peak - before))


def score_ours(images: int, tags: int, expected_images: int | None = None) -> None:
    """All of an evaluation with our metrics."""
    batches = make_batches(BATCH, tags)
    computer = MetricComputer(tags, expected_images=expected_images)
    ours(batches, computer, 0, images // BATCH)
    computer.compute()


def score_exact(images: int, tags: int) -> None:
    """All of an evaluation with torchmetrics' exact average precision."""
    from torchmetrics.classification import MultilabelAveragePrecision

    batches = make_batches(BATCH, tags)
    metric = MultilabelAveragePrecision(tags, average=None, thresholds=None)
    for number in range(images // BATCH):
        # A clone, as every batch of an evaluation is memory of its own and torchmetrics keeps it.
        metric.update(batches.logits_of(number), batches.dense[number % POOL].clone())
    metric.compute()


def large_bytes(images: int, tags: int, tags_per_image: float) -> dict[str, int]:
    """What histograms of a large set take: the parts, in bytes."""
    return {
        "counts": min(histogram_bytes(tags), stored_bytes(images, tags)),
        "images counted together": COUNTED_TOGETHER * tags * 2,
        f"keys of {SAMPLE_SIZE} to {2 * SAMPLE_SIZE} images": 2 * SAMPLE_SIZE * tags * 2 * 2,
        "positives, in two orders": int(images * tags_per_image * 8 * 2),
        "counters of images": images * 4 * 8,
        "computing": int(images * tags_per_image * 8 * 8) + 2 * histogram_bytes(TABLES_AT_A_TIME),
    }


def measure_large(images: int, tags: int) -> tuple[float, float]:
    """Nanoseconds for each (image, tag) of update and of compute on some tags of a large set."""
    batches = make_batches(8 * BATCH, tags)
    computer = MetricComputer(tags, expected_images=images)
    count = images // (8 * BATCH)
    adding = timed(lambda: [batches.logits_of(n) for n in range(count)])
    update = timed(lambda: ours(batches, computer, 0, count)) - adding
    scored = computer.num_images * tags
    return update / scored * 1e9, timed(computer.compute) / scored * 1e9


def rounding_difference(rows: int = 10_000, tags: int = 100) -> tuple[float, float]:
    """Mean and largest difference of a tag's average precision, 16-bit against float32 scores."""
    batches = make_batches(rows // POOL, tags)
    computer = MetricComputer(tags)
    ours(batches, computer, 0, POOL)
    logits, dense = (torch.cat(parts).numpy() for parts in (batches.logits, batches.dense))
    exact = reference_average_precision(logits, *np.nonzero(dense))
    difference = np.abs(computer.compute()["average_precision"].numpy() - exact)
    return float(np.nanmean(difference)), float(np.nanmax(difference))


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures; exits with 1 where a goal is missed."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=whole(), default=IMAGES, help="images (default: %(default)s)")
    parser.add_argument("--tags", type=whole(), default=TAGS, help="tags (default: %(default)s)")
    parser.add_argument("--threads", type=whole(), default=2, help="threads of torch (default: %(default)s)")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("torchmetrics") is None:
        raise InputError("torchmetrics is not installed; for this benchmark: pip install torchmetrics")
    torch.set_num_threads(options.threads)
    times = measure_times(options.images, options.tags)
    own_peak = peak_bytes(score_ours, options.images, options.tags)
    exact_peak = peak_bytes(score_exact, options.images, TAGS_OF_MEMORY) * options.tags / TAGS_OF_MEMORY
    share = own_peak / exact_peak
    table = Table("what", "figure", "goal", title=f"{options.images:,} images x {options.tags:,} tags")
    table.add_row("ours: update, compute", f"{times.update:.1f} + {times.compute:.1f} ns for each (image, tag)")
    table.add_row("torchmetrics exact: update, compute", f"{times.exact_update:.1f} + {times.exact_compute:.1f} ns")
    table.add_row(f"torchmetrics {BINS} bins: update", f"{times.binned_update:.1f} ns")
    table.add_row("ours against exact", f"{times.against_exact:.1f}x", ">= 10x")
    table.add_row("ours against the binned update", f"{times.against_binned:.1f}x", ">= 10x")
    table.add_row(
        "peak memory, ours and exact", f"{own_peak / 1e9:.2f}, {exact_peak / 1e9:.2f} GB: {share:.2f}", "<= 0.25"
    )
    update, compute = measure_large(LARGE_IMAGES, TAGS_OF_LARGE)
    expected = sum(large_bytes(LARGE_IMAGES, TAGS_OF_LARGE, TAGS_PER_IMAGE * TAGS_OF_LARGE / TAGS).values())
    measured = peak_bytes(score_ours, LARGE_IMAGES, TAGS_OF_LARGE, LARGE_IMAGES)
    parts = large_bytes(LARGE_IMAGES, LARGE_TAGS, TAGS_PER_IMAGE)
    elements = LARGE_IMAGES * LARGE_TAGS
    table.add_section()
    size = f"{LARGE_IMAGES:,} x {LARGE_TAGS:,}"
    table.add_row(f"{size}: update, compute (of {TAGS_OF_LARGE} tags)", f"{update:.1f} + {compute:.1f} ns for each")
    table.add_row(f"{size}: in all", f"{(update + compute) * elements / 1e9:.0f} s beside the model")
    table.add_row(f"{size}: memory", f"{sum(parts.values()) / 1e9:.2f} GB (stored keys: {elements * 2 / 1e9:.0f} GB)")
    for name, value in parts.items():
        table.add_row(f"  {name}", f"{value / 1e9:.2f} GB")
    table.add_row(f"the formula at {TAGS_OF_LARGE} tags, measured", f"{expected / 1e6:.0f}, {measured / 1e6:.0f} MB")
    mean, largest = rounding_difference()
    table.add_section()
    table.add_row("AP of 16-bit against float32 scores", f"mean {mean:.1e}, largest {largest:.1e}")
    Console(width=120).print(table)
    return 0 if times.against_exact >= 10 and times.against_binned >= 10 and share <= 0.25 else 1


if __name__ == "__main__":
    sys.exit(main())
