"""A few images whose keys are kept where only counts are kept of the rest.

The images of the lowest hashes stay, so that the choice depends on which images there are, not on their order.
"""

import numpy as np
import numpy.typing as npt

from tagger.metrics.keys import Keys
from tagger.rng import mix

_SEED = 0x5A3B1E


def image_order(image_ids: npt.NDArray[np.integer], seed: int = _SEED) -> npt.NDArray[np.uint64]:
    """A number for each image by which to choose some at random, uint64 [N]."""
    return np.asarray(mix(seed, image_ids.astype(np.int64)), dtype=np.uint64)


class ImageSample:
    """At most `size` images with their keys; up to twice as many on the way, 2 bytes for each and each tag."""

    def __init__(self, num_tags: int, size: int) -> None:
        self.size = size
        self._orders: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        self._places: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._rows: list[Keys] = [np.empty((0, num_tags), np.int16)]

    def chosen(self, orders: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Which of some images may be among the chosen: their indices."""
        if len(self._orders) < self.size:
            return np.arange(len(orders))
        return np.flatnonzero(orders < self._orders.max())

    def add(self, orders: npt.NDArray[np.uint64], places: npt.NDArray[np.int64], keys: Keys) -> None:
        """Add images: `image_order` [n], place among all images [n], keys int16 [n, C]."""
        self._orders = np.concatenate([self._orders, orders])
        self._places = np.concatenate([self._places, places])
        self._rows.append(np.array(keys))
        if len(self._orders) > 2 * self.size:
            self._keep()

    def images(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64], Keys]:
        """`image_order` [n], place [n] and keys [n, C] of the chosen images."""
        self._keep()
        return self._orders, self._places, self._rows[0]

    def _keep(self) -> None:
        kept = np.argsort(self._orders, kind="stable")[: self.size]
        self._orders, self._places = self._orders[kept], self._places[kept]
        self._rows = [np.concatenate(self._rows)[kept]]
