"""Images with their sidecars as they are found, in flat buffers: about 80 bytes a pair, no Python object that stays."""

from array import array
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

# What the suffix of a sidecar may be, by number: which of its letters are large.
SUFFIXES = tuple(
    "." + "".join(letter.upper() if number >> place & 1 else letter for place, letter in enumerate("json"))
    for number in range(16)
)
SUFFIX_NUMBERS = {suffix[1:]: number for number, suffix in enumerate(SUFFIXES)}
# The mark of a sidecar that nobody has looked at, or that could not be read: (size, mtime_ns).
NO_MARK = (-1, 0)


class PairTable:
    """(image, sidecar) pairs of one root in the order of the images' paths.

    A sidecar has the path of its image up to the suffix. Its mark is its size in bytes and its time in ns. `rivals`
    are groups of pairs whose images share one sidecar: at most one pair of each is real, and only the content of the
    sidecar says which.
    """

    def __init__(self) -> None:
        self.rivals: dict[str, list[int]] = {}
        # UTF-8 (lone surrogates pass), a NUL, which no name holds, after each: one call splits many.
        self._paths = bytearray()
        self._ends = array("q", [0])
        self._image_suffixes: dict[bytes, None] = {}
        self._suffixes = bytearray()
        self._sizes = array("q")
        self._mtimes = array("q")

    def __len__(self) -> int:
        return len(self._suffixes)

    def extend(
        self,
        prefix: str,
        names: Sequence[str],
        suffixes: bytes,
        sizes: "array[int]",
        mtimes: "array[int]",
        rivals: frozenset[str] = frozenset(),
        image_suffixes: Iterable[str] = (),
    ) -> None:
        """Append images of one folder: `prefix` is "" or its path below the root with a slash at the end.

        suffixes: SUFFIX_NUMBERS of the sidecars. sizes, mtimes: int64, their marks. rivals: stems that several of the
        folder's images share. image_suffixes: the ends of the names (".png"), where known: sidecars are named faster.
        """
        if not names:
            return
        if rivals:
            for row, name in enumerate(names, len(self)):
                if (stem := name[: name.rfind(".")]) in rivals:
                    self.rivals.setdefault(prefix + stem, []).append(row)
        text = (prefix + f"\0{prefix}".join(names) + "\0").encode("utf-8", "surrogatepass")
        ends = np.flatnonzero(np.frombuffer(text, dtype=np.uint8) == 0) + (len(self._paths) + 1)
        self._ends.frombytes(ends.astype(np.int64, copy=False).tobytes())
        self._paths += text
        self._image_suffixes.update((suffix.encode("utf-8", "surrogatepass"), None) for suffix in image_suffixes)
        self._suffixes += suffixes
        self._sizes += sizes
        self._mtimes += mtimes

    def images(self, rows: Iterable[int]) -> list[str]:
        """POSIX paths of images below the root."""
        return [self._image(row) for row in rows]

    def sidecar(self, row: int) -> str:
        """POSIX path of a sidecar below the root."""
        return sidecar_of(self._image(row), self._suffixes[row])

    def sidecars(self, rows: range) -> list[str]:
        """POSIX paths of the sidecars of neighbouring rows."""
        text = bytes(self._paths[self._ends[rows.start] : self._ends[rows.stop]])
        if self._suffixes.count(0, rows.start, rows.stop) == len(rows):
            for suffix in self._image_suffixes:
                text = text.replace(suffix + b"\0", b".json\0")
            if text.count(b".json\0") == len(rows):
                return text.decode("utf-8", "surrogatepass").split("\0")[:-1]
        return [self.sidecar(row) for row in rows]

    def image_paths(self, start: int, stop: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Image paths of neighbouring rows, UTF-8 (lone surrogates pass), flat, and the length of each."""
        ends = np.frombuffer(self._ends, dtype=np.int64)[start : stop + 1]
        text = np.frombuffer(self._paths, dtype=np.uint8)[ends[0] : ends[-1]]
        return text[text != 0], (np.diff(ends) - 1).astype(np.int32)

    # Views of the buffers: once one is alive, the table must not grow.

    @property
    def paths(self) -> NDArray[np.uint8]:
        """All image paths, UTF-8 (lone surrogates pass), a NUL after each."""
        return np.frombuffer(self._paths, dtype=np.uint8)

    @property
    def suffixes(self) -> NDArray[np.uint8]:
        """uint8 [N], SUFFIX_NUMBERS of the sidecars."""
        return np.frombuffer(self._suffixes, dtype=np.uint8)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """int64 [N], bytes of the sidecars; -1 without mark. Writable."""
        return np.frombuffer(self._sizes, dtype=np.int64)

    @property
    def mtimes(self) -> NDArray[np.int64]:
        """int64 [N], times of the sidecars in ns. Writable."""
        return np.frombuffer(self._mtimes, dtype=np.int64)

    def _image(self, row: int) -> str:
        return bytes(self._paths[self._ends[row] : self._ends[row + 1] - 1]).decode("utf-8", "surrogatepass")


def sidecar_of(image: str, suffix: int) -> str:
    """Path of the sidecar of an image, its suffix given by number."""
    return image[: image.rfind(".")] + SUFFIXES[suffix]


def as_column(values: Iterable[int]) -> "array[int]":
    """Times in ns, or sizes, as int64."""
    values = [*values]
    try:
        return array("q", values)
    except OverflowError:
        return array("q", map(as_int64, values))


def as_int64(mtime_ns: int) -> int:
    """A time in ns, wrapped where it lies beyond the year 2262."""
    return mtime_ns if -(1 << 63) <= mtime_ns < 1 << 63 else (mtime_ns + (1 << 63)) % (1 << 64) - (1 << 63)
