"""The rows of an index, from sidecars or an annotation file, and the arrays that hold them on disk.

A row costs bytes in a few growing buffers, never a Python object that stays. Rows keep the order in which they are
added, and tags are numbered as they first occur, so the same files give the same index everywhere.
"""

import itertools
import os
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tagger.data.scan import TRANSIENT_ERRORS, DatasetError, FolderScan, Problems, printable
from tagger.data.sidecar import MAX_SIDECAR_BYTES, RATINGS, ExtraField, SidecarError, parse_sidecar

_READ_BYTES = 16 * 1024
_CHUNK_FILES = 256
_READ_THREADS = 16
# A read from the page cache takes about 5 us and gains nothing from threads; one that waits for a disk or a network
# does.
_SLOW_READ_S = 1e-4
_RETRY_WAITS_S = (0.1, 0.5, 2.0)
_RATING_CODES: dict[str | None, int] = {None: 0, **{rating: code for code, rating in enumerate(RATINGS, 1)}}


class RowBuffer:
    """Rows as they are added; `arrays()` gives them as the index stores them."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._tags = _TagNumbers()
        self._tag_ids = array("I")
        self._tag_ends = array("q", [0])
        self._paths = bytearray()
        self._path_ends = array("q", [0])
        self._image_ids = bytearray()
        self._ratings = bytearray()

    @property
    def tag_names(self) -> tuple[str, ...]:
        """Every tag met so far, in the order of its number."""
        return tuple(self._tags)

    def add(self, path: str, tags: Iterable[str], rating: str | None) -> None:
        """Append a row: the POSIX path of its image below the root, distinct tags, a rating of RATINGS or None."""
        self._tag_ids.extend(map(self._tags.__getitem__, tags))
        self._tag_ends.append(len(self._tag_ids))
        encoded = path.encode("utf-8", "surrogatepass")
        self._paths += encoded
        self._path_ends.append(len(self._paths))
        stem = encoded[encoded.rfind(b"/") + 1 : encoded.rfind(b".")]
        self._image_ids += blake2b(stem, digest_size=8).digest()  # rng.stable_id of the stem
        self._ratings.append(_RATING_CODES[rating])
        self.num_rows += 1

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """The columns by file name (without `.npy`)."""
        small = len(self._tags) <= np.iinfo(np.uint16).max + 1
        return {
            "tag_ids": np.array(self._tag_ids, dtype=np.uint16 if small else np.uint32),
            "tag_offsets": np.array(self._tag_ends, dtype=np.int64),
            "paths": np.frombuffer(self._paths, dtype=np.uint8),
            "path_offsets": np.array(self._path_ends, dtype=np.int64),
            "image_ids": np.frombuffer(self._image_ids, dtype="<u8").astype(np.uint64),
            "ratings": np.frombuffer(self._ratings, dtype=np.uint8),
        }


class _TagNumbers(dict[str, int]):
    """Numbers a tag at the first look-up, so that the hot loop is one C call a row."""

    def __missing__(self, tag: str) -> int:
        number = self[tag] = len(self)
        return number


def add_sidecar_rows(scan: FolderScan, extra_fields: Sequence[ExtraField], rows: RowBuffer, problems: Problems) -> None:
    """Read and parse the sidecars of a root in order; what cannot be used becomes a problem."""
    prefix = f"{scan.root}/"
    contents = read_files([prefix + sidecar for _, sidecar in scan.pairs])
    for (image, sidecar), content in zip(scan.pairs, contents, strict=True):
        if isinstance(content, OSError):
            problems.reject_unreadable(scan.root / sidecar, content)
            continue
        try:
            parsed = parse_sidecar(content, extra_fields)
        except SidecarError as error:
            problems.reject(scan.root / sidecar, error.reason)
            continue
        if parsed.bad_rating is not None:
            problems.note_rating(scan.root / sidecar, parsed)
        rows.add(image, parsed.tags, parsed.rating)


def read_files(paths: Sequence[str]) -> Iterator[bytes | OSError]:
    """Contents of files (at most one byte over the largest sidecar), or why there is none, in the order of `paths`.

    Reads in this thread while the storage answers at once, in several when it makes us wait. Raises DatasetError when
    storage keeps failing: an outage must not leave images out.
    """
    position, slow = 0, False
    while position < len(paths) and not slow:
        chunk = paths[position : position + _CHUNK_FILES]
        started = time.perf_counter()
        contents = _read_chunk(chunk)
        slow = time.perf_counter() - started > _SLOW_READ_S * len(chunk)
        position += len(chunk)
        yield from contents
    if position < len(paths):
        yield from _read_in_threads(paths[position:])


def _read_in_threads(paths: Sequence[str]) -> Iterator[bytes | OSError]:
    size = max(1, _CHUNK_FILES // _READ_THREADS)
    chunks = (paths[start : start + size] for start in range(0, len(paths), size))
    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="read-sidecars") as pool:
        pending: deque[Future[list[bytes | OSError]]] = deque(
            pool.submit(_read_chunk, chunk) for chunk in itertools.islice(chunks, 2 * _READ_THREADS)
        )
        while pending:
            contents = pending.popleft().result()
            pending.extend(pool.submit(_read_chunk, chunk) for chunk in itertools.islice(chunks, 1))
            yield from contents


def _read_chunk(paths: Sequence[str]) -> list[bytes | OSError]:
    return [_read_file(path) for path in paths]


def _read_file(path: str) -> bytes | OSError:
    for wait_s in (*_RETRY_WAITS_S, None):
        try:
            return _read_once(path)
        except OSError as error:
            if error.errno not in TRANSIENT_ERRORS:
                return error
            if wait_s is None:
                raise DatasetError(
                    f"data.roots: cannot read {printable(path)}: {error.strerror}; check the disk and start again"
                ) from error
            time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def _read_once(path: str) -> bytes:
    # Twice as fast as open(): no buffer object, no fstat.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        content = os.read(handle, _READ_BYTES)
        if len(content) < _READ_BYTES:
            return content
        parts = [content]
        size = len(content)
        while size <= MAX_SIDECAR_BYTES and (part := os.read(handle, MAX_SIDECAR_BYTES + 1 - size)):
            parts.append(part)
            size += len(part)
        return b"".join(parts)
    finally:
        os.close(handle)


def write_arrays(folder: Path, arrays: dict[str, NDArray[np.generic]]) -> dict[str, int]:
    """Write columns as `.npy` files that reach the disk before this returns; gives their sizes in bytes by name."""
    sizes: dict[str, int] = {}
    for name, values in arrays.items():
        path = folder / f"{name}.npy"
        with path.open("wb") as stream:
            np.save(stream, values, allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
            sizes[path.name] = stream.tell()
    return sizes
