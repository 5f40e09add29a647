"""One image to one entry of a shrink cache, here or in worker processes; results come in the order of the rows.

Workers are spawned, so the same code runs on every platform. They leave Ctrl-C to the process that started them, and
end with it, however it ends.
"""

import hashlib
import itertools
import multiprocessing
import os
import threading
import zlib
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray

from tagger.command import held_back, serve_parent
from tagger.data.decode import RefusedImage, decode_image
from tagger.data.index import MetadataIndex
from tagger.data.quarantine import read_image_file, retry_transient
from tagger.data.scan import TRANSIENT_ERRORS, printable
from tagger.data.shrink_cache import CacheError, CacheRecipe, ShrinkCache, path_id
from tagger.data.shrink_shards import SourceFacts
from tagger.preprocess import Preprocess
from tagger.stop import SIGNALS

_CHUNK_IMAGES = 8
_CHUNKS_AHEAD = 4  # per worker: what waits for a slow image is small copies
_WAKE_S = 0.5  # on Windows a wait without a timeout does not let Ctrl-C through


@dataclass(frozen=True)
class Shrunk:
    """A source and its entry. `jpeg` and `facts` are absent when the cache had the content before."""

    path_id: bytes
    size: int
    mtime_ns: int
    key: bytes
    jpeg: bytes = b""
    facts: SourceFacts | None = None


@dataclass(frozen=True)
class Unusable:
    """A source that gives no entry. `reason` is the same for like faults, `message` says more."""

    path: str
    reason: str
    message: str


@dataclass(frozen=True)
class Shrinker:
    """How entries are made; travels to a worker as the paths of its index and cache."""

    index: MetadataIndex
    recipe: CacheRecipe
    max_pixels: int
    cache: ShrinkCache | None

    def shrink(self, row: int) -> Shrunk | Unusable:
        """The entry of a row. Waits for storage that fails; raises StorageError after an outage."""
        path = self.index.image_path(row)
        made: list[Shrunk] = []
        try:
            retry_transient(lambda: made.append(self._shrink(row, path)), path, threading.Event())
        except RefusedImage as error:
            return Unusable(printable(path), error.reason, printable(str(error)))
        return made[0]

    def _shrink(self, row: int, path: Path) -> Shrunk:
        before = _facts(path)
        content = read_image_file(path)
        size, mtime_ns = before
        if _facts(path) != before or len(content) != size:
            raise RefusedImage("changed while it was read", "start again when it is whole")
        sha256 = hashlib.sha256(content)
        identity, key = path_id(os.fspath(path)), self.recipe.key_of(sha256.digest())
        if self.cache is not None and self.cache.find_key(key) >= 0:
            return Shrunk(identity, size, mtime_ns, key)
        pixels = decode_image(content, background=self.recipe.background, max_pixels=self.max_pixels)
        jpeg: bytes = simplejpeg.encode_jpeg(
            Preprocess(self.recipe.image_size).shrink(pixels),
            quality=self.recipe.quality,
            colorspace="RGB",
            colorsubsampling=self.recipe.subsampling.replace(":", ""),
            fastdct=False,
        )
        facts = SourceFacts(
            path=printable(self.index.relative_path(row)),
            path_id=identity.hex(),
            size=size,
            mtime_ns=mtime_ns,
            sha256=sha256.hexdigest(),
            width=pixels.shape[1],
            height=pixels.shape[0],
            crc32=zlib.crc32(jpeg),
        )
        return Shrunk(identity, size, mtime_ns, key, jpeg, facts)


def _facts(path: Path) -> tuple[int, int]:
    try:
        facts = path.stat()
    except OSError as error:
        if error.errno in TRANSIENT_ERRORS:
            raise
        return -1, 0  # reading it says what is wrong
    return facts.st_size, facts.st_mtime_ns


def shrink_rows(
    shrinker: Shrinker, rows: NDArray[np.int64], num_workers: int
) -> Generator[Shrunk | Unusable, None, None]:
    """The entries of rows, in their order, made by `num_workers` processes (0: by this one, as they are asked for).

    Close the generator to end the processes. Raises CacheError when one of them dies.
    """
    if num_workers == 0:
        for row in rows:
            yield shrinker.shrink(int(row))
        return
    pool = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(shrinker,)
    )
    chunks = (rows[start : start + _CHUNK_IMAGES].tolist() for start in range(0, len(rows), _CHUNK_IMAGES))
    pending: deque[Future[list[Shrunk | Unusable]]] = deque()
    try:
        for chunk in itertools.islice(chunks, _CHUNKS_AHEAD * num_workers):
            with held_back(*SIGNALS):
                pending.append(pool.submit(_shrink_chunk, chunk))
        while pending:
            while not wait([pending[0]], timeout=_WAKE_S).done:
                pass
            results = pending.popleft().result()
            for chunk in itertools.islice(chunks, 1):
                with held_back(*SIGNALS):
                    pending.append(pool.submit(_shrink_chunk, chunk))
            yield from results
    except BrokenProcessPool as error:
        raise CacheError(
            "a worker process was ended by the system, most likely for want of memory; what is committed stays, start "
            f"again with fewer --workers than {num_workers}"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_shrinker: Shrinker | None = None  # a worker's own


def _start_worker(shrinker: Shrinker) -> None:
    global _shrinker
    _shrinker = shrinker
    serve_parent()
    torch.set_num_threads(1)


def _shrink_chunk(rows: list[int]) -> list[Shrunk | Unusable]:
    assert _shrinker is not None
    return [_shrinker.shrink(row) for row in rows]
