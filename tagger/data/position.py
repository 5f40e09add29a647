"""Where a loader stands, as JSON: samples of an epoch, and whose they are. Refuses a position of another order."""

from collections.abc import Mapping

from tagger.errors import InputError

Position = dict[str, int]

_OWN = {"epoch", "samples", "seed", "rows", "rows_hash"}
# Only with aspect buckets.
_GROUPED = {"grouping", "whole"}
_NAMES = {
    "seed": "training.seed",
    "rows": "number of images",
    "rows_hash": "images or split (hash)",
    "sampling": "data.sampling (hash)",
}


class PositionError(InputError):
    """A position that this loader cannot resume from; the message names what differs."""


def differences(position: Mapping[str, int], identity: Mapping[str, int]) -> dict[str, str]:
    """What makes a position one of another order than `identity`, in words, by name; empty where it is the same.

    `identity`: what a loader's order depends on. Raises PositionError for what is no position of any loader.
    """
    whole_numbers = all(type(value) is int for value in position.values())
    grouped = position.keys() & _GROUPED
    if position.keys() - {"sampling"} - grouped != _OWN or len(grouped) == 1 or not whole_numbers:
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


def check_range(position: Mapping[str, int]) -> None:
    """Raise PositionError for a position that is not inside its own epoch."""
    samples, num_rows = position["samples"], position["rows"]
    if position["epoch"] < 0 or not (0 <= samples <= num_rows and 0 <= position.get("whole", 0) <= num_rows):
        raise PositionError(f"position epoch={position['epoch']}, samples={samples} is outside 0..{num_rows}")
