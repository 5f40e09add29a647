"""Images with their sidecars as they are found, in flat buffers: about 80 bytes a pair, no Python object that stays."""

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

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
        self._paths = bytearray()
        self._ends = array("q", [0])
        self._suffixes = bytearray()
        self._sizes = array("q")
        self._mtimes = array("q")

    def __len__(self) -> int:
        return len(self._suffixes)

    def extend(
        self,
        prefix: str,
        names: Sequence[str],
        suffixes: Iterable[int],
        sizes: Iterable[int],
        mtimes: Sequence[int],
        rivals: frozenset[str] = frozenset(),
    ) -> None:
        """Append images of one folder: `prefix` is "" or its path below the root with a slash at the end.

        suffixes: SUFFIX_NUMBERS of the sidecars. sizes, mtimes: their marks. rivals: stems that several of the
        folder's images share.
        """
        if rivals:
            for row, name in enumerate(names, len(self)):
                if (stem := name[: name.rfind(".")]) in rivals:
                    self.rivals.setdefault(prefix + stem, []).append(row)
        text = (prefix + prefix.join(names)).encode("utf-8", "surrogatepass")
        if len(text) == sum(map(len, names)) + len(prefix) * len(names):
            lengths = [len(prefix) + len(name) for name in names]
        else:
            lengths = [len((prefix + name).encode("utf-8", "surrogatepass")) for name in names]
        ends = accumulate(lengths, initial=len(self._paths))
        next(ends)
        self._ends.extend(ends)
        self._paths += text
        self._suffixes += bytes(suffixes)
        self._sizes.extend(sizes)
        try:
            self._mtimes += array("q", mtimes)
        except OverflowError:
            self._mtimes += array("q", map(as_int64, mtimes))

    def images(self, rows: range | Sequence[int]) -> list[str]:
        """POSIX paths of images below the root."""
        if isinstance(rows, range) and rows.step == 1 and len(rows):
            ends = self._ends[rows.start : rows.stop + 1]
            first = ends[0]
            content = bytes(self._paths[first : ends[-1]])
            if content.isascii():
                text = content.decode("ascii")
                return [text[start - first : end - first] for start, end in pairwise(ends)]
        return [self._image(row) for row in rows]

    def sidecar(self, row: int) -> str:
        """POSIX path of a sidecar below the root."""
        return sidecar_of(self._image(row), self._suffixes[row])

    def sidecars(self, images: Sequence[str], rows: range | Sequence[int]) -> list[str]:
        """POSIX paths of the sidecars of `rows`, whose `images` are known."""
        numbers = self._suffixes
        return [f"{image[: image.rfind('.')]}{SUFFIXES[numbers[row]]}" for image, row in zip(images, rows, strict=True)]

    # Views of the buffers: once one is alive, the table must not grow.

    @property
    def paths(self) -> NDArray[np.uint8]:
        """All image paths, UTF-8 (lone surrogates pass), one after the other."""
        return np.frombuffer(self._paths, dtype=np.uint8)

    @property
    def ends(self) -> NDArray[np.int64]:
        """int64 [N + 1]: path i is `paths[ends[i]:ends[i + 1]]`."""
        return np.frombuffer(self._ends, dtype=np.int64)

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
        return bytes(self._paths[self._ends[row] : self._ends[row + 1]]).decode("utf-8", "surrogatepass")


def sidecar_of(image: str, suffix: int) -> str:
    """Path of the sidecar of an image, its suffix given by number."""
    return image[: image.rfind(".")] + SUFFIXES[suffix]


def as_int64(mtime_ns: int) -> int:
    """A time in ns, wrapped where it lies beyond the year 2262."""
    return mtime_ns if -(1 << 63) <= mtime_ns < 1 << 63 else (mtime_ns + (1 << 63)) % (1 << 64) - (1 << 63)
