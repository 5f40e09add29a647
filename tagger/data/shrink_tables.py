"""The tables of a shrink cache while they are made: merged in memory, written beside the old ones, then swapped in.

The name of a table folder is a hash of what it holds, so the same cache has the same files however often its build was
interrupted.
"""

import dataclasses
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tagger.checkpoint.writer import fsync_folder
from tagger.data.shrink_cache import ENTRY, FORMAT_VERSION, MANIFEST, META, PATH, Manifest, ShrinkCache, tables_name
from tagger.data.shrink_shards import shard_size
from tagger.files import write_json

Records = NDArray[np.void]

# An entry and the path of a file as they are collected: (hash, check) of a key or a path id, then what belongs to it.
ENTRY_ROW = np.dtype(
    [("hash", "<u8"), ("check", "<u8"), ("offset", "<i8"), ("length", "<u4"), ("crc32", "<u4"), ("shard", "<i4")]
)
PATH_ROW = np.dtype(
    [
        ("hash", "<u8"),
        ("check", "<u8"),
        ("size", "<i8"),
        ("mtime_ns", "<i8"),
        ("key_hash", "<u8"),
        ("key_check", "<u8"),
    ]
)
_TEMPORARY_PREFIX = ".index-"
_NAME = re.compile(r"index-[0-9a-f]{16}|\.index-.*")


@dataclass(frozen=True)
class Tables:
    """What a cache holds: `entries` of ENTRY_ROW and `paths` of PATH_ROW, each sorted and unique by (hash, check).

    Every path has the key of an entry that is there.
    """

    entries: Records
    paths: Records

    @classmethod
    def empty(cls) -> "Tables":
        """The tables of a new cache."""
        return cls(np.empty(0, ENTRY_ROW), np.empty(0, PATH_ROW))

    @classmethod
    def of(cls, cache: ShrinkCache) -> "Tables":
        """The tables of an open cache."""
        entries = np.empty(len(cache.entries), ENTRY_ROW)
        entries["hash"] = cache.entry_hashes
        for name in ENTRY.names or ():
            entries[name] = cache.entries[name]
        paths = np.empty(len(cache.paths), PATH_ROW)
        paths["hash"] = cache.path_hashes
        for name in ("check", "size", "mtime_ns"):
            paths[name] = cache.paths[name]
        of_path = entries[cache.paths["entry"]]
        paths["key_hash"], paths["key_check"] = of_path["hash"], of_path["check"]
        return cls(entries, paths)

    def plus(self, entries: Records, paths: Records) -> "Tables":
        """With more entries and paths; one that was there already is replaced. Without any, it is this object."""
        if not len(entries) and not len(paths):
            return self
        all_paths = _unique(np.concatenate([self.paths, paths]))
        return Tables(_unique(np.concatenate([self.entries, entries])), all_paths)._consistent()

    def only(self, entries: NDArray[np.bool_], paths: NDArray[np.bool_]) -> "Tables":
        """Without the entries and paths at which a mask is False, and without the paths of entries that went."""
        return Tables(self.entries[entries], self.paths[paths])._consistent()

    def entry_of_path(self) -> NDArray[np.int64]:
        """int64 [paths]: the row of each path's entry, -1 where there is none."""
        return find_rows(self.entries, self.paths["key_hash"], self.paths["key_check"])

    def _consistent(self) -> "Tables":
        return Tables(self.entries, self.paths[self.entry_of_path() >= 0])

    def commit(self, folder: Path, manifest: Manifest, next_shard: int) -> Manifest:
        """Write the tables into a cache and make them its own; gives the new manifest."""
        shards = {str(n): shard_size(folder, int(n), manifest.form) for n in np.unique(self.entries["shard"])}
        arrays = self._arrays()
        committed = dataclasses.replace(manifest, index=tables_name(shards, *arrays.values()), next_shard=next_shard)
        home = folder / committed.index
        # A folder of this name that is not in use was left by a build that was killed here, or is a damaged one.
        if not home.is_dir() or manifest.index != committed.index:
            self._write(home, arrays, shards)
        if committed != manifest:
            write_json(folder / MANIFEST, committed.to_json())
            fsync_folder(folder)
        remove_other_tables(folder, committed)
        return committed

    def _arrays(self) -> dict[str, NDArray[np.generic]]:
        entries = np.empty(len(self.entries), ENTRY)
        for name in ENTRY.names or ():
            entries[name] = self.entries[name]
        paths = np.empty(len(self.paths), PATH)
        for name in ("check", "size", "mtime_ns"):
            paths[name] = self.paths[name]
        paths["entry"] = self.entry_of_path()
        return {
            "entry_hashes": np.ascontiguousarray(self.entries["hash"]),
            "entries": entries,
            "path_hashes": np.ascontiguousarray(self.paths["hash"]),
            "paths": paths,
        }

    @staticmethod
    def _write(home: Path, arrays: dict[str, NDArray[np.generic]], shards: dict[str, int]) -> None:
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=home.parent))
        try:
            sizes = {f"{name}.npy": _save_array(temporary / f"{name}.npy", values) for name, values in arrays.items()}
            write_json(temporary / META, {"format_version": FORMAT_VERSION, "sizes": sizes, "shards": shards})
            fsync_folder(temporary)
            temporary.chmod(0o755)  # mkdtemp makes a folder for its owner alone
            shutil.rmtree(home, ignore_errors=True)
            temporary.rename(home)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_folder(home.parent)


def remove_other_tables(folder: Path, manifest: Manifest) -> None:
    """Delete the tables that a cache no longer uses, and those that were never finished."""
    for path in folder.iterdir():
        if path.name != manifest.index and _NAME.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)  # Windows, while another process reads it: next time


def _unique(rows: Records) -> Records:
    """Sorted by (hash, check); of equal ones the last."""
    rows = rows[np.lexsort((rows["check"], rows["hash"]))]  # a stable sort
    same_as_next = (rows["hash"][:-1] == rows["hash"][1:]) & (rows["check"][:-1] == rows["check"][1:])
    unique: Records = rows[np.append(~same_as_next, np.ones(min(len(rows), 1), dtype=np.bool_))]
    return unique


def find_rows(rows: Records, hashes: NDArray[np.uint64], checks: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The places of (hash, check) pairs in sorted rows, int64, -1 where there is none."""
    found = np.full(len(hashes), -1, dtype=np.int64)
    column, check_column = np.ascontiguousarray(rows["hash"]), rows["check"]
    at = np.searchsorted(column, hashes)
    open_ = np.flatnonzero(at < len(rows))
    while open_.size:  # once, and again for the next of two equal hashes
        open_ = open_[column[at[open_]] == hashes[open_]]
        matched = check_column[at[open_]] == checks[open_]
        found[open_[matched]] = at[open_[matched]]
        open_ = open_[~matched]
        at[open_] += 1
        open_ = open_[at[open_] < len(rows)]
    return found


def _save_array(path: Path, values: NDArray[np.generic]) -> int:
    """Write a `.npy` file that is on the disk when this returns; gives its size in bytes."""
    with path.open("wb") as stream:
        np.save(stream, values, allow_pickle=False)
        stream.flush()
        os.fsync(stream.fileno())
        return stream.tell()
