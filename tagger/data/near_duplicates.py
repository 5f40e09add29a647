"""Groups of near-duplicates among perceptual hashes, exact and without comparing every image with every other.

Two images are near-duplicates when their coarse words differ in at most `bits` bits and their fine words in at most
twice as many, both fewer where few bits are set (symmetric drawings: without that, unlike ones connect to one large
group). A group is whatever such pairs connect. Time grows with the number of images that share 32 bits of their
hashes, memory with the number of images. Refuses thresholds above MAX_BITS.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
Words = NDArray[np.uint64]

MAX_BITS = 8
_KEPT_BLOCKS = 3
_WORD_BITS = 64
# Differing bits for each bit set in either image, in units of `bits`: copies of icons and photographs stay below.
_COARSE_SHARE, _TOTAL_SHARE = 1 / 20, 3 / 40


@dataclass(frozen=True)
class NearDuplicates:
    """labels: int64 [N], the first row of each row's group (its own where it has no near-duplicate).

    num_pairs: pairs that are near-duplicates directly. num_identical: rows whose hash another row before them has.
    """

    labels: Rows
    num_pairs: int
    num_identical: int

    def groups(self) -> list[Rows]:
        """The rows of each group of two and more, ascending; the largest group first."""
        sizes = np.bincount(self.labels, minlength=len(self.labels))
        rows = np.flatnonzero(sizes[self.labels] > 1)
        rows = rows[np.argsort(self.labels[rows], kind="stable")]
        ends = np.flatnonzero(np.diff(self.labels[rows])) + 1
        found = np.split(rows, ends) if len(rows) else []
        return sorted(found, key=lambda group: (-len(group), int(group[0])))


def find_near_duplicates(hashes: Words, usable: NDArray[np.bool_], bits: int) -> NearDuplicates:
    """hashes: uint64 [N, 2], coarse and fine words. usable: bool [N]; a row that is not stays by itself."""
    labels = np.arange(len(hashes))
    rows = np.flatnonzero(usable)
    order = rows[np.lexsort((rows, hashes[rows, 1], hashes[rows, 0]))]
    ordered = hashes[order]
    first = np.ones(len(order), dtype=np.bool_)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    starts = np.flatnonzero(first)
    counts = np.diff(starts, append=len(order))
    num_pairs = int((counts * (counts - 1) // 2).sum())
    parents = np.arange(len(starts))
    for left, right in similar_pairs(ordered[starts], bits):
        num_pairs += int((counts[left] * counts[right]).sum())
        _unite(parents, left, right)
    roots = _roots(parents, np.arange(len(parents)))
    # The first row of a group, whatever the order of hashes is.
    first_rows = np.full(len(parents), len(hashes))
    np.minimum.at(first_rows, roots, order[starts])
    labels[order] = np.repeat(first_rows[roots], counts)
    return NearDuplicates(labels, num_pairs, len(order) - len(starts))


def similar_pairs(hashes: Words, bits: int) -> Iterator[tuple[Rows, Rows]]:
    """Each pair of near-duplicates once, as blocks of (left rows, right rows). hashes: uint64 [N, 2], all different.

    The coarse word is cut into `bits` + 3 blocks, so that a pair agrees in three of them at least; one sort for each
    choice of three blocks brings such pairs together (Manku, Jain, Das Sarma: Detecting Near-Duplicates for Web
    Crawling, 2007).
    """
    if not 0 <= bits <= MAX_BITS:
        raise ValueError(f"near-duplicates within {bits} bits: the threshold is 0 to {MAX_BITS}")
    coarse = hashes[:, 0]
    edges = [_WORD_BITS * block // (bits + _KEPT_BLOCKS) for block in range(bits + _KEPT_BLOCKS + 1)]
    masks = [np.uint64((1 << stop) - (1 << start)) for start, stop in itertools.pairwise(edges)]
    for chosen in itertools.combinations(range(len(masks)), _KEPT_BLOCKS):
        key = coarse & np.bitwise_or.reduce([masks[block] for block in chosen])
        # A pair that agrees in more blocks comes up more than once; it counts for the first choice that finds it.
        earlier = [masks[block] for block in range(chosen[-1]) if block not in chosen]
        for left, right in _pairs_with_equal_keys(key):
            differing = coarse[left] ^ coarse[right]
            new = np.bitwise_count(differing) <= bits
            for mask in earlier:
                new &= (differing & mask) != 0
            left, right = left[new], right[new]
            near = _confirmed(hashes[left], hashes[right], bits)
            if near.any():
                yield left[near], right[near]


def _confirmed(left: Words, right: Words, bits: int) -> NDArray[np.bool_]:
    differing = np.bitwise_count(left ^ right).astype(np.int64)
    either = np.bitwise_count(left | right).astype(np.int64)
    near = (differing[:, 1] <= 2 * bits) & (differing[:, 0] <= bits * _COARSE_SHARE * either[:, 0])
    confirmed: NDArray[np.bool_] = near & (differing.sum(axis=1) <= bits * _TOTAL_SHARE * either.sum(axis=1))
    return confirmed


def _pairs_with_equal_keys(keys: Words) -> Iterator[tuple[Rows, Rows]]:
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    step = 1
    places = np.flatnonzero(ordered[1:] == ordered[:-1])
    while places.size:
        yield order[places], order[places + step]
        step += 1
        places = places[places < len(order) - step]
        places = places[ordered[places] == ordered[places + step]]


def _unite(parents: Rows, left: Rows, right: Rows) -> None:
    """Union-find on arrays: hang the larger root of each pair below the smaller one until all pairs have one root."""
    while True:
        left, right = _roots(parents, left), _roots(parents, right)
        apart = left != right
        if not apart.any():
            return
        left, right = left[apart], right[apart]
        np.minimum.at(parents, np.maximum(left, right), np.minimum(left, right))


def _roots(parents: Rows, items: Rows) -> Rows:
    roots = parents[items]
    while True:
        above = parents[roots]
        if np.array_equal(above, roots):
            parents[items] = roots
            return roots
        roots = above
