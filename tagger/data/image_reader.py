"""The bytes of a row's image: the copy in the shrink cache where it is current, else the file itself."""

import logging
import os
import threading
from typing import Any

import numpy as np

from tagger.data.index import MetadataIndex
from tagger.data.quarantine import read_image_file
from tagger.data.shrink_cache import ShrinkCache

# Above so many rows, an even sample of them is looked at: a stat on a network disk takes a third of a millisecond.
_MAX_LOOKED_AT = 20_000

logger = logging.getLogger(__name__)


class ImageReader:
    """Safe from any thread; travels to another process with its index and cache as paths, its counts at 0.

    `num_cached` and `num_files` count what was read from where since it was made.
    """

    def __init__(self, index: MetadataIndex, cache: ShrinkCache | None = None) -> None:
        self.index = index
        self.cache = cache
        self.num_cached = 0
        self.num_files = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.index, self.cache)

    def read(self, row: int) -> bytes:
        """An image's bytes. A file that is gone is refused, though the cache may still have its copy.

        Raises what `read_image_file` raises; an OSError of TRANSIENT_ERRORS passes through.
        """
        path = self.index.image_path(row)
        if self.cache is None:
            return read_image_file(path)
        found = _read_copy(self.cache, os.fspath(path))
        content = read_image_file(path) if found is None else found
        with self._lock:
            self.num_cached += found is not None
            self.num_files += found is None
        return content

    def describe_cache(self) -> str:
        """One line for people: how many of the rows the cache serves as the files are now, all or a sample of them."""
        assert self.cache is not None
        num_rows = len(self.index)
        rows = np.linspace(0, num_rows - 1, min(num_rows, _MAX_LOOKED_AT)).astype(np.int64)
        served = sum(_is_served(self.cache, os.fspath(self.index.image_path(int(row)))) for row in rows)
        what = f"shrink cache {self.cache.folder} ({self.cache.recipe.image_size} px)"
        if len(rows) == num_rows:
            rest = "" if served == num_rows else "; the rest are read from their files"
            return f"{what} serves {served:,} of {num_rows:,} images{rest}"
        return f"{what} serves {100 * served / len(rows):.2f} % of {len(rows):,} images looked at, of {num_rows:,}"

    def describe_use(self) -> str:
        """One line for people: what was read from where so far."""
        return f"{self.num_cached:,} images read from the shrink cache, {self.num_files:,} from their files"


def _read_copy(cache: ShrinkCache, path: str) -> bytes | None:
    try:
        facts = os.stat(path)  # noqa: PTH116, a third of the time of Path.stat
    except OSError:
        return None  # the file's own reader says what is wrong
    return cache.read(path, facts.st_size, facts.st_mtime_ns)


def _is_served(cache: ShrinkCache, path: str) -> bool:
    try:
        facts = os.stat(path)  # noqa: PTH116
    except OSError:
        return False
    return cache.find_path(path, facts.st_size, facts.st_mtime_ns) >= 0
