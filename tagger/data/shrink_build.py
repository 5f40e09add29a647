"""The shrink cache, written: every image of an index copied once at training size.

A build may be killed at any point: shards are committed whole, and the next start takes in those that the tables do not
know yet and goes on behind them, so the shard in progress is what is lost. Entries are named by content and recipe: a
renamed file is read and hashed, not decoded again. What cannot be decoded is left out and reported. Refuses a folder
that holds other things, a cache of another recipe, and a second build in the same folder at a time.
"""

import contextlib
import dataclasses
import logging
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tagger.data.index import MetadataIndex
from tagger.data.scan import printable
from tagger.data.shrink_cache import FORMAT_VERSION, MANIFEST, CacheError, CacheRecipe, Manifest, ShrinkCache, split_id
from tagger.data.shrink_shards import (
    Form,
    ShardWriter,
    SourceFacts,
    create_shard,
    read_members,
    remove_shard,
    remove_unfinished,
    scan_shard,
    shard_numbers,
)
from tagger.data.shrink_tables import ENTRY_ROW, PATH_ROW, Records, Tables, find_rows, remove_other_tables
from tagger.data.shrink_worker import Shrinker, Shrunk, Unusable, shrink_rows
from tagger.files import FormatError, write_json
from tagger.run_lock import FolderLock, LockedError

REFUSED = "refused.json"
_LOCK = "build.lock"
_ENTRY_STRUCT = struct.Struct("<QQqIIi")
_PATH_STRUCT = struct.Struct("<QQqqQQ")
_BEFORE_MANIFEST = (_LOCK, f".{_LOCK}", f".{MANIFEST}")  # what a build that was killed at once may leave

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildOptions:
    """How a cache is built.

    form: tar shards, or folders of loose files. shard_bytes, shard_images: a shard is closed when it reaches either.
    num_workers: processes; None: one a core, 0: this process. prune: drop what the index no longer has. verify: read
    every copy first, and make those anew whose checksum does not hold.
    """

    recipe: CacheRecipe
    max_pixels: int = 200_000_000
    form: Form = "tar"
    shard_bytes: int = 1_000_000_000
    shard_images: int = 20_000
    num_workers: int | None = None
    prune: bool = False
    verify: bool = False

    def __post_init__(self) -> None:
        if self.shard_bytes < 1 or self.shard_images < 1 or (self.num_workers or 0) < 0:
            raise CacheError(
                f"--shard-mb {self.shard_bytes / 1e6:g}, --shard-images {self.shard_images}, --workers "
                f"{self.num_workers}: a shard needs at least 1 of each, and the number of workers is 0 or more"
            )


@dataclass(frozen=True)
class BuildProgress:
    """Counts of images so far: `current` were in the cache, `made` are new, `linked` are new names of known content."""

    total: int
    current: int
    made: int = 0
    linked: int = 0
    refused: int = 0


@dataclass(frozen=True)
class BuildReport:
    """What a build did. `dropped` and `damaged` count entries removed by prune and by verify."""

    progress: BuildProgress
    refused: tuple[Unusable, ...]
    dropped: int
    damaged: int
    num_entries: int
    num_bytes: int


def build_cache(
    folder: Path,
    index: MetadataIndex,
    options: BuildOptions,
    on_progress: Callable[[BuildProgress], None] = lambda _: None,
) -> BuildReport:
    """Bring the cache in `folder` up to date with the images of an index, making it where there is none.

    On KeyboardInterrupt the shards committed so far are entered in the tables before it passes through. Raises
    CacheError for what the caller can mend, StorageError after an outage.
    """
    folder = folder.expanduser().absolute()
    check_folder(folder, options, index.roots)
    try:
        with _exclusive(folder):
            return _Build(folder, index, options, on_progress).run()
    except OSError as error:
        raise CacheError(
            f"cannot write the shrink cache {printable(folder)}: {error.strerror or error}; make room or name another "
            "folder, then start again: what is committed stays"
        ) from error


def check_folder(folder: Path, options: BuildOptions, roots: Sequence[Path]) -> None:
    """Raises CacheError for a folder that a build of these options would refuse; changes nothing.

    roots: the folders of the images.
    """
    folder = folder.expanduser().absolute()
    for root in roots:
        if folder.resolve().is_relative_to(root.expanduser().resolve()):
            raise CacheError(
                f"the shrink cache {printable(folder)} is inside data.roots: {printable(root)}, where its copies would "
                "count as images; name a folder outside"
            )
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"{printable(folder)} is a file; name a folder for the shrink cache")
    if (folder / MANIFEST).exists():
        _same_recipe(folder, options)
    elif folder.is_dir():
        strange = sorted(path.name for path in folder.iterdir() if not path.name.startswith(_BEFORE_MANIFEST))
        if strange:
            raise CacheError(
                f"{printable(folder)} is not a shrink cache and not empty (it holds {printable(strange[0])}); name "
                "another folder"
            )


def _same_recipe(folder: Path, asked: BuildOptions) -> Manifest:
    """The manifest of the cache in a folder. Raises CacheError where it was made in another way than asked for."""
    manifest = Manifest.load(folder)
    wrong = manifest.recipe.differences(asked.recipe)
    if manifest.form != asked.form:
        wrong.append("--loose" if manifest.form == "loose" else "tar shards, not --loose")
    if wrong:
        raise CacheError(
            f"the shrink cache {printable(folder)} was made with {'; '.join(wrong)}; name another folder, or "
            "delete this one to make it anew"
        )
    return manifest


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """The folder, made where it is missing, for one build at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FolderLock(folder / _LOCK)
    except LockedError as error:
        raise CacheError(f"the shrink cache {printable(folder)} is being built: {error}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # then the next build does it
            remove_unfinished(folder)
        lock.release()


class _KeySet:
    """Keys as two columns of numbers: a set of ten million bytes objects takes over a gigabyte."""

    def __init__(self) -> None:
        self._hashes = np.empty(0, np.uint64)
        self._checks = np.empty(0, np.uint64)

    def update(self, entries: Records) -> None:
        hashes = np.concatenate([self._hashes, entries["hash"][np.argsort(entries["hash"])]])
        checks = np.concatenate([self._checks, entries["check"][np.argsort(entries["hash"])]])
        order = np.argsort(hashes, kind="stable")  # merges the two sorted runs
        self._hashes, self._checks = hashes[order], checks[order]

    def __contains__(self, key: bytes) -> bool:
        high, low = split_id(key)
        at = int(self._hashes.searchsorted(np.uint64(high)))
        while at < len(self._hashes) and int(self._hashes[at]) == high:
            if int(self._checks[at]) == low:
                return True
            at += 1
        return False


class _Shards:
    """New entries and paths; a shard is closed when it is full. Both are kept as bytes, not as objects."""

    def __init__(self, folder: Path, options: BuildOptions, next_number: int) -> None:
        self._folder = folder
        self._options = options
        self._writer: ShardWriter | None = None
        self._open_rows = bytearray()
        self._open_keys: set[bytes] = set()
        self._rows = bytearray()
        self._paths = bytearray()
        self._committed = _KeySet()
        self.next_number = next_number

    def __contains__(self, key: bytes) -> bool:
        return key in self._open_keys or key in self._committed

    def add(self, key: bytes, jpeg: bytes, facts: SourceFacts) -> None:
        """Append an entry."""
        if self._writer is None:
            self._writer = create_shard(self._folder, self.next_number, self._options.form)
        offset = self._writer.add(key, jpeg, facts)
        self._open_rows += _ENTRY_STRUCT.pack(*split_id(key), offset, len(jpeg), facts.crc32, self.next_number)
        self._open_keys.add(key)
        if self._writer.num_bytes >= self._options.shard_bytes or len(self._open_keys) >= self._options.shard_images:
            self.close()

    def link(self, identity: bytes, size: int, mtime_ns: int, key: bytes) -> None:
        """Append the path of a file whose content has the entry `key`."""
        self._paths += _PATH_STRUCT.pack(*split_id(identity), size, mtime_ns, *split_id(key))

    def close(self) -> None:
        """Commit the open shard."""
        if self._writer is None:
            return
        self._writer.commit()
        self._writer = None
        self.next_number += 1
        self._rows += self._open_rows
        self._committed.update(_records(self._open_rows, ENTRY_ROW))
        self._open_rows.clear()
        self._open_keys.clear()

    def discard(self) -> None:
        """Drop the open shard."""
        if self._writer is not None:
            self._writer.discard()
            self._writer = None
            self._open_rows.clear()
            self._open_keys.clear()

    def added_to(self, tables: Tables) -> Tables:
        """The tables with the committed entries, and the paths of entries that are there."""
        return tables.plus(_records(self._rows, ENTRY_ROW), _records(self._paths, PATH_ROW))


class _Build:
    """One build, in the order of its methods."""

    def __init__(
        self,
        folder: Path,
        index: MetadataIndex,
        options: BuildOptions,
        on_progress: Callable[[BuildProgress], None],
    ) -> None:
        self._folder = folder
        self._index = index
        self._options = options
        self._on_progress = on_progress
        self._manifest = self._begin()
        self._tables = Tables.empty()
        self._on_disk: Tables | None = None

    def run(self) -> BuildReport:
        self._take_up()
        damaged = self._drop_damaged() if self._options.verify else 0
        cache = ShrinkCache.open(self._folder)
        rows, _ = self._plan(cache)
        progress, refused = self._make(cache, rows)
        cache.close()
        dropped = self._prune() if self._options.prune else 0
        listed = [[item.path, item.message] for item in refused]
        write_json(self._folder / REFUSED, {"format_version": FORMAT_VERSION, "refused": listed})
        entries = self._tables.entries
        return BuildReport(progress, refused, dropped, damaged, len(entries), int(entries["length"].sum()))

    def _begin(self) -> Manifest:
        """The manifest, written first, so that a folder with shards has a recipe. Refuses another recipe or form."""
        path, asked = self._folder / MANIFEST, self._options
        if not path.exists():
            manifest = Manifest(asked.recipe, asked.form)
            write_json(path, manifest.to_json())
            return manifest
        return _same_recipe(self._folder, asked)

    def _take_up(self) -> None:
        """The tables as they are on disk, with the shards that were committed after them."""
        form = self._options.form
        remove_unfinished(self._folder)
        remove_other_tables(self._folder, self._manifest)
        next_number = self._manifest.next_shard
        try:
            if self._manifest.index:
                with contextlib.closing(ShrinkCache.open(self._folder)) as cache:
                    cache.verify_tables()
                    self._tables = Tables.of(cache)
                    bad = cache.damaged_shards()
                self._on_disk = self._tables
                if bad:
                    self._tables = _without_shards(self._tables, bad)
        except FormatError as error:
            logger.warning("%s; making its tables anew from its shards", error)
            self._manifest, next_number = dataclasses.replace(self._manifest, index=""), 0
        listed = set(np.unique(self._tables.entries["shard"]).tolist())
        for number in shard_numbers(self._folder, form):
            if number not in listed and not (number >= next_number and self._take_in(number)):
                remove_shard(self._folder, number, form)  # replaced by a prune, or damaged
        self._commit(max([self._manifest.next_shard, *(n + 1 for n in shard_numbers(self._folder, form))]))

    def _take_in(self, number: int) -> bool:
        """Enter a shard that the tables do not list; False when they know all of it from elsewhere."""
        entry_rows, path_rows = bytearray(), bytearray()
        for member in scan_shard(self._folder, number, self._options.form):
            key, facts = split_id(member.key), member.facts
            entry_rows += _ENTRY_STRUCT.pack(*key, member.offset, member.length, facts.crc32, number)
            identity = split_id(bytes.fromhex(facts.path_id))
            path_rows += _PATH_STRUCT.pack(*identity, facts.size, facts.mtime_ns, *key)
        entries = _records(entry_rows, ENTRY_ROW)
        new = find_rows(self._tables.entries, entries["hash"], entries["check"]) < 0
        if not new.any():
            return False
        self._tables = self._tables.plus(entries[new], _records(path_rows, PATH_ROW))
        return True

    def _drop_damaged(self) -> int:
        with contextlib.closing(ShrinkCache.open(self._folder)) as cache:
            sound = np.array([cache.read_entry(entry) is not None for entry in range(len(cache))], dtype=np.bool_)
        self._tables = self._tables.only(sound, np.ones(len(self._tables.paths), dtype=np.bool_))
        self._commit(self._manifest.next_shard)
        return int((~sound).sum())

    def _plan(self, cache: ShrinkCache) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(rows to make, int64; which of the tables' paths are images of the index as they are now, bool [paths])."""
        present = np.zeros(len(cache.paths), dtype=np.bool_)
        missing = np.ones(len(self._index), dtype=np.bool_)
        for row in range(len(self._index)):
            path = os.fspath(self._index.image_path(row))
            try:
                facts = os.stat(path)  # noqa: PTH116, a third of the time of Path.stat
            except OSError:
                continue  # the worker's reading says what is wrong
            at = cache.find_path(path, facts.st_size, facts.st_mtime_ns)
            if at >= 0:
                present[at], missing[row] = True, False
        return np.flatnonzero(missing), present

    def _make(self, cache: ShrinkCache, rows: NDArray[np.int64]) -> tuple[BuildProgress, tuple[Unusable, ...]]:
        """Entries for rows. Whatever ends it, what was committed is entered in the tables."""
        shards = _Shards(self._folder, self._options, self._manifest.next_shard)
        made = linked = 0
        refused: list[Unusable] = []
        current = len(self._index) - len(rows)
        workers = self._options.num_workers
        workers = min(default_num_workers() if workers is None else workers, len(rows))
        shrinker = Shrinker(self._index, self._options.recipe, self._options.max_pixels, cache)
        self._on_progress(BuildProgress(len(self._index), current))
        try:
            with contextlib.closing(shrink_rows(shrinker, rows, workers)) as results:
                for result in results:
                    if isinstance(result, Unusable):
                        refused.append(result)
                    else:
                        new = _add(shards, result)
                        made, linked = made + new, linked + (not new)
                    self._on_progress(BuildProgress(len(self._index), current, made, linked, len(refused)))
            shards.close()
        finally:
            shards.discard()
            self._tables = shards.added_to(self._tables)
            self._commit(shards.next_number)
        return BuildProgress(len(self._index), current, made, linked, len(refused)), tuple(refused)

    def _prune(self) -> int:
        """Drop the paths that are not images of the index as they are now, then the entries without a path.

        Shards with such an entry are written again without it, and deleted when the tables list the new ones. Gives
        how many entries went.
        """
        with contextlib.closing(ShrinkCache.open(self._folder)) as cache:
            _, present = self._plan(cache)
        live = np.zeros(len(self._tables.entries), dtype=np.bool_)
        live[self._tables.entry_of_path()[present]] = True
        old = np.unique(self._tables.entries["shard"][~live]).tolist()
        kept = self._tables.only(live, present)
        shards = _Shards(self._folder, self._options, self._manifest.next_shard)
        try:
            for number in old:
                self._copy_live(number, kept, shards)
            shards.close()
        finally:
            shards.discard()
        self._tables = shards.added_to(kept)
        self._commit(shards.next_number)
        for number in old:
            remove_shard(self._folder, number, self._options.form)
        return int((~live).sum())

    def _copy_live(self, number: int, kept: Tables, shards: _Shards) -> None:
        live = kept.entries[kept.entries["shard"] == number]
        keys = {_key_bytes(entry) for entry in live}
        for member, jpeg in read_members(self._folder, number, self._options.form):
            if member.key in keys:
                shards.add(member.key, jpeg, member.facts)

    def _commit(self, next_shard: int) -> None:
        if self._tables is self._on_disk and next_shard == self._manifest.next_shard:
            return
        self._on_disk = self._tables
        self._manifest = self._tables.commit(self._folder, self._manifest, next_shard)


def _add(shards: _Shards, result: Shrunk) -> bool:
    """Enter a result; whether its content is new."""
    new = result.facts is not None and result.key not in shards
    if new:
        assert result.facts is not None
        shards.add(result.key, result.jpeg, result.facts)
    shards.link(result.path_id, result.size, result.mtime_ns, result.key)
    return new


def _without_shards(tables: Tables, numbers: list[int]) -> Tables:
    return tables.only(~np.isin(tables.entries["shard"], numbers), np.ones(len(tables.paths), dtype=np.bool_))


def _records(rows: bytearray, dtype: np.dtype[np.void]) -> Records:
    return np.frombuffer(bytes(rows), dtype)


def _key_bytes(entry: np.void) -> bytes:
    high, low, *_ = entry.item()
    return bytes(high.to_bytes(8, "little") + low.to_bytes(8, "little"))


def default_num_workers() -> int:
    """Worker processes for this machine: one for each core that this process may use."""
    affinity = vars(os).get("sched_getaffinity")
    return len(affinity(0)) if affinity else os.cpu_count() or 1
