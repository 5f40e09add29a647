"""Where a loader stands, as JSON: samples of an epoch, and whose they are. Refuses a position of another order."""

import logging
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tagger.data.corrections import Corrections
from tagger.data.sampler import RowSampler, hash_rows
from tagger.errors import InputError

logger = logging.getLogger(__name__)

Position = dict[str, int]

_OWN = {"epoch", "samples", "seed", "rows", "rows_hash"}
# Only with aspect buckets.
_GROUPED = {"grouping", "whole"}
_NAMES = {
    "seed": "training.seed",
    "rows": "number of images",
    "rows_hash": "images or split (hash)",
    "sampling": "data.sampling (hash)",
    "corrections": "data.corrections_file (hash)",
}
# What a plain loader has as 0 is left out, and read so.
_OPTIONAL = {"sampling", "corrections"}


class PositionError(InputError):
    """A position that this loader cannot resume from; the message names what differs."""


def order_identity(
    keys: NDArray[np.uint64], rows: NDArray[np.integer], sampler: RowSampler, corrections: Corrections | None
) -> dict[str, int]:
    """What the order in which a loader serves `rows`, known by `keys`, uint64 over the index, depends on."""
    return {
        "seed": -1 if sampler.seed is None else sampler.seed,
        "rows": len(rows),
        "rows_hash": hash_rows(keys, rows),
        "sampling": sampler.scheme,
        "corrections": 0 if corrections is None else corrections.hash,
    }


def differences(position: Mapping[str, int], identity: Mapping[str, int]) -> dict[str, str]:
    """What makes a position one of another order than `identity`, in words, by name; empty where it is the same.

    `identity`: what a loader's order depends on. Raises PositionError for what is no position of any loader.
    """
    whole_numbers = all(type(value) is int for value in position.values())
    grouped = position.keys() & _GROUPED
    if position.keys() - _OPTIONAL - grouped != _OWN or len(grouped) == 1 or not whole_numbers:
        raise PositionError(f"{dict(position)} is not a position of a loader; it has {', '.join(sorted(_OWN))}")
    return {
        key: f"{_NAMES[key]} {position.get(key, 0)} there, {value} here"
        for key, value in identity.items()
        if position.get(key, 0) != value
    }


def check_position(position: Mapping[str, int], identity: Mapping[str, int]) -> bool:
    """Whether a position says how rows were grouped. Raises PositionError where it is of another loader."""
    if found := differences(position, identity):
        raise PositionError(
            f"the position to resume from belongs to another order of images: {'; '.join(found.values())}; "
            "bring back the data set and the settings, or start a new run"
        )
    check_range(position)
    return "grouping" in position


def identified(position: Mapping[str, int], identity: Mapping[str, int]) -> Position:
    """The position as one of a loader of `identity`."""
    return {k: v for k, v in {**position, **identity}.items() if v or k not in _OPTIONAL}


def carry_over(
    position: Mapping[str, int], identity: Mapping[str, int], step: int, start: Position, end: Position
) -> Position:
    """A position of `identity` in place of one whose images, split, sampling or corrections differ; itself otherwise.

    Corrected tags leave the order of images as it was, so the epoch goes on with them. Of anything else there is no
    place in the new order that says which images were seen, so the epoch starts again, unless it was over: less than a
    `step` of images was left of it. start, end: the positions to be at then. A warning says what happens. Raises
    PositionError for another seed, which is no change of the data set.
    """
    found = differences(position, identity)
    if not found or "seed" in found:
        check_position(position, identity)
        return dict(position)
    check_range(position)
    listed = "; ".join(found.values())
    if found.keys() == {"corrections"}:
        logger.warning("tags were corrected since the checkpoint (%s): the epoch goes on with the new ones", listed)
        return identified(position, identity)
    samples = position["samples"]
    over = position["rows"] - max(samples, position.get("whole", 0)) < step
    again = f"starts again with the new ones, so that {samples} images may come a second time"
    what = "was over, and the next one has the new ones" if over else again
    message = "the images to train on are not those of the checkpoint (%s): epoch %d %s"
    logger.warning(message, listed, position["epoch"] + 1, what)
    return end if over else start


def check_range(position: Mapping[str, int]) -> None:
    """Raise PositionError for a position that is not inside its own epoch."""
    samples, num_rows = position["samples"], position["rows"]
    if position["epoch"] < 0 or not (0 <= samples <= num_rows and 0 <= position.get("whole", 0) <= num_rows):
        raise PositionError(f"position epoch={position['epoch']}, samples={samples} is outside 0..{num_rows}")
