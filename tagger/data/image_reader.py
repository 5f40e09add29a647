"""The bytes of a row's image: the copy in the shrink cache where it is current, else the file itself."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tagger.data.index import MetadataIndex
from tagger.data.quarantine import FileFacts, read_with_facts
from tagger.data.shrink_cache import ShrinkCache

# Above so many rows, an even sample of them is looked at: a stat on a network disk takes a third of a millisecond.
_MAX_LOOKED_AT = 20_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadImage:
    """An image's bytes and the facts of its file. missed_cache: there is a cache, and it did not have the image."""

    content: bytes
    facts: FileFacts
    missed_cache: bool = False


@dataclass(frozen=True)
class ImageReader:
    """Safe from any thread; travels to another process with its index and cache as paths."""

    index: MetadataIndex
    cache: ShrinkCache | None = None

    def read(self, row: int, known_bad: Callable[[FileFacts], str | None] | None = None) -> ReadImage:
        """An image's bytes. A file that is gone is refused, though the cache may still have its copy.

        Raises what `read_with_facts` raises; an OSError of TRANSIENT_ERRORS passes through.
        """
        path = self.index.image_path(row)
        copy = _read_copy(self.cache, os.fspath(path)) if self.cache is not None else None
        return copy or ReadImage(*read_with_facts(path, known_bad), missed_cache=self.cache is not None)

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


def _read_copy(cache: ShrinkCache, path: str) -> ReadImage | None:
    try:
        facts = os.stat(path)  # noqa: PTH116, a third of the time of Path.stat
    except OSError:
        return None  # the file's own reader says what is wrong
    content = cache.read(path, facts.st_size, facts.st_mtime_ns)
    return None if content is None else ReadImage(content, FileFacts(facts.st_size, facts.st_mtime_ns))


def _is_served(cache: ShrinkCache, path: str) -> bool:
    try:
        facts = os.stat(path)  # noqa: PTH116
    except OSError:
        return False
    return cache.find_path(path, facts.st_size, facts.st_mtime_ns) >= 0
