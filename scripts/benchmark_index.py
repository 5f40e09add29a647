"""What the metadata index costs: building it against a bare loop, reopening it at ten million rows, bytes a row.

The build and the loop take turns on the same sidecars in one process, so their ratio holds on a noisy machine; the
median of the turns counts. The loop does the least that gives tag numbers: it reads each file (os.open, os.read,
os.close), parses it (orjson) and looks its tags up. It runs twice: given the paths, and finding them itself with
os.scandir, as any program that starts from a folder has to.
"""

import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import tracemalloc
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import orjson
import psutil
from rich.console import Console
from rich.table import Table

from tagger.command import command
from tagger.data.generations import Generation
from tagger.data.index import MetadataIndex, finish_index, open_index
from tagger.data.index_build import RowWriter
from tagger.data.scan import Problems, scan_root
from tagger.files import write_json
from tagger.options import Parser, input_folder, output_file, whole

TAGS_A_ROW = 36
NUM_TAGS = 20_000
NUM_LISTS = 10_000
FILES_A_FOLDER = 1000
BLOCK_ROWS = 100_000
# The least that a header reader takes for a PNG of 640 x 480.
IMAGE = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x02\x80\0\0\x01\xe0\x08\x02\0\0\0" + bytes(4)


@dataclass(frozen=True)
class Build:
    """Seconds of each turn, by the clock and of this process's CPU."""

    bare_s: list[float]
    finding_s: list[float]
    build_s: list[float]
    scan_s: list[float]
    bare_cpu_s: list[float]
    finding_cpu_s: list[float]
    build_cpu_s: list[float]
    scan_cpu_s: list[float]

    @property
    def ratio(self) -> float:
        """Rows a second of the build over those of the loop that is given the paths, per second of CPU."""
        return _median_ratio(self.bare_cpu_s, self.build_cpu_s)

    @property
    def finding_ratio(self) -> float:
        """The same against the loop that finds its files."""
        return _median_ratio(self.finding_cpu_s, self.build_cpu_s)

    @property
    def clock_ratio(self) -> float:
        """The same by the clock."""
        return _median_ratio(self.bare_s, self.build_s)

    @property
    def ratio_without_scan(self) -> float:
        """The same as `ratio` for the part of the build that reads, parses and numbers."""
        parts = [build - scan for build, scan in zip(self.build_cpu_s, self.scan_cpu_s, strict=True)]
        return _median_ratio(self.bare_cpu_s, parts)


def _median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def make_files(root: Path, number: int) -> list[str]:
    """Write images with sidecars of TAGS_A_ROW tags, few of them frequent; gives the paths of the sidecars."""
    generator = random.Random(0)
    names = [f"tag_{i:05}_name" for i in range(NUM_TAGS)]
    weights = np.cumsum(1 / np.arange(1, NUM_TAGS + 1)).tolist()
    lists: list[str] = []
    for _ in range(min(number, NUM_LISTS)):
        tags: dict[str, None] = {}
        while len(tags) < TAGS_A_ROW:
            tags.update(dict.fromkeys(generator.choices(names, cum_weights=weights, k=2 * TAGS_A_ROW)))
        lists.append(orjson.dumps(list(tags)[:TAGS_A_ROW]).decode())
    paths: list[str] = []
    for i in range(number):
        folder = root / f"{i // FILES_A_FOLDER:03}"
        if i % FILES_A_FOLDER == 0:
            folder.mkdir(parents=True)
        paths.append(f"{folder}/{i:08}.json")
        entry = f'{{"filename":"{i:08}.png","tags":{lists[i % len(lists)]},"rating":"general"}}'
        _write(paths[-1], entry.encode())
        if i % FILES_A_FOLDER == 0:
            first = folder / f"{i:08}.png"
            first.write_bytes(IMAGE)
        else:  # one picture a folder, under many names: making and removing a hundred thousand takes minutes
            (folder / f"{i:08}.png").hardlink_to(first)
    return paths


def _write(path: str, content: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0))
    os.write(handle, content)
    os.close(handle)


class _Numbers(dict[str, int]):
    def __missing__(self, tag: str) -> int:
        number = self[tag] = len(self)
        return number


def find_sidecars(root: Path) -> Iterator[str]:
    """Paths of all sidecars below a folder, in the order of the disk."""
    waiting = [os.fspath(root)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.name.endswith(".json"):
                    yield entry.path
                elif entry.is_dir():
                    waiting.append(entry.path)


def bare_loop(paths: Iterable[str]) -> None:
    """Read, parse, number."""
    number_of = _Numbers().__getitem__
    ids, ends = array("I"), array("q", [0])
    for path in paths:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            content = os.read(handle, 16 * 1024)
        finally:
            os.close(handle)
        ids.extend(map(number_of, orjson.loads(content)["tags"]))
        ends.append(len(ids))


def measure_build(root: Path, paths: Sequence[str], scratch: Path, turns: int) -> Build:
    """Both loops, build and scan alone in turn, all in this process and its one thread, files in the page cache."""

    def build() -> None:
        open_index([root], scratch / "index", processes=1)

    def scan() -> None:
        scan_root(root, Problems(), with_sidecars=True, with_marks=False)

    actions: list[Callable[[], None]] = [lambda: bare_loop(paths), lambda: bare_loop(find_sidecars(root)), build, scan]
    clock: list[list[float]] = [[] for _ in actions]
    processor: list[list[float]] = [[] for _ in actions]
    bare_loop(paths)
    for _ in range(turns):
        for place, action in enumerate(actions):
            started, started_cpu = time.perf_counter(), time.process_time()
            action()
            clock[place].append(time.perf_counter() - started)
            processor[place].append(time.process_time() - started_cpu)
            shutil.rmtree(scratch / "index", ignore_errors=True)
    return Build(*clock, *processor)


def measure_memory(root: Path, scratch: Path) -> float:
    """Bytes a row by which the peak of a build grows with the number of rows: half of the files against a tenth."""
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    peaks: list[tuple[int, int]] = []
    for count in (max(1, len(folders) // 10), max(2, len(folders) // 2)):
        tracemalloc.start()
        index = open_index(folders[:count], scratch / "memory", processes=1)
        peaks.append((len(index), tracemalloc.get_traced_memory()[1]))
        tracemalloc.stop()
        shutil.rmtree(scratch / "memory")
    (few, low), (many, high) = peaks
    return (high - low) / (many - few)


def measure_bytes(root: Path, scratch: Path) -> tuple[float, float]:
    """(bytes a row of all columns, image headers included, beside the path arena; bytes a row of the arena)."""
    index = open_index([root], scratch / "sizes", headers=True, processes=1)
    arena = (index.path / "paths.npy").stat().st_size
    per_tag = (index.path / "tag_counts.npy").stat().st_size
    everything = sum(path.stat().st_size for path in index.path.rglob("*.npy"))
    shutil.rmtree(scratch / "sizes")
    return (everything - arena - per_tag) / len(index), arena / len(index)


def make_large_index(home: Path, num_rows: int) -> Path:
    """An index of made-up rows, written as arrays."""
    generator = np.random.default_rng(0)
    with Generation(home) as generation, RowWriter(generation.folder, with_marks=True) as rows:
        numbers = rows.tags.intern(f"tag_{number:05}" for number in range(NUM_TAGS))
        tags = numbers[generator.integers(0, NUM_TAGS, BLOCK_ROWS * TAGS_A_ROW)]
        for start in range(0, num_rows, BLOCK_ROWS):
            count = min(BLOCK_ROWS, num_rows - start)
            paths = "".join(f"{row // 1000:05}/some_picture_{row:08}.jpg" for row in range(start, start + count))
            rows.append(
                tags[: count * TAGS_A_ROW],
                np.full(count, TAGS_A_ROW, dtype=np.int32),
                np.frombuffer(paths.encode(), dtype=np.uint8),
                np.full(count, len(paths) // count, dtype=np.int32),
                image_ids=generator.integers(0, 1 << 63, count, dtype=np.uint64),
                ratings=np.ones(count, dtype=np.uint8),
                sidecar_sizes=np.full(count, 659, dtype=np.uint32),
                sidecar_mtimes=np.full(count, time.time_ns(), dtype=np.int64),
            )
        facts = {"roots": [str(home)], "root_starts": [0], "extra_fields": [], "annotations": None}
        return finish_index(generation, rows, Problems(), "made", facts)


@dataclass(frozen=True)
class Reopen:
    """Seconds to open an index, to ask it what a start asks and to verify every byte; the memory of the first two."""

    num_rows: int
    load_s: float
    start_s: float
    verify_s: float
    rss_mb: float


def measure_reopen(scratch: Path, num_rows: int, turns: int) -> Reopen:
    """Make a large index, open it again and again, and count what a process grows by."""
    path = make_large_index(scratch / "large", num_rows)
    process = psutil.Process()
    before = process.memory_info().rss
    load_s: list[float] = []
    start_s: list[float] = []
    verify_s: list[float] = []
    for _ in range(turns):
        started = time.perf_counter()
        index = MetadataIndex.load(path)
        load_s.append(time.perf_counter() - started)
        index.tag_counts()
        index.rating_counts()
        index.report()
        index.record(num_rows // 2)
        start_s.append(time.perf_counter() - started)
    grown = process.memory_info().rss - before
    for _ in range(turns):
        index = MetadataIndex.load(path)
        started = time.perf_counter()
        index.verify()
        verify_s.append(time.perf_counter() - started)
    shutil.rmtree(scratch / "large")
    load, start, verify = (statistics.median(times) for times in (load_s, start_s, verify_s))
    return Reopen(num_rows, load, start, verify, grown / 1e6)


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints a table and writes the figures where asked to."""
    parser = Parser(
        prog="python -m scripts.benchmark_index",
        description="Measure the metadata index: building it, reopening it, bytes a row.",
        epilog="example: python -m scripts.benchmark_index --files 20000 --rows 1000000 --output index.json",
    )
    parser.add_argument(
        "--files", type=whole(2 * FILES_A_FOLDER), default=100_000, help="sidecars to build from (default: %(default)s)"
    )
    parser.add_argument(
        "--rows", type=whole(), default=10_000_000, help="rows of the reopened index (default: %(default)s)"
    )
    parser.add_argument("--turns", type=whole(), default=5, help="turns of each kind (default: %(default)s)")
    parser.add_argument(
        "--folder",
        type=input_folder,
        metavar="DIR",
        help="where to put 2 GB for a minute; a disk in memory, such as /dev/shm, is quickest",
    )
    parser.add_argument("--output", type=output_file, metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args(arguments)
    console = Console()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        scratch = Path(name)
        root = scratch / "set"
        console.print(f"writing {options.files:,} sidecars ...")
        paths = make_files(root, options.files)
        console.print("building ...")
        build = measure_build(root, paths, scratch, options.turns)
        columns, arena = measure_bytes(root, scratch)
        memory = measure_memory(root, scratch)
        shutil.rmtree(root)
        console.print(f"reopening {options.rows:,} rows ...")
        reopen = measure_reopen(scratch, options.rows, options.turns)
    table = Table("figure", "value", title="metadata index", title_justify="left")
    bare = statistics.median(build.bare_cpu_s)
    rows = (
        ("bare loop, rows a CPU second", f"{options.files / bare:,.0f}"),
        ("index build, rows a CPU second", f"{options.files / statistics.median(build.build_cpu_s):,.0f}"),
        ("build / bare loop given the paths, per CPU second", f"{build.ratio:.2f}"),
        ("build / bare loop, by the clock, one process", f"{build.clock_ratio:.2f}"),
        ("... of the build without finding the files, per CPU second", f"{build.ratio_without_scan:.2f}"),
        ("build / bare loop that finds its files, per CPU second", f"{build.finding_ratio:.2f}"),
        ("columns, bytes a row beside the path arena", f"{columns:.1f}"),
        ("path arena, bytes a row", f"{arena:.1f}"),
        ("memory of a build, bytes a row", f"{memory:.0f}"),
        (f"opening {reopen.num_rows:,} rows, ms", f"{1000 * reopen.load_s:.1f}"),
        ("... and what a start asks of it, ms", f"{1000 * reopen.start_s:.1f}"),
        ("... memory of the process for that, MB", f"{reopen.rss_mb:.1f}"),
        ("... checking every byte of it, once a start, ms", f"{1000 * reopen.verify_s:.1f}"),
    )
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if options.output is not None:
        figures = {
            "ratio": build.ratio,
            "finding_ratio": build.finding_ratio,
            "clock_ratio": build.clock_ratio,
            "ratio_without_scan": build.ratio_without_scan,
            "build": asdict(build),
            "column_bytes_a_row": columns,
            "arena_bytes_a_row": arena,
            "memory_bytes_a_row": memory,
            "reopen": asdict(reopen),
        }
        write_json(options.output, {"format_version": 1, "num_files": options.files, **figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
