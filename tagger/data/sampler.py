"""The order of an epoch: a function of (seed, epoch, position), with no state that grows with the data set.

A keyed permutation gives any position its row directly, so a run resumes at sample k by asking for sample k.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tagger.rng import mix, stable_id

_ORDER_STREAM = stable_id("sampler/order")
_RESERVE_STREAM = stable_id("sampler/reserve")
_DOUBLE_ROUNDS = 6
_HASH_CHUNK = 1 << 20


class Permutation:
    """A keyed bijection of 0 .. num_items - 1, evaluated at any positions in O(1) memory.

    An unbalanced Feistel network on pairs (left, right) of two residue rings whose product is the smallest that holds
    num_items (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002); values past the end walk the cycle
    until they fall inside, fewer than 1 + 1 / sqrt(num_items) steps on average.
    """

    def __init__(self, num_items: int, key: int) -> None:
        if num_items < 1:
            raise ValueError(f"a permutation of {num_items} items does not exist; at least one is needed")
        self.num_items = num_items
        num_left = int(np.ceil(np.sqrt(num_items)))
        self._left = np.uint64(num_left)
        self._right = np.uint64(-(-num_items // num_left))
        self._round_keys = [mix(key, index) for index in range(2 * _DOUBLE_ROUNDS)]

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [N] positions, each 0 .. num_items - 1 -> int64 [N] items."""
        items = self._shuffle(positions.astype(np.uint64))
        outside = np.flatnonzero(items >= self.num_items)
        while outside.size:
            items[outside] = self._shuffle(items[outside])
            outside = outside[items[outside] >= self.num_items]
        return items.astype(np.int64)

    def _shuffle(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values // self._right, values % self._right
        for left_key, right_key in zip(self._round_keys[::2], self._round_keys[1::2], strict=True):
            left = (left + mix(left_key, right) % self._left) % self._left
            right = (right + mix(right_key, left) % self._right) % self._right
        return left * self._right + right


@dataclass(frozen=True)
class RowSampler:
    """Which row stands at which position of which epoch.

    rows: integer [N], the rows to draw from. seed: None serves them in the order given, in every epoch.
    """

    rows: NDArray[np.integer]
    seed: int | None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def scheme(self) -> int:
        """0 where an epoch serves every row once; else a hash, 1 .. 2**53 - 1, of how it draws them instead."""
        return 0

    def rows_at(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """int64 [stop - start]: the rows at positions start .. stop - 1 of an epoch."""
        positions = np.arange(start, stop, dtype=np.int64)
        if self.seed is not None:
            positions = Permutation(len(self), mix(_ORDER_STREAM, self.seed, epoch))(positions)
        return self._take(positions)

    def reserve_row(self, epoch: int, position: int, attempt: int) -> int:
        """The row that stands in for a refused one.

        Keyed by (seed, epoch, position in the epoch, attempt); the position names batch and slot at any batch size.
        """
        return int(self.reserve_rows(epoch, position, np.array([attempt]))[0])

    def reserve_rows(self, epoch: int, position: int, attempts: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [A]: `reserve_row` of each of the attempts, int64 [A]."""
        drawn = mix(_RESERVE_STREAM, self.seed or 0, epoch, np.array([position]), attempts)
        return self._take(drawn % np.uint64(len(self)))

    def _take(self, places: NDArray[np.integer]) -> NDArray[np.int64]:
        taken: NDArray[np.int64] = self.rows[places].astype(np.int64)
        return taken


def hash_rows(image_ids: NDArray[np.uint64], rows: NDArray[np.integer]) -> int:
    """Hash of which image stands where among the rows, 0 .. 2**53 - 1 (whole in every JSON reader)."""
    total = np.uint64(0)
    for start in range(0, len(rows), _HASH_CHUNK):
        part = image_ids[rows[start : start + _HASH_CHUNK]]
        total ^= np.bitwise_xor.reduce(mix(part, np.arange(start, start + len(part))))
    return int(total) >> 11
