"""The columns of an index, written block by block.

A row costs eight bytes of memory while it is written, never a Python object that stays. Tags are numbered as they
first occur in the rows, so the same rows give the same bytes whoever read them, and in which order.
"""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagger.data.columns import ColumnWriter, offsets_of, write_column
from tagger.data.sidecar_rows import RATING_CODES, stem_ids

BLOCK_ROWS = 4096


class TagNumbers:
    """Final numbers of tags in the order of their first occurrence, given names that arrive in any order."""

    def __init__(self) -> None:
        self._interned: dict[str, int] = {}
        self._final = np.full(1024, -1, dtype=np.int64)
        self.names: list[str] = []
        self._order: list[str] = []

    def intern(self, names: Iterable[str]) -> NDArray[np.int64]:
        """Provisional numbers of names, int64."""
        interned = self._interned
        numbers = [interned.setdefault(name, len(interned)) for name in names]
        self._order.extend(islice(interned, len(self._order), None))
        if len(interned) > len(self._final):
            grown = np.full(2 * len(interned), -1, dtype=np.int64)
            grown[: len(self._final)] = self._final
            self._final = grown
        return np.array(numbers, dtype=np.int64)

    def finalise(self, provisional: NDArray[np.int64]) -> NDArray[np.int64]:
        """Final numbers of the tags of the next rows."""
        final = self._final.take(provisional)
        unseen = np.flatnonzero(final < 0)
        if len(unseen):
            fresh, first = np.unique(provisional[unseen], return_index=True)
            fresh = fresh[np.argsort(first)]
            self._final[fresh] = np.arange(len(self.names), len(self.names) + len(fresh))
            self.names += [self._order[number] for number in fresh.tolist()]
            final = self._final.take(provisional)
        return final


class RowWriter:
    """Takes rows in their order and writes the columns of an index into a folder."""

    def __init__(self, folder: Path, *, with_marks: bool) -> None:
        self._num_written = 0
        self.tags = TagNumbers()
        self._folder = folder
        self._added: list[tuple[str, tuple[str, ...], str | None]] = []
        columns: dict[str, type[np.generic]] = {
            "tag_ids": np.uint16,
            "paths": np.uint8,
            "image_ids": np.uint64,
            "ratings": np.uint8,
        }
        if with_marks:
            columns |= {"sidecar_sizes": np.uint32, "sidecar_mtimes": np.int64}
        self._columns = {name: ColumnWriter(folder / f"{name}.npy", dtype) for name, dtype in columns.items()}
        self._tag_lengths: list[NDArray[np.int32]] = []
        self._path_lengths: list[NDArray[np.int32]] = []
        self._tag_counts = np.zeros(1024, dtype=np.int64)
        self._rating_counts = np.zeros(len(RATING_CODES), dtype=np.int64)

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for column in self._columns.values():
            column.__exit__(kind, error, trace)

    def append(
        self,
        tags: NDArray[np.int64],
        tag_lengths: NDArray[np.int32],
        paths: NDArray[np.uint8],
        path_lengths: NDArray[np.int32],
        **columns: NDArray[Any],
    ) -> None:
        """Add N rows: provisional numbers of their tags, flat, and UTF-8 paths, flat, with N lengths of each.

        columns: image_ids, ratings and, if the writer has them, sidecar_sizes and sidecar_mtimes, of N values each.
        """
        numbers = self.tags.finalise(tags)
        if len(self.tags.names) > len(self._tag_counts):
            self._tag_counts = np.concatenate([self._tag_counts, np.zeros(2 * len(self.tags.names), dtype=np.int64)])
        counts = np.bincount(numbers)
        self._tag_counts[: len(counts)] += counts
        self._rating_counts += np.bincount(columns["ratings"], minlength=len(RATING_CODES))
        self._columns["tag_ids"].append(numbers)
        self._columns["paths"].append(paths)
        for name, values in columns.items():
            self._columns[name].append(values)
        self._tag_lengths.append(tag_lengths)
        self._path_lengths.append(path_lengths)
        self._num_written += len(tag_lengths)

    def add(self, path: str, tags: Iterable[str], rating: str | None) -> None:
        """Append one row by its names: the POSIX path of its image, distinct tags, a rating of RATINGS or None."""
        self._added.append((path, tuple(tags), rating))
        if len(self._added) == BLOCK_ROWS:
            self._append_added()

    def _append_added(self) -> None:
        added, self._added = self._added, []
        paths = [path.encode("utf-8", "surrogatepass") for path, _, _ in added]
        self.append(
            self.tags.intern(tag for _, tags, _ in added for tag in tags),
            np.array([len(tags) for _, tags, _ in added], dtype=np.int32),
            np.frombuffer(b"".join(paths), dtype=np.uint8),
            np.array([len(path) for path in paths], dtype=np.int32),
            image_ids=stem_ids([path for path, _, _ in added]),
            ratings=np.array([RATING_CODES[rating] for _, _, rating in added], dtype=np.uint8),
        )

    def close(self) -> dict[str, int]:
        """Complete the columns on the disk; gives the sizes of the files in bytes by name."""
        if self._added:
            self._append_added()
        extra = {
            "tag_offsets": offsets_of(_joined(self._tag_lengths)),
            "path_offsets": offsets_of(_joined(self._path_lengths)),
            "tag_counts": self._tag_counts[: len(self.tags.names)],
        }
        sizes = {column.path.name: column.close() for column in self._columns.values()}
        return sizes | {f"{name}.npy": write_column(self._folder / f"{name}.npy", extra[name]) for name in extra}

    @property
    def num_rows(self) -> int:
        """Rows taken so far."""
        return self._num_written + len(self._added)

    @property
    def rating_counts(self) -> list[int]:
        """Rows of each of RATING_CODES."""
        return [int(count) for count in self._rating_counts]


def _joined(parts: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
