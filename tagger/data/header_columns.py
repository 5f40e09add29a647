"""The headers of all images of an index as columns: read by several threads, and again only where a file has changed.

They stand in a folder of their own inside that of the index, because images change without their sidecars. A broken or
missing image has width and height 0 and is listed with its reason; nothing here stops for one.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagger.data.columns import open_column, write_column
from tagger.data.generations import Generation, clean_up, newest_first
from tagger.data.headers import FileHeader, read_header
from tagger.data.manifest import read_manifest, verify_files, write_manifest
from tagger.data.pairs import as_int64
from tagger.files import FormatError, read_json

FORMAT_VERSION = 2
_BROKEN = "broken.json"
_COLUMNS = ("widths", "heights", "file_sizes", "file_mtimes")
_CHUNK_ROWS = 512
_NUM_THREADS = 16
# The time of a file that nobody has looked at: no file has it.
_NEVER = np.iinfo(np.int64).min

_log = logging.getLogger(__name__)

PathsOf = Callable[[range], Sequence[Path]]


@dataclass(frozen=True)
class ImageHeaders:
    """Columns over the rows of an index, memory-mapped and read-only.

    widths, heights: uint16 or uint32 [N], pixels of the upright image, 0 x 0 where there are none. file_sizes: uint32
    or uint64 [N], bytes; file_mtimes: int64 [N], ns.
    """

    path: Path
    widths: NDArray[np.unsignedinteger]
    heights: NDArray[np.unsignedinteger]
    file_sizes: NDArray[np.unsignedinteger]
    file_mtimes: NDArray[np.int64]
    num_broken: int

    @classmethod
    def load(cls, path: Path) -> "ImageHeaders":
        """Open the headers in a folder; raises FormatError when their sizes are wrong or they are newer."""
        meta = read_manifest(path, "image headers", FORMAT_VERSION)
        columns = {name: open_column(path / f"{name}.npy") for name in _COLUMNS}
        return cls(path, **columns, num_broken=meta["num_broken"])

    @cached_property
    def broken(self) -> dict[int, str]:
        """Why a row has no size, by row; a reason reads "kind: detail"."""
        content = read_json(self.path / _BROKEN, "image headers", FORMAT_VERSION)
        return {int(row): reason for row, reason in content["broken"]}

    def sizes(self) -> NDArray[np.uint32]:
        """uint32 [N, 2]: (width, height) of each image, 0 where unknown, which is logged."""
        sizes = np.stack([self.widths, self.heights], axis=1).astype(np.uint32)
        if num_unknown := int((sizes == 0).any(axis=1).sum()):
            message = "the size of %d of %d images is not known; they are batched with the square ones"
            _log.warning(message, num_unknown, len(sizes))
        return sizes


@dataclass
class _Columns:
    """Headers in the making, in plain arrays."""

    widths: NDArray[np.uint32]
    heights: NDArray[np.uint32]
    file_sizes: NDArray[np.uint64]
    file_mtimes: NDArray[np.int64]
    broken: dict[int, str]

    @classmethod
    def empty(cls, num_rows: int) -> "_Columns":
        widths, heights = np.zeros(num_rows, dtype=np.uint32), np.zeros(num_rows, dtype=np.uint32)
        file_sizes = np.zeros(num_rows, dtype=np.uint64)
        return cls(widths, heights, file_sizes, np.full(num_rows, _NEVER, dtype=np.int64), {})

    def take(self, rows: NDArray[np.int64], old: ImageHeaders, old_rows: NDArray[np.int64]) -> None:
        """Copy `rows` from other headers."""
        for name in _COLUMNS:
            getattr(self, name)[rows] = getattr(old, name)[old_rows]
        if old.broken:
            known = old.broken
            for place in np.flatnonzero(np.isin(old_rows, np.array(list(known), dtype=np.int64))).tolist():
                self.broken[int(rows[place])] = known[int(old_rows[place])]

    def set(self, row: int, header: FileHeader) -> bool:
        """Put in what was read; False when a file that could not be read then cannot now."""
        if header.mtime_ns == _NEVER == self.file_mtimes[row] and self.broken.get(row) == header.reason:
            return False
        self.widths[row], self.heights[row] = header.width, header.height
        self.file_sizes[row] = header.file_size
        self.file_mtimes[row] = as_int64(header.mtime_ns)
        self.broken.pop(row, None)
        if header.reason is not None:
            self.broken[row] = header.reason
        return True


def newest_headers(folder: Path) -> ImageHeaders | None:
    """The latest headers that stand in the folder of an index; of some rows they may know nothing yet."""
    for path in newest_first(folder):
        try:
            found = ImageHeaders.load(path)
            verify_files(path, read_manifest(path, "image headers", FORMAT_VERSION)["files"], "image headers")
            return found
        except FormatError as error:
            _log.warning("%s; reading them anew", error)
    return None


def carry_headers(old: ImageHeaders, sources: NDArray[np.int64], folder: Path) -> None:
    """Write into the folder of a new index what headers of an older one are still of its rows.

    sources: int64 [N], the old row that each row is, or -1.
    """
    columns = _Columns.empty(len(sources))
    rows = np.flatnonzero(sources >= 0)
    columns.take(rows, old, sources[rows])
    _write(columns, folder)


def read_headers(
    folder: Path, num_rows: int, paths_of: PathsOf, progress: Callable[[int, int], None] | None = None
) -> ImageHeaders:
    """The headers of all rows, those in `folder` where the files are as they were then, the others read now.

    paths_of: a range of rows -> the paths of their images. progress: told how many of how many rows are done. Raises
    DatasetError when the folder cannot be written.
    """
    old = newest_headers(folder)
    columns = _Columns.empty(num_rows)
    if old is not None:
        every = np.arange(num_rows)
        columns.take(every, old, every)
    num_read = num_news = 0
    chunks = deque(range(start, min(start + _CHUNK_ROWS, num_rows)) for start in range(0, num_rows, _CHUNK_ROWS))
    waiting: deque[tuple[range, Future[list[tuple[int, FileHeader]]]]] = deque()
    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="read-headers") as pool:
        try:
            while chunks or waiting:
                while chunks and len(waiting) < 2 * _NUM_THREADS:
                    rows = chunks.popleft()
                    marks = columns.file_sizes[rows.start : rows.stop], columns.file_mtimes[rows.start : rows.stop]
                    waiting.append((rows, pool.submit(_read_rows, rows, paths_of, *marks)))
                rows, work = waiting.popleft()
                for row, header in work.result():
                    num_news += columns.set(row, header)
                    num_read += 1
                if progress is not None:
                    progress(rows.stop, num_rows)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    kept = num_rows - num_read
    _log.info("headers: %s read, %s kept; %s broken", f"{num_read:,}", f"{kept:,}", f"{len(columns.broken):,}")
    if old is not None and not num_news:
        return old
    path = _write(columns, folder)
    clean_up(folder, path)
    return ImageHeaders.load(path)


def _read_rows(
    rows: range, paths_of: PathsOf, sizes: NDArray[np.uint64], mtimes: NDArray[np.int64]
) -> list[tuple[int, FileHeader]]:
    """(row, header) of those rows whose files are not as the marks say."""
    found: list[tuple[int, FileHeader]] = []
    for row, path, size, mtime_ns in zip(rows, paths_of(rows), sizes.tolist(), mtimes.tolist(), strict=True):
        try:
            facts = path.stat()
            if facts.st_size == size and as_int64(facts.st_mtime_ns) == mtime_ns:
                continue
            found.append((row, read_header(path)))
        except (OSError, MemoryError) as error:
            # Looked for again at the next start, whatever was wrong with it.
            text = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
            found.append((row, FileHeader(0, 0, 0, _NEVER, f"unreadable: {text}")))
    return found


def _write(columns: _Columns, folder: Path) -> Path:
    side = np.uint16 if max(columns.widths.max(initial=0), columns.heights.max(initial=0)) < 1 << 16 else np.uint32
    size = np.uint32 if columns.file_sizes.max(initial=0) < 1 << 32 else np.uint64
    arrays: dict[str, NDArray[Any]] = {
        "widths": columns.widths.astype(side),
        "heights": columns.heights.astype(side),
        "file_sizes": columns.file_sizes.astype(size),
        "file_mtimes": columns.file_mtimes,
    }
    with Generation(folder) as generation:
        sizes = {f"{name}.npy": write_column(generation.folder / f"{name}.npy", arrays[name]) for name in _COLUMNS}
        broken = [[row, reason] for row, reason in sorted(columns.broken.items())]
        sizes[_BROKEN] = generation.write_json(_BROKEN, {"format_version": FORMAT_VERSION, "broken": broken})
        meta = {"format_version": FORMAT_VERSION, "num_rows": len(columns.widths), "num_broken": len(broken)}
        write_manifest(generation.folder, sizes, meta)
        return generation.commit("headers")
