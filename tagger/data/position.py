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


def check_position(position: Mapping[str, int], identity: Mapping[str, int]) -> bool:
    """Whether a position says how rows were grouped. Raises PositionError where it is of another loader.

    `identity`: what the loader's order depends on. `samples` and `whole` are checked against the number of rows.
    """
    grouped = position.keys() & _GROUPED
    whole_numbers = all(type(value) is int for value in position.values())
    if position.keys() - {"sampling"} - grouped != _OWN or len(grouped) == 1 or not whole_numbers:
        raise PositionError(f"{dict(position)} is not a position of a loader; it has {', '.join(sorted(_OWN))}")
    found = [
        f"{_NAMES[key]} {position.get(key, 0)} there, {value} here"
        for key, value in identity.items()
        if position.get(key, 0) != value
    ]
    if found:
        raise PositionError(
            f"the position to resume from belongs to another order of images: {'; '.join(found)}; "
            "bring back the data set and the settings, or start a new run"
        )
    samples, num_rows = position["samples"], identity["rows"]
    if position["epoch"] < 0 or not (0 <= samples <= num_rows and 0 <= position.get("whole", 0) <= num_rows):
        raise PositionError(f"position epoch={position['epoch']}, samples={samples} is outside 0..{num_rows}")
    return bool(grouped)
