"""Which rows are held out for validation: by a list of image names, or by a hash of the image's id.

The hash knows nothing of the training seed or of the other images, so no image changes side when the set grows.
Refuses splits with an empty side.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from tagger.errors import InputError
from tagger.rng import mix, stable_id, uniform

logger = logging.getLogger(__name__)

_SPLIT_STREAM = stable_id("split/validation")


class SplitError(InputError):
    """A split that cannot be used; the message says what to change."""


@dataclass(frozen=True)
class Split:
    """validation: bool [N], true where a row is held out. Every other row is for training."""

    validation: NDArray[np.bool_]

    @property
    def training_rows(self) -> NDArray[np.integer]:
        return self._rows(~self.validation)

    @property
    def validation_rows(self) -> NDArray[np.integer]:
        return self._rows(self.validation)

    @staticmethod
    def _rows(mask: NDArray[np.bool_]) -> NDArray[np.integer]:
        # Four bytes a row where they suffice: at ten million rows the order of an epoch is made from this array.
        dtype = np.int32 if len(mask) <= np.iinfo(np.int32).max else np.int64
        return np.flatnonzero(mask).astype(dtype)


def split_rows(
    image_ids: NDArray[np.uint64],
    image_path: Callable[[int], PurePath],
    *,
    val_list: Path | None,
    val_fraction: float,
) -> Split:
    """Split rows by `val_list` where there is one, else by hash.

    image_ids: uint64 [N], `stable_id` of each stem. image_path: row -> path of the image.
    Raises SplitError when the list cannot be read or one side is empty.
    """
    if val_list is None:
        validation = hashed_mask(image_ids, val_fraction)
        chosen = f"data.val_fraction={val_fraction} of {len(image_ids)} images"
        more, fewer = "raise data.val_fraction or add images", "lower data.val_fraction or add images"
    else:
        validation = listed_mask(image_ids, image_path, read_list(val_list), str(val_list))
        chosen = f"data.val_list={val_list} with {len(image_ids)} images"
        more = "write one image name without its suffix per line, or leave data.val_list out to split by hash"
        fewer = "take names out of the list, or leave data.val_list out to split by hash"
    split = Split(validation)
    if not validation.any():
        raise SplitError(f"{chosen} leaves no image for validation; {more}")
    if validation.all():
        raise SplitError(f"{chosen} leaves no image for training; {fewer}")
    return split


def hashed_mask(image_ids: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """bool [N]: true for about `fraction` of the ids; an id's side depends on nothing else."""
    return uniform(mix(_SPLIT_STREAM, image_ids)) < fraction


def listed_mask(
    image_ids: NDArray[np.uint64], image_path: Callable[[int], PurePath], lines: list[str], source: str
) -> NDArray[np.bool_]:
    """bool [N]: true where a line is the stem of the row's image, or, with a '/', the end of its path without suffix.

    Lines that match nothing are logged, `source` naming the list.
    """
    validation = np.zeros(len(image_ids), dtype=np.bool_)
    line_ids = np.array([stable_id(line.rpartition("/")[2]) for line in lines], dtype=np.uint64)
    candidates = np.flatnonzero(np.isin(image_ids, line_ids))
    rows_of: dict[int, list[int]] = {}
    for row in candidates:
        rows_of.setdefault(int(image_ids[row]), []).append(int(row))
    unmatched: list[str] = []
    for line, line_id in zip(lines, line_ids, strict=True):
        rows = rows_of.get(int(line_id), [])
        if "/" in line:
            ending = f"/{line.lstrip('/')}"
            rows = [row for row in rows if f"/{image_path(row).with_suffix('').as_posix()}".endswith(ending)]
        validation[rows] = True
        if not rows:
            unmatched.append(line)
    _report_unmatched(unmatched, len(lines), source)
    return validation


def read_list(path: Path) -> list[str]:
    """The names in a list file, one a line; blank lines are skipped. Raises SplitError when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SplitError(f"list {path} cannot be read: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise SplitError(
            f"list {path} is not UTF-8 text ({error.reason} at byte {error.start}); save it anew"
        ) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _report_unmatched(unmatched: list[str], num_lines: int, source: str) -> None:
    if not unmatched:
        return
    examples = ", ".join(unmatched[:3])
    if len(unmatched) == num_lines:
        logger.error("%s: none of its %d lines names an image of this data set, e.g. %s", source, num_lines, examples)
    else:
        logger.warning("%s: %d of %d lines name no image, e.g. %s", source, len(unmatched), num_lines, examples)
