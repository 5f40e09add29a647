"""A stable part of the held-out images for a quick look: by a hash of each image's id, like the split itself.

The same images every time and on every machine; when the set grows, an image that was in stays in for the same share.
Refuses a choice without images.
"""

import numpy as np
from numpy.typing import NDArray

from tagger.errors import InputError
from tagger.rng import mix, stable_id, uniform

_STREAM = stable_id("evaluation/subset")


def hashed_subset(
    rows: NDArray[np.integer],
    image_ids: NDArray[np.uint64],
    *,
    fraction: float | None = None,
    count: int | None = None,
) -> NDArray[np.integer]:
    """Some of `rows`, in their order: those whose hash is below `fraction`, or the `count` of the lowest hashes.

    image_ids: uint64 [N] of the whole index. Of images with one id, all or none fall below a fraction.
    """
    assert (fraction is None) != (count is None)
    hashed = mix(_STREAM, image_ids[rows])
    if fraction is not None:
        chosen: NDArray[np.integer] = rows[uniform(hashed) < fraction]
        if not len(chosen):
            raise InputError(
                f"--fraction {fraction:g} of {len(rows):,} images leaves none; raise it, or use --images N"
            )
        return chosen
    lowest: NDArray[np.integer] = rows[np.sort(np.argsort(hashed, kind="stable")[:count])]
    return lowest
