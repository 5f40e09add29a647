"""Aspect buckets: a few image shapes of about as many tokens each, so that little of a batch is padding.

Refuses a square of fewer than three patches a side: there is no second shape within its budget.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, int]

MAX_ASPECT = 2.0  # width / height of the widest images that have a bucket of their own; the tallest mirror it
# Resizing scales one side by at least this share of the other: a crop of 5 % would lose as much.
MIN_SCALE_RATIO = 0.95
_MOST_SHAPES = 21


def aspect_shapes(image_size: int, patch_size: int) -> tuple[Shape, ...]:
    """(height, width) in pixels of each bucket, from the tallest to the widest.

    Sides are multiples of `patch_size`; none has more tokens than the square of `image_size`, which is among them.
    Transposing the list reverses it. Raises ValueError where there is no other shape than the square.
    """
    side = image_size // patch_size
    if image_size % patch_size or side < 3:
        raise ValueError(
            f"image_size={image_size} is not a multiple of patch_size={patch_size} with 3 patches a side or more; "
            f"aspect buckets need at least {3 * patch_size}"
        )
    wide: list[Shape] = []
    for rows in range(side, 0, -1):
        columns = side * side // rows
        if columns / rows > MAX_ASPECT / MIN_SCALE_RATIO:
            break
        wide.append((rows, columns))
    while 2 * len(wide) - 1 > _MOST_SHAPES:
        # Each shape costs a compilation: the one goes whose neighbours are nearest to each other.
        gaps = [_aspect(wide[i + 1]) / _aspect(wide[i - 1]) for i in range(1, len(wide) - 1)]
        del wide[1 + int(np.argmin(gaps))]
    tall = [(columns, rows) for rows, columns in reversed(wide[1:])]
    return tuple((rows * patch_size, columns * patch_size) for rows, columns in (*tall, *wide))


def aspects_of(widths: NDArray[np.integer], heights: NDArray[np.integer]) -> NDArray[np.float64]:
    """Width / height; 1 where either is 0, which stands for unknown."""
    known = (widths > 0) & (heights > 0)
    aspects: NDArray[np.float64] = np.where(known, widths, 1) / np.where(known, heights, 1)
    return aspects


def nearest_shape(shapes: tuple[Shape, ...], aspects: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which of `shapes` (from `aspect_shapes`) is nearest to each aspect, by its logarithm."""
    # Quotients and roots round alike everywhere, which logarithms do not: an image has one bucket on every machine.
    return np.searchsorted(_borders(shapes), aspects, side="right").astype(np.int64)


@lru_cache
def _borders(shapes: tuple[Shape, ...]) -> NDArray[np.float64]:
    aspects = np.array([_aspect(shape) for shape in shapes])
    borders: NDArray[np.float64] = np.sqrt(aspects[:-1] * aspects[1:])
    return borders


def _aspect(shape: Shape) -> float:
    return shape[1] / shape[0]
