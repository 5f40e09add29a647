"""The perceptual hashes of a data set's images: computed once, in threads, and kept beside the index.

An image is read again when its path, size or time has changed, or when the way of hashing has. What an interruption
leaves is kept. The file is a cache: a damaged one is made anew, one of a newer program is refused by name. Images that
cannot be decoded have no hash but a reason; missing and unreadable ones are looked at again the next time.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import orjson
from numpy.typing import NDArray

from tagger.data.decode import DecodeError, RefusedImage
from tagger.data.index import MetadataIndex
from tagger.data.parallel import map_blocks
from tagger.data.phash import METHOD_VERSION, grey_thumbnail, perceptual_hashes
from tagger.data.prefetch import default_num_threads
from tagger.data.quarantine import read_image_file, retry_transient
from tagger.files import FormatError, write_atomic
from tagger.rng import stable_id

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
FILE_NAME = "perceptual-hashes.npz"
_BLOCK_ROWS = 32
_SAVE_EVERY_S = 120.0
_SAY_EVERY_S = 30.0

Progress = Callable[[int, int], None]

# States of a row; those from _FIRST_REASON on are refusals, by their place in the list of reasons.
_UNKNOWN, _HASHED, _PLAIN, _FIRST_REASON = 0, 1, 2, 3


@dataclass
class ImageHashes:
    """hashes: uint64 [N, 2], of rows where `usable`, bool [N]; others were refused or are too plain to tell apart.

    refused: reason -> rows, of images that could not be decoded or read.
    """

    hashes: NDArray[np.uint64]
    usable: NDArray[np.bool_]
    refused: dict[str, list[int]]


def image_hashes(
    index: MetadataIndex, *, max_pixels: int, num_threads: int | None = None, progress: Progress | None = None
) -> ImageHashes:
    """The hash of every image of an index, from the cache where it is known.

    progress: called with (done, all) now and then. Raises StorageError where the storage does not recover.
    """
    work = _Hashing(index, max_pixels, progress)
    missing = np.flatnonzero(work.states == _UNKNOWN)
    if missing.size:
        logger.info("perceptual hashes: %d of %d images are read", len(missing), len(index))
        work.run(missing, num_threads or default_num_threads())
    refused = {
        reason: np.flatnonzero(work.states == _FIRST_REASON + number).tolist()
        for number, reason in enumerate(work.reasons)
    }
    return ImageHashes(work.hashes, work.states == _HASHED, {reason: rows for reason, rows in refused.items() if rows})


class _Hashing:
    """Hashes and states of the rows of an index in the making."""

    def __init__(self, index: MetadataIndex, max_pixels: int, progress: Progress | None) -> None:
        self._index = index
        self._max_pixels = max_pixels
        self._progress = progress
        self._path = index.path.parent / FILE_NAME
        self._stop = threading.Event()
        self.reasons: list[str] = []
        self._lasting: set[str] = set()  # reasons that lie in the bytes, and hold for as long as these do
        self.hashes = np.zeros((len(index), 2), dtype=np.uint64)
        self.states = np.full(len(index), _UNKNOWN, dtype=np.uint8)
        self._marks = np.array([_mark(index.image_path(row)) for row in range(len(index))], dtype=np.uint64)
        self._use(_load(self._path))

    def _use(self, known: "_Known | None") -> None:
        if known is None or not len(known.marks):
            return
        places = np.minimum(np.searchsorted(known.marks, self._marks), len(known.marks) - 1)
        found = (known.marks[places] == self._marks) & (self._marks != 0)
        self.hashes[found] = known.hashes[places[found]]
        self.states[found] = known.states[places[found]]
        self.reasons = known.reasons
        self._lasting = set(known.reasons)

    def run(self, rows: NDArray[np.int64], num_threads: int) -> None:
        said = saved = time.monotonic()

        def thumbnails(items: range) -> list[NDArray[np.uint8] | RefusedImage]:
            return [self._thumbnail(self._index.image_path(int(row))) for row in rows[items.start : items.stop]]

        with closing(map_blocks(thumbnails, len(rows), block=_BLOCK_ROWS, num_threads=num_threads)) as blocks:
            try:
                for items, found in blocks:
                    self._keep(rows[items.start : items.stop], found)
                    now = time.monotonic()
                    if self._progress is not None:
                        self._progress(items.stop, len(rows))
                    if now - said > _SAY_EVERY_S:
                        logger.info("perceptual hashes: %d of %d images", items.stop, len(rows))
                        said = now
                    if now - saved > _SAVE_EVERY_S:
                        self._save()
                        saved = now
            finally:
                self._stop.set()
                self._save()

    def _thumbnail(self, path: Path) -> NDArray[np.uint8] | RefusedImage:
        found: list[NDArray[np.uint8]] = []

        def attempt() -> None:
            found.append(grey_thumbnail(read_image_file(path), max_pixels=self._max_pixels))

        try:
            retry_transient(attempt, path, self._stop)
        except RefusedImage as error:
            return error
        return found[0]

    def _keep(self, rows: NDArray[np.int64], found: list[NDArray[np.uint8] | RefusedImage]) -> None:
        decoded = [place for place, item in enumerate(found) if not isinstance(item, RefusedImage)]
        if decoded:
            hashes, informative = perceptual_hashes(np.stack([np.asarray(found[place]) for place in decoded]))
            self.hashes[rows[decoded]] = hashes
            self.states[rows[decoded]] = np.where(informative, _HASHED, _PLAIN)
        for row, item in zip(rows, found, strict=True):
            if isinstance(item, RefusedImage):
                self.states[row] = _FIRST_REASON + self._number_of(item)

    def _number_of(self, error: RefusedImage) -> int:
        if error.reason not in self.reasons:
            self.reasons.append(error.reason)
            if isinstance(error, DecodeError) and error.reason != "too many pixels":
                self._lasting.add(error.reason)
        return self.reasons.index(error.reason)

    def _save(self) -> None:
        """Keep what holds for as long as the files stay as they are; go without a cache that cannot be written."""
        numbers = np.full(_FIRST_REASON + len(self.reasons), _UNKNOWN, dtype=np.uint8)
        numbers[[_HASHED, _PLAIN]] = _HASHED, _PLAIN
        lasting = [reason for reason in self.reasons if reason in self._lasting]
        for number, reason in enumerate(lasting):
            numbers[_FIRST_REASON + self.reasons.index(reason)] = _FIRST_REASON + number
        states = numbers[self.states]
        rows = np.flatnonzero((states != _UNKNOWN) & (self._marks != 0))
        rows = rows[np.argsort(self._marks[rows], kind="stable")]
        stream = BytesIO()
        np.savez(
            stream,
            versions=np.array([FORMAT_VERSION, METHOD_VERSION]),
            marks=self._marks[rows],
            hashes=self.hashes[rows],
            states=states[rows],
            reasons=np.frombuffer(orjson.dumps(lasting), dtype=np.uint8),
        )
        try:
            write_atomic(self._path, stream.getvalue())
        except OSError as error:
            logger.warning("%s cannot be written: %s; the images are read again next time", self._path, error.strerror)


@dataclass(frozen=True)
class _Known:
    marks: NDArray[np.uint64]
    hashes: NDArray[np.uint64]
    states: NDArray[np.uint8]
    reasons: list[str]


def _load(path: Path) -> _Known | None:
    try:
        with np.load(path, allow_pickle=False) as content:
            version, method = content["versions"].tolist()
            if version > FORMAT_VERSION:
                raise FormatError(
                    f"hashes {path} have format_version {version}, this program reads up to {FORMAT_VERSION}; "
                    "update the program, or delete the file to have it made anew"
                )
            if method != METHOD_VERSION:
                return None
            reasons = orjson.loads(content["reasons"].tobytes())
            return _Known(content["marks"], content["hashes"], content["states"], reasons)
    except FileNotFoundError:
        return None
    except FormatError:
        raise
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        logger.warning("hashes %s are damaged (%s); making them anew", path, error)
        return None


def _mark(path: Path) -> int:
    """A number for the file as it is: path, size and time; 0 for one that is not there."""
    try:
        facts = path.stat()
    except OSError:
        return 0
    return stable_id(f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}")
