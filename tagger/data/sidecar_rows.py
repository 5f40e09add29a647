"""Many sidecars at once: read, parsed, and turned into flat arrays of tag numbers.

The hot loop of an index build. It handles what nearly every sidecar looks like with a handful of C calls and leaves the
rest, and everything that is wrong, to `parse_sidecar`; a property test holds the two to the same rows.
"""

import contextlib
import os
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from types import TracebackType

import numpy as np
import orjson
from numpy.typing import NDArray

from tagger.data.pairs import NO_MARK, as_column
from tagger.data.scan import TRANSIENT_ERRORS, DatasetError, printable
from tagger.data.sidecar import (
    MAX_SIDECAR_BYTES,
    RATINGS,
    ExtraField,
    SidecarError,
    clean_tag,
    is_rating_tag,
    parse_sidecar,
    read_rating,
    refuse_repeated_keys,
    split_tags,
    too_large,
)

_READ_THREADS = 16
# Few enough to be parsed while they are still in the processor's cache.
_PART_FILES = 64
_SLOW_PART_FILES = 16
# A read from the page cache takes about 5 us and gains nothing from threads; one that waits for a disk or a network
# does.
_SLOW_READ_S = 1e-4
_JUDGED_PARTS = 8
_THREADED_FILES = 4096
_RETRY_WAITS_S = (0.1, 0.5, 2.0)
# A pipe that has taken the place of a file must not hang the build, hence O_NONBLOCK; it changes nothing for files.
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)

RATING_CODES: dict[str | None, int] = {None: 0, **{rating: code for code, rating in enumerate(RATINGS, 1)}}

Content = bytes | SidecarError | OSError


@dataclass(frozen=True)
class ReadFiles:
    """Contents of files, or why there is none, with their marks: sizes in bytes (-1: none), mtimes in ns."""

    contents: list[Content]
    sizes: list[int]
    mtimes: list[int]


@dataclass(frozen=True)
class ParsedSidecars:
    """What N sidecars say, in their order.

    tag_ids: uint32 [T], numbers of the parser that made this; `new_tags` are the names of those that it gives out for
    the first time. counts: int32 [N], tags of each; 0 for a sidecar that gives no row. ratings: uint8 [N],
    RATING_CODES. image_ids: uint64 [N], `stable_id` of the stems. sizes, mtimes: int64 [N], the marks. notes: (place,
    kind, text) of what is wrong, kind one of "rejected", "unreadable", "rating".
    """

    tag_ids: NDArray[np.uint32]
    counts: NDArray[np.int32]
    ratings: NDArray[np.uint8]
    image_ids: NDArray[np.uint64]
    sizes: NDArray[np.int64]
    mtimes: NDArray[np.int64]
    new_tags: list[str]
    notes: list[tuple[int, str, str]]


class SidecarParser:
    """Parses sidecars; keeps its numbering of tags from call to call. For one thread."""

    def __init__(self, extra_fields: Sequence[ExtraField] = ()) -> None:
        self._fields = tuple(extra_fields)
        self._numbers: dict[str, int] = {}
        self._known = _RawTags(self._numbers)
        self._extra = [(field.name, _RawTags(self._numbers, f"{field.prefix}:")) for field in extra_fields]
        self._ratings = _RawRatings(RATING_CODES.items())
        self._finder = _RepeatFinder()
        self._reader = FileReader()

    def close(self) -> None:
        """End the threads that read."""
        self._reader.close()

    def parse(self, root: str, sidecars: Sequence[str]) -> ParsedSidecars:
        """Read and parse files below a folder, given by their POSIX paths.

        Raises DatasetError when storage keeps failing: an outage must not leave images out.
        """
        num_known = len(self._numbers)
        rows = _Rows()
        for files in self._reader.read(root, sidecars):
            self._parse_part(files.contents, rows)
            rows.sizes.extend(files.sizes)
            rows.mtimes.extend(files.mtimes)
        numbers = np.array(rows.ids, dtype=np.uint32)
        counts = np.array(rows.counts, dtype=np.int32)
        numbers, counts = self._finder.without_repeats(numbers, counts, len(self._numbers))
        return ParsedSidecars(
            numbers,
            counts,
            np.frombuffer(rows.ratings, dtype=np.uint8),
            stem_ids(sidecars),
            np.array(rows.sizes, dtype=np.int64),
            np.array(as_column(rows.mtimes), dtype=np.int64),
            list(islice(self._numbers, num_known, None)) if len(self._numbers) != num_known else [],
            rows.notes,
        )

    def _parse_part(self, contents: list[Content], rows: "_Rows") -> None:
        # One file after the other: what a file leaves behind in memory is still in the processor's cache for the next.
        take, take_rating, take_count = rows.ids.fromlist, rows.ratings.append, rows.counts.append
        known, codes, loads = self._known.__getitem__, self._ratings.__getitem__, orjson.loads
        extra = self._extra
        for content in contents:
            try:
                entry = loads(content)  # type: ignore[arg-type]
                tags = entry["tags"]
                ids = [*map(known, tags if type(tags) is list else split_tags(tags))]
                if extra:
                    self._add_extra(entry, ids)
                rating = codes(entry.get("rating"))
                # As many colons as keys? Taking them out counts them in three fifths of the time of count().
                if len(content) - len(content.replace(b":", b"")) != len(entry):  # type: ignore[union-attr,arg-type]
                    refuse_repeated_keys(content, entry)  # type: ignore[arg-type]
                if not ids:
                    raise _Unusual
            except (ValueError, TypeError, KeyError, AttributeError):
                # orjson's and the sidecar's own errors are ValueErrors; the others say that this one is unusual.
                ids, rating = self._parse_unusual(content, rows)
            take(ids)
            take_rating(rating)
            take_count(len(ids))

    def _add_extra(self, entry: dict[str, object], ids: list[int]) -> None:
        for name, known in self._extra:
            value = entry.get(name)
            if isinstance(value, str):
                value = split_tags(value, by_space=False)
            if value is not None:
                if not isinstance(value, list):
                    raise _Unusual
                ids.extend(map(known.__getitem__, value))

    def _parse_unusual(self, content: Content, rows: "_Rows") -> tuple[list[int], int]:
        """The tags and the rating of one file; none, and a note, where it gives no row."""
        place = len(rows.ratings)
        try:
            if isinstance(content, SidecarError):
                raise content
            if isinstance(content, OSError):
                rows.notes.append((place, "unreadable", content.strerror or type(content).__name__))
                return [], 0
            parsed = parse_sidecar(content, self._fields)
        except SidecarError as error:
            rows.notes.append((place, "rejected", error.reason))
            return [], 0
        if parsed.bad_rating is not None:
            rows.notes.append((place, "rating", parsed.bad_rating))
        numbers = self._numbers
        return [numbers.setdefault(tag, len(numbers)) for tag in parsed.tags], RATING_CODES[parsed.rating]


class _Rows:
    """What one call of `parse` gathers."""

    def __init__(self) -> None:
        self.ids = array("I")
        self.counts = array("i")
        self.ratings = bytearray()
        self.sizes: list[int] = []
        self.mtimes: list[int] = []
        self.notes: list[tuple[int, str, str]] = []


class _Unusual(ValueError):
    """A sidecar that the hot loop leaves to `parse_sidecar`."""


class _RawTags(dict[str, int]):
    """Number of each text that stands for a tag, as the files have it: cleaning a tag costs once, not in every file."""

    def __init__(self, numbers: dict[str, int], prefix: str = "") -> None:
        super().__init__()
        self._numbers = numbers
        self._prefix = prefix

    def __missing__(self, raw: str) -> int:
        if type(raw) is not str:
            raise _Unusual
        tag = clean_tag(raw)
        if not tag or (not self._prefix and is_rating_tag(tag)):
            raise _Unusual
        number = self[raw] = self._numbers.setdefault(self._prefix + tag, len(self._numbers))
        return number


class _RawRatings(dict[object, int]):
    """Code of each rating that is understood. Numbers are not kept: true would be found as 1."""

    def __missing__(self, value: object) -> int:
        rating, bad = read_rating(value)
        if bad is not None:
            raise _Unusual
        code = RATING_CODES[rating]
        if isinstance(value, str):
            self[value] = code
        return code


class _RepeatFinder:
    """Takes out the second of equal tags in a row, at a fifth of what a set a row costs."""

    _ROWS = 128
    _SLOTS = 1 << 22

    def __init__(self) -> None:
        self._last: NDArray[np.int32] | None = None

    def without_repeats(
        self, ids: NDArray[np.uint32], counts: NDArray[np.int32], num_tags: int
    ) -> tuple[NDArray[np.uint32], NDArray[np.int32]]:
        """(ids, counts) with the first of equal tags of each row alone."""
        if self._last is None:
            self._last = np.zeros(self._SLOTS, dtype=np.int32)
        ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        # Each (row, tag) writes where it stands to its slot: what it finds there then is itself, or, rarely, a tag of
        # another row with the same slot, or a repeat.
        slots = np.repeat(np.arange(len(counts)) % self._ROWS * num_tags, counts)
        slots += ids
        slots &= self._SLOTS - 1
        places = np.arange(len(ids), dtype=np.int32)
        repeated: list[int] = []
        for first in range(0, len(counts), self._ROWS):
            part = slice(ends[first], ends[min(first + self._ROWS, len(counts))])
            self._last[slots[part]] = places[part]
            lost = self._last.take(slots[part]) != places[part]
            if lost.any():
                suspects = np.unique(np.searchsorted(ends, ends[first] + np.flatnonzero(lost), side="right") - 1)
                for row in suspects.tolist():
                    tags = ids[ends[row] : ends[row + 1]].tolist()
                    if len(frozenset(tags)) != len(tags):
                        repeated.append(row)
        if not repeated:
            return ids, counts
        kept = np.ones(len(ids), dtype=np.bool_)
        counts = counts.copy()
        for row in repeated:
            seen: set[int] = set()
            for place, tag in enumerate(ids[ends[row] : ends[row + 1]].tolist(), int(ends[row])):
                kept[place] = tag not in seen
                seen.add(tag)
            counts[row] = len(seen)
        return ids[kept], counts


class FileReader:
    """Reads small files: in this thread while the storage answers at once, in several while it makes us wait."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._recent: deque[bool] = deque([False] * _JUDGED_PARTS, _JUDGED_PARTS)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def read(self, root: str, paths: Sequence[str]) -> Iterator[ReadFiles]:
        """Contents of the files at POSIX paths below `root`, part by part; DatasetError when storage keeps failing.

        A file larger than the largest sidecar is not read.
        """
        position = 0
        with _Folder(root) as folder:
            while position < len(paths):
                size = _SLOW_PART_FILES if self._recent[-1] else _PART_FILES
                part = paths[position : position + size]
                started = time.perf_counter()
                files = _read_part(root, part, folder)
                self._recent.append(time.perf_counter() - started > _SLOW_READ_S * len(part))
                position += len(part)
                yield files
                # Most of the latest parts: a busy machine holds up a few of them, slow storage all.
                if 2 * sum(self._recent) > _JUDGED_PARTS:
                    yield from self._read_in_threads(root, paths[position : position + _THREADED_FILES])
                    position += _THREADED_FILES

    def _read_in_threads(self, root: str, paths: Sequence[str]) -> Iterator[ReadFiles]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="read-sidecars")
        parts = [paths[start : start + _SLOW_PART_FILES] for start in range(0, len(paths), _SLOW_PART_FILES)]
        yield from self._pool.map(lambda part: _read_part(root, part), parts)


class _Folder:
    """The folder that files are read from, kept open: the system looks up a name instead of a path.

    Without it where the system cannot do that (Windows) or the folder cannot be opened.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._prefix: str | None = None
        self.handle: int | None = None

    def __enter__(self) -> "_Folder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def names(self, paths: Sequence[str]) -> Sequence[str] | None:
        """Names in the open folder of paths that all lie in one; None where they do not, or it cannot be opened."""
        prefix = paths[0][: paths[0].rfind("/") + 1]
        names = [path.removeprefix(prefix) for path in paths]
        if len("".join(paths)) - len(text := "".join(names)) != len(prefix) * len(paths) or "/" in text:
            return None
        if prefix != self._prefix:
            self._close()
            self._prefix = prefix
            if os.open in os.supports_dir_fd:
                with contextlib.suppress(OSError):
                    self.handle = os.open(f"{self._root}/{prefix}", os.O_RDONLY)
        return None if self.handle is None else names

    def _close(self) -> None:
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None


def stem_ids(paths: Sequence[str]) -> NDArray[np.uint64]:
    """uint64 [N]: `stable_id` of the stem of each POSIX path."""
    # One encoding for all: file names hold no NUL.
    stems = "\0".join([path[path.rfind("/") + 1 : path.rfind(".")] for path in paths])
    encoded = stems.encode("utf-8", "surrogatepass").split(b"\0") if paths else []
    digests: list[bytes] = []
    fresh = blake2b(digest_size=8).copy
    for stem in encoded:
        one = fresh()
        one.update(stem)
        digests.append(one.digest())
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def _read_part(root: str, paths: Sequence[str], folder: _Folder | None = None) -> ReadFiles:
    """Read files one after the other, by their names in an open folder if that can be."""
    names = folder.names(paths) if folder is not None else None
    handle = folder.handle if folder is not None and names is not None else None
    files = ReadFiles([], [], [])
    take, take_size, take_mtime = files.contents.append, files.sizes.append, files.mtimes.append
    for name in names if names is not None else [f"{root}/{path}" for path in paths]:
        try:
            content, size, mtime_ns = _read_once(name, handle)
        except OSError:
            content, size, mtime_ns = _read_again(f"{root}/{paths[len(files.contents)]}")
        take(content)
        take_size(size)
        take_mtime(mtime_ns)
    return files


def _read_once(path: str, folder: int | None = None) -> tuple[Content, int, int]:
    """(content, size, mtime_ns). Twice as fast as open(). The mark is older than the content: no change is missed."""
    handle = os.open(path, _FLAGS, dir_fd=folder)
    try:
        facts = os.fstat(handle)
        size = facts.st_size
        if size > MAX_SIDECAR_BYTES:
            return too_large(), size, facts.st_mtime_ns
        content = os.read(handle, size + 1)
        if len(content) != size:
            content = _read_rest(handle, content)
        return content, size, facts.st_mtime_ns
    finally:
        os.close(handle)


def _read_rest(handle: int, content: bytes) -> bytes:
    """The whole of a file that grows, or that a network gives in pieces (at most one byte over the limit)."""
    parts = [content]
    left = MAX_SIDECAR_BYTES + 1 - len(content)
    while left > 0 and (part := os.read(handle, left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _read_again(path: str) -> tuple[Content, int, int]:
    """What a file that could not be read at first has in store: patience for storage, an error for the rest."""
    for wait_s in (*_RETRY_WAITS_S, None):
        try:
            return _read_once(path)
        except OSError as error:
            if error.errno not in TRANSIENT_ERRORS:
                return error, *NO_MARK
            if wait_s is None:
                raise DatasetError(
                    f"data.roots: cannot read {printable(path)}: {error.strerror}; check the disk and start again"
                ) from error
            time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")
