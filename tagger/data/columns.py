"""Columns of an index: `.npy` files that are written piece by piece and memory-mapped when read.

A piece goes to the page cache at once, so a column of any length costs the writer no memory.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from tagger.files import FormatError

_HEADER_BYTES = 128
_COPY_ITEMS = 1 << 22


class ColumnWriter:
    """One column in the making. Widens an unsigned integer type when a value does not fit."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self.path = path
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.num_items = 0
        self._stream = path.open("w+b")
        self._stream.write(bytes(_HEADER_BYTES))

    def __enter__(self) -> "ColumnWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def append(self, values: NDArray[Any]) -> None:
        """Add values: integers that fit the type, or that widen it."""
        if self.dtype.kind == "u" and values.dtype.itemsize > self.dtype.itemsize and len(values):
            wider = np.min_scalar_type(int(values.max()))
            if wider.itemsize > self.dtype.itemsize:
                self._widen(wider)
        self._write(values)

    def close(self) -> int:
        """Complete the file so that it is on the disk; gives its size in bytes."""
        header = {"descr": npy_format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.num_items,)}
        self._stream.seek(0)
        npy_format.write_array_header_1_0(self._stream, header)
        assert self._stream.tell() == _HEADER_BYTES
        self._stream.flush()
        os.fsync(self._stream.fileno())
        size = self._stream.seek(0, os.SEEK_END)
        self._stream.close()
        return size

    def _write(self, values: NDArray[Any]) -> None:
        self._stream.write(np.ascontiguousarray(values, dtype=self.dtype).data)
        self.num_items += len(values)

    def _widen(self, dtype: np.dtype[Any]) -> None:
        self._stream.flush()
        old = (
            np.memmap(self.path, dtype=self.dtype, mode="r", offset=_HEADER_BYTES, shape=(self.num_items,))
            if self.num_items
            else np.empty(0, dtype=self.dtype)
        )
        wide = ColumnWriter(self.path.with_suffix(".wide"), dtype.type)
        for start in range(0, len(old), _COPY_ITEMS):
            wide._write(old[start : start + _COPY_ITEMS])
        del old
        self._stream.close()
        wide._stream.close()
        wide.path.replace(self.path)
        self.dtype = dtype
        self._stream = self.path.open("r+b")
        self._stream.seek(0, os.SEEK_END)


def open_column(path: Path) -> NDArray[Any]:
    """A column, memory-mapped and read-only. Raises FormatError where its head is not that of a column."""
    try:
        # A plain view of the map: np.memmap's own indexing costs several times an ndarray's.
        mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except Exception as error:  # NumPy parses the head as text, which fails in as many ways as text can be wrong
        raise FormatError(f"column {path} is damaged: its head cannot be read") from error
    return mapped


def write_column(path: Path, values: NDArray[Any]) -> int:
    """Write a whole column to the disk; gives its size in bytes."""
    with ColumnWriter(path, values.dtype.type) as column:
        column.append(values)
        return column.close()


def offsets_of(lengths: NDArray[Any]) -> NDArray[Any]:
    """int32 or, where it has to be, int64 [N + 1]: the running total of N lengths."""
    total = int(lengths.sum(dtype=np.int64))
    dtype = np.int32 if total <= np.iinfo(np.int32).max else np.int64
    offsets = np.zeros(len(lengths) + 1, dtype=dtype)
    np.cumsum(lengths, dtype=dtype, out=offsets[1:])
    return offsets
