"""How fast images become batches, and what that costs the training loop: ratios within one run, against stated goals.

1. Images per CPU second, from 1 MP JPEGs to letterboxed batches of 448 px: ours against torch's DataLoader with Pillow
   and against libjpeg-turbo decoding alone, in turns. CPU time of all processes together, so other work on the machine
   changes little.
2. The share of a step spent waiting when the loader could feed 1.5 times the model; the model sleeps.
3. The main loop's mean step beside a loader at 1,000 images a second against the same step without one. Decoding is
   replaced by a wait that needs no interpreter lock, so that two cores can show it.
"""

import dataclasses
import functools
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import simplejpeg  # type: ignore[import-untyped]
import torch
from rich.console import Console
from rich.table import Table

from Configuration_System import FullConfig, load_config
from dataset_loader import DataLoader, create_dataloaders, open_dataset
from scripts import build_cache
from scripts.figures import Figure, figure, figures_table
from scripts.loader_workloads import HELD_OUT, PillowDataset, WaitingImages, make_photographs
from tagger.batch import Batch
from tagger.command import command
from tagger.config_io import save_yaml
from tagger.files import write_json
from tagger.options import Parser, output_file
from vocabulary import build_vocabulary

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "unified_config.yaml"
SIDE = 448
BATCH = 32
RATE = 1000.0
NUM_THREADS = 8  # of the loader that is beside the main loop
PREFETCH = 4
LOOP_BATCH = 64
STEP_S = 0.75 * LOOP_BATCH / RATE


def configured(scratch: Path, *words: str) -> FullConfig:
    held_out = scratch / "held_out.txt"
    held_out.write_text(HELD_OUT, encoding="utf-8")
    settings = [
        f"data.roots=[{scratch / 'images'}]",
        f"data.index_dir={scratch / 'index'}",
        f"data.val_list={held_out}",
        f"data.image_size={SIDE}",
        f"training.batch_size={BATCH}",
        "training.device=cpu",
        "vocabulary.min_frequency=1",
    ]
    return load_config(CONFIG, [*settings, *words], environment={})


def open_loader(scratch: Path, *words: str) -> DataLoader:
    config = configured(scratch, *words)
    index = open_dataset(config.data)
    return create_dataloaders(config, build_vocabulary(index, 1), index)[0]


# 1. Images per CPU second


def cpu_seconds() -> float:
    """CPU time so far of this process and of its children, which must live."""
    total = time.process_time()
    for process in psutil.Process().children(recursive=True):
        times = process.cpu_times()
        total += times.user + times.system
    return total


def timed_pass(consume: Callable[[], int]) -> float:
    """Images per CPU second."""
    started = cpu_seconds()
    number = consume()
    return number / (cpu_seconds() - started)


def measure_rates(scratch: Path, paths: Sequence[Path], num_rounds: int, console: Console) -> dict[str, list[float]]:
    """Images per CPU second of each pipeline and round, interleaved."""
    full = ("data.num_threads=2", "data.decode_scaling=off")
    loaders = {
        "ours, full decode": open_loader(scratch, *full),
        "ours, full decode in a process": open_loader(scratch, *full, "data.num_processes=1"),
        # At 1 MP -> 448 px "safe" scales nothing: half the size is less than twice the target.
        "ours, DCT scaling": open_loader(scratch, "data.num_threads=2", "data.decode_scaling=tight"),
        "ours, shrink cache": open_cached(scratch),
    }
    baseline = torch.utils.data.DataLoader(
        PillowDataset(paths, SIDE),
        batch_size=BATCH,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
    pipelines: dict[str, Callable[[], int]] = {
        "DataLoader + Pillow": lambda: sum(len(images) for images, _ in baseline),
        "libjpeg-turbo, decode only": lambda: sum(decode_only(path) > 0 for path in paths),
        **{name: functools.partial(count_images, loader) for name, loader in loaders.items()},
    }
    rates: dict[str, list[float]] = {name: [] for name in pipelines}
    for consume in pipelines.values():
        consume()
    for number in range(num_rounds):
        console.print(f"images per CPU second: round {number + 1} of {num_rounds}")
        for name, consume in pipelines.items():
            rates[name].append(timed_pass(consume))
    for loader in loaders.values():
        loader.close()
    return rates


def count_images(loader: DataLoader) -> int:
    return sum(len(batch) for batch, _ in loader)


def decode_only(path: Path) -> int:
    """The floor: read and decode a file, and do nothing with it; its height."""
    return int(simplejpeg.decode_jpeg(path.read_bytes()).shape[0])


def open_cached(scratch: Path) -> DataLoader:
    """A loader that reads from a shrink cache, which is built first."""
    cache = scratch / "cache"
    cache.mkdir()
    recipe = scratch / "recipe.yaml"
    save_yaml(configured(scratch), recipe)
    code = build_cache.main([str(recipe), "--folder", str(cache), "--workers", "0"])
    assert code == 0, "the shrink cache was not built"
    return open_loader(scratch, "data.num_threads=2", f"data.cache_dir={cache}")


def rate_figures(rates: dict[str, list[float]]) -> list[Figure]:
    def against(other: str, name: str, goal: float | None) -> Figure:
        ratios = [ours / theirs for ours, theirs in zip(rates[name], rates[other], strict=True)]
        return figure(f"{name} / {other}", ratios, goal)

    pillow, floor = "DataLoader + Pillow", "libjpeg-turbo, decode only"
    return [
        against(pillow, "ours, full decode", 2.7),
        against(floor, "ours, full decode", 0.5),
        against(pillow, "ours, full decode in a process", None),
        against(pillow, "ours, DCT scaling", 3.4),
        against(pillow, "ours, shrink cache", 5.0),
    ]


# 2. Waiting


def measure_waiting(scratch: Path, num_processes: int, num_rounds: int, num_steps: int) -> list[float]:
    """Shares of the time spent waiting for data at 1.5 times the capacity that is needed, decoding for real.

    Each round measures the capacity anew just before, for it drifts with the machine, in half of `num_steps`.
    """
    loader = open_loader(scratch, "data.num_threads=2", f"data.num_processes={num_processes}")
    batches = endless(loader)
    shares = []
    for _ in range(num_rounds):
        for _ in range(loader.options.prefetch_batches + 1):  # those that were prepared before
            next(batches)
        started = time.perf_counter()
        for _ in range(num_steps // 2):
            next(batches)
        step_s = 1.5 * (time.perf_counter() - started) / (num_steps // 2)
        for _ in range(loader.options.prefetch_batches):  # until as much is prepared as in a run that goes on
            time.sleep(step_s)
        waited, started = loader.wait_seconds, time.perf_counter()
        for _ in range(num_steps):
            next(batches)
            time.sleep(step_s)
        shares.append((loader.wait_seconds - waited) / (time.perf_counter() - started))
    del batches
    loader.close()
    return shares


def endless(loader: DataLoader) -> Iterator[Batch]:
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        for batch, _ in loader:
            yield batch


# 3. The main loop


class EagerModel:
    """A step as a trainer takes it: many small torch operations, launched from Python one by one."""

    def __init__(self) -> None:
        self._weights = [torch.randn(16, 16) for _ in range(8)]
        self._num_layers = 1

    def calibrate(self, step_s: float) -> None:
        """Choose the number of operations so that a step takes `step_s` on an idle machine."""
        self._num_layers = 500
        self.step()
        durations = []
        for _ in range(9):
            started = time.thread_time()
            self.step()
            durations.append(time.thread_time() - started)
        self._num_layers = max(1, round(self._num_layers * step_s / statistics.median(durations)))

    def step(self) -> torch.Tensor:
        state = torch.ones(16, 16)
        for layer in range(self._num_layers):
            state = torch.tanh(state @ self._weights[layer % 8] + 0.1)
        return state


def waiting_loader(scratch: Path, num_processes: int) -> DataLoader:
    """A loader whose images take no work and come at a little over RATE, so that RATE is what the loop takes."""
    words = [f"data.num_threads={NUM_THREADS}", f"data.num_processes={num_processes}", "data.image_size=224"]
    words += [f"data.prefetch_batches={PREFETCH}", f"training.batch_size={LOOP_BATCH}"]
    loader = open_loader(scratch, *words)
    images = loader._source.images
    facts = {field.name: getattr(images, field.name) for field in dataclasses.fields(images)}
    waiting = WaitingImages(**facts, wait_s=0.9 * NUM_THREADS / RATE)
    loader._source = dataclasses.replace(loader._source, images=waiting)
    return loader


def mean_step(
    model: EagerModel, batches: Iterator[Batch], loader: DataLoader | None, num_steps: int
) -> tuple[float, float]:
    """(seconds from batch to batch, without those blocked for want of one; images a second). Prepared ones go first."""
    for _ in range(PREFETCH):
        next(batches)
        model.step()
    waited, started = loader.wait_seconds if loader else 0.0, time.perf_counter()
    for _ in range(num_steps):
        next(batches)
        model.step()
    elapsed = time.perf_counter() - started
    blocked = loader.wait_seconds - waited if loader else 0.0
    return (elapsed - blocked) / num_steps, num_steps * LOOP_BATCH / elapsed


def measure_main_loop(scratch: Path, num_rounds: int, num_steps: int) -> tuple[dict[str, list[float]], float]:
    """(step beside a loader / step without one, by kind of loader; images a second that the loaders gave)."""
    model = EagerModel()
    model.calibrate(STEP_S)
    loaders = {"threads": waiting_loader(scratch, 0), "processes": waiting_loader(scratch, 2)}
    feeds = {name: endless(loader) for name, loader in loaders.items()}
    held = next(feeds["threads"])
    ratios: dict[str, list[float]] = {name: [] for name in loaders}
    rates = []
    bare = [mean_step(model, itertools.repeat(held), None, num_steps)[0]]
    for _ in range(num_rounds):
        for name, loader in loaders.items():
            beside, rate = mean_step(model, feeds[name], loader, num_steps)
            rates.append(rate)
            time.sleep(PREFETCH * LOOP_BATCH / RATE)  # the loader rests when all is prepared
            bare.append(mean_step(model, itertools.repeat(held), None, num_steps)[0])
            ratios[name].append(beside / statistics.mean(bare[-2:]))
    feeds.clear()
    for loader in loaders.values():
        loader.close()
    return ratios, statistics.median(rates)


# The command


def show(figures: Sequence[Figure], rates: dict[str, list[float]], console: Console) -> None:
    """Two tables: images per CPU second, and the ratios with their goals."""
    table = Table("pipeline, 1 MP JPEG -> 448 px", "images per CPU second", title="medians")
    for name, values in rates.items():
        table.add_row(name, f"{statistics.median(values):.0f}")
    console.print(table)
    console.print(figures_table(figures))


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints the tables; exit code 0 whatever the goals say."""
    parser = Parser(
        description="Measure the input pipeline in ratios within one run.",
        epilog="example: python -m scripts.benchmark_loader --quick --output loader.json",
    )
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds, about half a minute")
    parser.add_argument("--output", type=output_file, metavar="FILE", help="write the figures and every round as JSON")
    options = parser.parse_args(arguments)
    num_images, num_rounds = (2 * BATCH, 3) if options.quick else (6 * BATCH, 7)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        paths = make_photographs(scratch / "images", num_images)
        make_photographs(scratch / "many" / "images", 200 * BATCH)  # so that an epoch's start is not what is measured
        rates = measure_rates(scratch, paths, num_rounds, console)
        figures = rate_figures(rates)
        for num_processes, name in ((0, "threads"), (1, "a process")):
            console.print(f"waiting for data, loaded in {name}")
            shares = measure_waiting(scratch / "many", num_processes, num_rounds, 16 if options.quick else 24)
            title = f"share of time waiting at 1.5x capacity, {name}"
            figures.append(figure(title, shares, 0.02, lower_is_better=True))
        console.print("the main loop beside a loader")
        ratios, rate = measure_main_loop(scratch / "many", 3 * num_rounds, num_steps=8)
        for name, rounds in ratios.items():
            title = f"main loop's step beside {name} at {rate:.0f} images/s / without"
            figures.append(figure(title, rounds, 1.1, lower_is_better=True))
    show(figures, rates, console)
    if options.output is not None:
        measured = [{**dataclasses.asdict(each), "reached": each.reached} for each in figures]
        write_json(options.output, {"format_version": 1, "figures": measured, "images_per_cpu_second": rates})
    return 0


if __name__ == "__main__":
    sys.exit(main())
