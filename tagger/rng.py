"""Keyed randomness: every draw is a function of a tuple of integers, the same in every process, platform and version.

A draw for (seed, epoch, row) needs no generator state, so it survives resume, another number of workers and another
batch size. Not for secrets: the hash is statistical, not cryptographic.
"""

import hashlib
from typing import overload

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.integer]

_MASK = (1 << 64) - 1
_START = 0x243F6A8885A308D3
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB


def stable_id(text: str) -> int:
    """64-bit id of a text (BLAKE2b of its UTF-8, little-endian), 0..2**64-1.

    Lone surrogates, which stand for undecodable bytes in file names, are hashed as they are.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@overload
def mix(*values: int) -> int: ...
@overload
def mix(first: Array, /, *values: int | Array) -> NDArray[np.uint64]: ...
@overload
def mix(first: int, second: Array, /, *values: int | Array) -> NDArray[np.uint64]: ...
@overload
def mix(first: int, second: int, third: Array, /, *values: int | Array) -> NDArray[np.uint64]: ...
@overload
def mix(first: int, second: int, third: int, fourth: Array, /, *values: int | Array) -> NDArray[np.uint64]: ...
def mix(*values: int | Array) -> int | NDArray[np.uint64]:
    """Hash a tuple of integers to 64 bits; arrays broadcast to a uint64 array, integers alone give an int.

    The order of the values counts. Negative values are taken modulo 2**64. Each value passes through the SplitMix64
    finaliser (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014), chained over the tuple.
    """
    state: int | NDArray[np.uint64] = _START
    for value in values:
        if isinstance(value, np.ndarray) and value.dtype.kind not in "iu":
            raise TypeError(f"mix takes integers; got an array of {value.dtype}")
        if isinstance(value, np.ndarray) and value.ndim:
            state = _finalise_array(_as_uint64(state) ^ value.astype(np.uint64))
        elif isinstance(state, np.ndarray):
            state = _finalise_array(state ^ np.uint64(int(value) & _MASK))
        else:
            state = _finalise(state ^ (int(value) & _MASK))
    return state


@overload
def uniform(hashed: int) -> float: ...
@overload
def uniform(hashed: NDArray[np.uint64]) -> NDArray[np.float64]: ...
def uniform(hashed: int | NDArray[np.uint64]) -> float | NDArray[np.float64]:
    """The upper 53 bits of a hash as a float64 in 0 <= x < 1."""
    if isinstance(hashed, np.ndarray):
        return (hashed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (int(hashed) >> 11) * 2.0**-53


def _as_uint64(state: int | NDArray[np.uint64]) -> NDArray[np.uint64]:
    # One element, not a scalar or 0-d array: NumPy warns when those overflow, and overflow is what the hash is made of.
    return np.array([state], dtype=np.uint64) if isinstance(state, int) else state


def _finalise(state: int) -> int:
    state = (state + _GOLDEN) & _MASK
    state = ((state ^ (state >> 30)) * _MULTIPLY_1) & _MASK
    state = ((state ^ (state >> 27)) * _MULTIPLY_2) & _MASK
    return state ^ (state >> 31)


def _finalise_array(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + np.uint64(_GOLDEN)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_MULTIPLY_1)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_MULTIPLY_2)
    return state ^ (state >> np.uint64(31))
