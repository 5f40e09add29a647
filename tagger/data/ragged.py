"""Lists of different lengths, flat: picking some of them out of memory-mapped arrays, and packing new ones."""

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


def distinct(values: Numbers) -> Numbers:
    """The different values, ascending: `np.unique`, whose hash table takes 5 to 20 times the time of a sort here."""
    ranked = np.sort(values)
    is_first = np.ones(len(ranked), dtype=np.bool_)
    np.not_equal(ranked[1:], ranked[:-1], out=is_first[1:])
    return ranked[is_first]


def gather(offsets: NDArray[np.signedinteger], values: NDArray[np.integer], lists: Numbers) -> tuple[Numbers, Numbers]:
    """The values of some lists: (values [T], and the place in `lists` that each belongs to [T]).

    List i is `values[offsets[i]:offsets[i + 1]]`.
    """
    starts = offsets[lists]
    lengths = offsets[lists + 1] - starts
    places = np.repeat(np.arange(len(lists)), lengths)
    first = np.cumsum(lengths) - lengths
    picked = values[np.arange(len(places)) + np.repeat(starts - first, lengths)]
    return picked.astype(np.int64), places


def pack(
    values: Numbers, places: Numbers, num_lists: int, num_values: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(values int32 [T], offsets int32 [num_lists + 1]): each list ascending, without repeats.

    values: 0 .. num_values - 1, in any order. places: the list that each belongs to.
    """
    places, ascending = np.divmod(distinct(places * num_values + values), num_values)
    offsets = np.zeros(num_lists + 1, dtype=np.int32)
    np.cumsum(np.bincount(places, minlength=num_lists), out=offsets[1:])
    return ascending.astype(np.int32), offsets
