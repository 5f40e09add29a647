"""The shrink cache, read: small copies of a data set's images, found by the facts of their files.

A copy is served only while its image has the path, size and modification time that it had when the copy was made, and
only when the copy's own checksum holds; the image's content is hashed when the cache is built, not when it is read. So
a file replaced by another of the same size and time is not noticed. Refuses a folder that is no cache, a cache of a
newer format, and one whose copies are too small or lie on another background than the reader needs.
"""

import hashlib
import logging
import os
import threading
import weakref
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from tagger.data.scan import TRANSIENT_ERRORS, printable
from tagger.data.shrink_shards import Form, jpeg_name, shard_path, shard_size
from tagger.errors import InputError
from tagger.files import FormatError, read_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
META = "meta.json"
TABLES_PREFIX = "index-"

# On disk and in memory; the hashes of both tables stand in files of their own, because a binary search copies columns
# that are not contiguous. An id or key of 16 bytes is a (hash, check) pair of little-endian numbers.
ENTRY = np.dtype([("check", "<u8"), ("offset", "<i8"), ("length", "<u4"), ("crc32", "<u4"), ("shard", "<i4")])
PATH = np.dtype([("check", "<u8"), ("size", "<i8"), ("mtime_ns", "<i8"), ("entry", "<i4")])

# Each open shard is a file handle, and a process has about a thousand. Beyond these, a shard is opened for each read.
_MAX_OPEN_SHARDS = 256
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)

# How a user says each part of a recipe; the last two are the program's own.
_SAID_BY = {
    "image_size": "--size {}",
    "background": "data.background={}",
    "quality": "--quality {}",
    "subsampling": "chroma subsampling {}",
    "resize": "resizing {}",
}

logger = logging.getLogger(__name__)


class CacheError(InputError):
    """A cache that cannot be used or made; the message is one line that says what to do."""


@dataclass(frozen=True)
class CacheRecipe:
    """What the copies look like: longest side in pixels (smaller images keep their size), RGB behind transparency,
    JPEG quality."""

    image_size: int
    background: tuple[int, int, int] = (255, 255, 255)
    quality: int = 95
    subsampling: str = "4:4:4"
    resize: str = "bicubic, antialiased"

    def __post_init__(self) -> None:
        if self.image_size < 1 or not 1 <= self.quality <= 100:
            raise CacheError(
                f"--size {self.image_size}, --quality {self.quality}: the size must be above 0, the quality 1..100"
            )

    def key_of(self, sha256: bytes) -> bytes:
        """The 16-byte key of the copy of an image: a function of the recipe, the format and the file's SHA-256."""
        recipe = orjson.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(recipe + b"\0" + sha256).digest()[:16]

    def differences(self, other: "CacheRecipe") -> list[str]:
        """What differs, by the names of the options and settings: "--size 448, not 224"."""
        values = [(field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return [
            f"{_SAID_BY[name].format(_shown(mine))}, not {_shown(theirs)}"
            for name, mine, theirs in values
            if mine != theirs
        ]


def _shown(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Manifest:
    """What a cache says of itself. `index` names the folder of its tables, "" before the first were written.

    Shards from `next_shard` on were committed after those tables; earlier ones that the tables do not list are
    leftovers.
    """

    recipe: CacheRecipe
    form: Form
    index: str = ""
    next_shard: int = 0

    def to_json(self) -> dict[str, object]:
        """What `load` reads back."""
        return {"format_version": FORMAT_VERSION, "kind": "shrink cache", **asdict(self)}

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Raises CacheError when the folder holds no cache, FormatError when it is damaged or newer."""
        path = folder / MANIFEST
        if not path.is_file():
            raise CacheError(
                f"{printable(folder)} holds no shrink cache; make one with `python -m scripts.build_cache`, "
                "or set data.cache_dir=null"
            )
        content = read_json(path, "shrink cache", FORMAT_VERSION)
        try:
            if content["kind"] != "shrink cache" or content["form"] not in ("tar", "loose"):
                raise ValueError("it is of another kind")
            recipe = dict(content["recipe"])
            red, green, blue = recipe.pop("background")
            found = CacheRecipe(background=(int(red), int(green), int(blue)), **recipe)
            return cls(found, content["form"], str(content["index"]), int(content["next_shard"]))
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path} is not the manifest of a shrink cache ({error}); make the cache anew") from error


def path_id(path: str) -> bytes:
    """16 bytes that stand for the absolute path of an image."""
    return hashlib.blake2b(path.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def split_id(identity: bytes) -> tuple[int, int]:
    """The (hash, check) pair of a 16-byte id or key."""
    return int.from_bytes(identity[:8], "little"), int.from_bytes(identity[8:], "little")


def tables_name(shards: Mapping[str, int], *tables: NDArray[np.generic]) -> str:
    """The name of the folder of tables, a hash of what they hold: entry hashes, entries, path hashes, paths."""
    digest = hashlib.blake2b(orjson.dumps(shards), digest_size=8)
    for values in tables:
        digest.update(np.ascontiguousarray(values).view(np.uint8).data)
    return f"{TABLES_PREFIX}{digest.hexdigest()}"


class ShrinkCache:
    """An open cache: `read` is safe from any thread, and the object travels to another process as its path.

    No Python object is kept per entry: two sorted tables are memory-mapped, 72 bytes an image. What another process
    adds later is seen by opening the cache again.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Use `ShrinkCache.open`."""
        self.folder = folder
        self.recipe = manifest.recipe
        self.form: Form = manifest.form
        self._tables_name = manifest.index
        home = folder / manifest.index
        meta = read_json(home / META, "tables of a shrink cache", FORMAT_VERSION)
        for name, size in meta["sizes"].items():
            found = (home / name).stat().st_size if (home / name).is_file() else 0
            if found != size:
                raise FormatError(
                    f"shrink cache {printable(folder)} is damaged: {manifest.index}/{name} has {found} bytes, expected "
                    f"{size}; start scripts.build_cache again"
                )
        self.shard_sizes = {int(number): int(size) for number, size in meta["shards"].items()}
        self.entry_hashes: NDArray[np.uint64] = _open_array(home / "entry_hashes.npy")
        self.entries: NDArray[np.void] = _open_array(home / "entries.npy")
        self.path_hashes: NDArray[np.uint64] = _open_array(home / "path_hashes.npy")
        self.paths: NDArray[np.void] = _open_array(home / "paths.npy")
        self._shards = _OpenShards(folder, manifest.form)
        self._lock = threading.Lock()
        self.num_damaged = 0

    @classmethod
    def open(cls, folder: str | Path) -> "ShrinkCache":
        """Open the cache in a folder, from any process.

        Raises CacheError when there is none or its first build has not ended, FormatError when it is damaged or newer.
        Shards that are gone or cut short are named in the log; their images count as not cached.
        """
        folder = Path(folder).expanduser().absolute()
        manifest = Manifest.load(folder)
        while True:
            if not manifest.index:
                raise CacheError(
                    f"the shrink cache {printable(folder)} is not built to its end; start scripts.build_cache again"
                )
            try:
                cache = cls(folder, manifest)
                break
            except (FormatError, OSError):
                before, manifest = manifest, Manifest.load(folder)
                if manifest == before:
                    raise
                # A build has replaced the tables between the two readings.
        if bad := cache.damaged_shards():
            names = ", ".join(shard_path(folder, number, cache.form).name for number in bad[:3])
            logger.warning(
                "%s: %d shards are missing or cut short (%s); build the cache again", folder, len(bad), names
            )
        return cache

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).open, (self.folder,)

    def __len__(self) -> int:
        """Number of copies; several paths of the same content share one."""
        return len(self.entries)

    def require(self, longest_side: int, background: tuple[int, int, int], image_size: int | None = None) -> None:
        """Raises CacheError unless the copies serve images of this longest side on this background.

        image_size: what the recipe says, where buckets of it have longer sides (None: the longest side).

        Reads the tables as `verify_tables` does: whoever trains asks this first.
        """
        self.verify_tables()
        if self.recipe.image_size < longest_side:
            buckets = image_size is not None and image_size != longest_side
            needs = f"buckets of data.image_size={image_size} have sides up to {longest_side}"
            needs = needs if buckets else f"data.image_size={longest_side} needs at least as much"
            raise CacheError(
                f"data.cache_dir: the copies in {printable(self.folder)} are {self.recipe.image_size} px, "
                f"{needs}; build a cache with --size {longest_side} in another folder, or set data.cache_dir=null"
            )
        if self.recipe.background != background:
            raise CacheError(
                f"data.cache_dir: the copies in {printable(self.folder)} lie on background "
                f"{list(self.recipe.background)}, data.background is {list(background)}; build a cache for it in "
                "another folder, or set data.cache_dir=null"
            )

    def verify_tables(self) -> None:
        """Read both tables, 72 bytes an image at about 1 GB/s; FormatError unless they are as they were written.

        A wrong number in them would pair an image's tags with the copy of another.
        """
        tables = self.entry_hashes, self.entries, self.path_hashes, self.paths
        if tables_name({str(n): size for n, size in self.shard_sizes.items()}, *tables) != self._tables_name:
            raise FormatError(
                f"shrink cache {printable(self.folder)} is damaged: the tables in {self._tables_name} are not as they "
                "were written; start scripts.build_cache again"
            )

    def find_path(self, path: str, size: int, mtime_ns: int) -> int:
        """The row of `paths` that describes a file as it is now, or -1."""
        high, low = split_id(path_id(path))
        at = int(self.path_hashes.searchsorted(np.uint64(high)))
        while at < len(self.path_hashes) and int(self.path_hashes[at]) == high:
            check, known_size, known_mtime_ns, _ = self.paths[at].item()
            if check == low:
                return at if known_size == size and known_mtime_ns == mtime_ns else -1
            at += 1
        return -1

    def find_key(self, key: bytes) -> int:
        """The entry with a key, or -1."""
        high, low = split_id(key)
        at = int(self.entry_hashes.searchsorted(np.uint64(high)))
        while at < len(self.entry_hashes) and int(self.entry_hashes[at]) == high:
            if self.entries[at].item()[0] == low:
                return at
            at += 1
        return -1

    def read(self, path: str, size: int, mtime_ns: int) -> bytes | None:
        """The JPEG made from the file at an absolute path, or None where there is none for a file with these facts.

        None too for a copy whose checksum does not hold, which is counted in `num_damaged`. An OSError of
        TRANSIENT_ERRORS passes through.
        """
        at = self.find_path(path, size, mtime_ns)
        return None if at < 0 else self.read_entry(self.paths[at].item()[3])

    def read_entry(self, entry: int) -> bytes | None:
        """The JPEG of an entry, or None when it is damaged or gone."""
        check, offset, length, crc32, shard = self.entries[entry].item()
        key = int(self.entry_hashes[entry]).to_bytes(8, "little") + check.to_bytes(8, "little")
        try:
            jpeg = self._shards.read(shard, key, offset, length)
        except OSError as error:
            if error.errno in TRANSIENT_ERRORS:
                raise
            jpeg = b""
        if len(jpeg) == length and zlib.crc32(jpeg) == crc32:
            return jpeg
        with self._lock:
            self.num_damaged += 1
            first = self.num_damaged == 1
        if first:
            name = shard_path(self.folder, shard, self.form)
            logger.warning(
                "a copy in %s is damaged or gone; its image is read instead. Build again with --verify", name
            )
        return None

    def damaged_shards(self) -> list[int]:
        """Shards that are missing or have another size than when they were committed."""
        return [n for n, size in self.shard_sizes.items() if shard_size(self.folder, n, self.form) != size]

    def close(self) -> None:
        """Let go of the shards; a later read opens them again."""
        self._shards.close()


class _OpenShards:
    """Positional reads from shards; nothing is shared between two reads but the handle."""

    def __init__(self, folder: Path, form: Form) -> None:
        self._folder = folder
        self._form: Form = form
        self._handles: dict[int, int] = {}
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _close_all, self._handles)

    def read(self, shard: int, key: bytes, offset: int, length: int) -> bytes:
        """`length` bytes, or fewer where the shard ends before. Raises OSError."""
        path = shard_path(self._folder, shard, self._form)
        if self._form == "loose":
            handle = os.open(path / jpeg_name(key), _READ_FLAGS)
            try:
                return os.read(handle, length + 1)
            finally:
                os.close(handle)
        kept = self._handles.get(shard)
        if kept is None:
            with self._lock:
                kept = self._handles.get(shard)
                if kept is None and len(self._handles) < _MAX_OPEN_SHARDS:
                    kept = self._handles[shard] = os.open(path, _READ_FLAGS)
        if kept is not None:
            return self._read_at(kept, length, offset)
        handle = os.open(path, _READ_FLAGS)
        try:
            return self._read_at(handle, length, offset)
        finally:
            os.close(handle)

    def _read_at(self, handle: int, length: int, offset: int) -> bytes:
        # Not a memory map: a page fault would hold the GIL while the disk turns.
        if hasattr(os, "pread"):
            return os.pread(handle, length, offset)
        with self._lock:  # Windows has no positional read
            os.lseek(handle, offset, os.SEEK_SET)
            return os.read(handle, length)

    def close(self) -> None:
        with self._lock:
            _close_all(self._handles)


def _close_all(handles: dict[int, int]) -> None:
    while handles:
        os.close(handles.popitem()[1])


def _open_array(path: Path) -> NDArray[Any]:
    # A plain view of the map: np.memmap's own indexing costs several times an ndarray's.
    mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    return mapped
