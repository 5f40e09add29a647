"""Corrected tags laid over an index: the rows that a journal changes, with the tags and ratings that they have then.

Small next to the index, which stays what the sidecars say: a journal costs a search by path for each correction when a
data set is opened, and one search among the corrected rows for each batch. It travels to other processes as it is, so
all of them see one state, whatever is written to the journal meanwhile. A correction that does nothing, because the
sidecar says so already, the image is not there, or no tag would be left, is counted.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tagger.data.correction_log import Change, CorrectionLog, LastTagError, change_tags
from tagger.data.ragged import Numbers, gather
from tagger.data.sidecar import RATINGS
from tagger.errors import InputError
from tagger.record import Record

_EXAMPLES = 3


class Rows(Protocol):
    """What is asked of an index: its rows as the sidecars say."""

    @property
    def roots(self) -> tuple[Path, ...]: ...

    @property
    def tag_names(self) -> tuple[str, ...]: ...

    def find_row(self, root: int, image: str) -> int | None: ...

    def sidecar_record(self, row: int) -> Record: ...


@dataclass(frozen=True)
class Corrections:
    """Rows that a journal changes, ascending: int64 [K], their tags as one flat list with offsets, and rating codes.

    Tag numbers are the index's own, continued by `new_tags`. hash: of images, tags and ratings, 0 where no row changes.
    tag_changes, rating_changes: what is to be added to the index's counts, int64 by number and by rating code.
    """

    rows: Numbers
    tag_offsets: Numbers
    tag_ids: Numbers
    ratings: NDArray[np.uint8]
    new_tags: tuple[str, ...]
    tag_changes: Numbers
    rating_changes: Numbers
    hash: int
    report: tuple[str, ...]

    def replace(self, rows: Numbers, values: Numbers, places: Numbers) -> tuple[Numbers, Numbers]:
        """The tags of `rows` as gathered from the index, those of corrected rows replaced; places ascend."""
        found = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        corrected = self.rows[found] == rows
        if not corrected.any():
            return values, places
        hits = np.flatnonzero(corrected)
        own, own_places = gather(self.tag_offsets, self.tag_ids, found[hits])
        kept = ~corrected[places]
        values, places = np.concatenate([values[kept], own]), np.concatenate([places[kept], hits[own_places]])
        order = np.argsort(places, kind="stable")
        return values[order], places[order]

    def row_tags(self, row: int) -> Numbers | None:
        """Tag numbers of a row; None where it is not corrected."""
        place = int(np.searchsorted(self.rows, row))
        if place == len(self.rows) or self.rows[place] != row:
            return None
        return self.tag_ids[self.tag_offsets[place] : self.tag_offsets[place + 1]]

    def correct_ratings(self, ratings: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The ratings of all rows; the very array where none of them changes."""
        if np.array_equal(ratings[self.rows], self.ratings):
            return ratings
        corrected = np.array(ratings)
        corrected[self.rows] = self.ratings
        corrected.flags.writeable = False
        return corrected


def read_corrections(path: Path, index: Rows) -> Corrections:
    """What the journal at `path` changes in `index`. Raises InputError when it is not there or cannot be read."""
    if not path.is_file():
        raise InputError(
            f"data.corrections_file: {path} does not exist; make it with `python -m scripts.apply_corrections`, or set "
            "it to null"
        )
    return lay_over(CorrectionLog(path), index)


def lay_over(log: CorrectionLog, index: Rows) -> Corrections:
    """What the active corrections of a journal change in `index`."""
    finder = RowFinder(index)
    by_row: dict[int, list[Change]] = {}
    absent: list[Change] = []
    for change in log.active:
        row = finder.row_of(change.root, change.image)
        if row is None:
            absent.append(change)
        else:
            by_row.setdefault(row, []).append(change)
    corrected: dict[int, tuple[Record, Record]] = {}
    num_acting = num_so = num_last = 0
    for row in sorted(by_row):
        before = index.sidecar_record(row)
        tags, rating = before.tags, before.rating
        for change in by_row[row]:
            try:
                after = change_tags(tags, rating, change.action, change.tag)
            except LastTagError:
                num_last += 1
                continue
            num_so += after is None
            num_acting += after is not None
            tags, rating = after or (tags, rating)
        if set(tags) != set(before.tags) or rating != before.rating:
            corrected[row] = before, Record(before.image_path, before.stem, tags, rating)
    lines = [f"corrections: {num_acting:,} of {len(log.active):,} act, on {len(corrected):,} images ({log.path})"]
    if num_so:
        lines.append(f"corrections: {num_so:,} are needless, the sidecars say so already")
    if num_last:
        lines.append(f"corrections: {num_last:,} are left out, they would leave an image without a tag")
    if absent:
        images = list(dict.fromkeys(change.image for change in absent))
        named = ", ".join(images[:_EXAMPLES]) + (", ..." if len(images) > _EXAMPLES else "")
        lines.append(f"corrections: {len(absent):,} point to {len(images):,} images that are not there: {named}")
    if log.torn_bytes:
        lines.append(f"corrections: the last line is torn and left out ({log.torn_bytes:,} bytes)")
    return _columns(index, corrected, tuple(lines))


class RowFinder:
    """Finds images by root and path: in the root of that path, else in the one root that has such an image."""

    def __init__(self, index: Rows) -> None:
        self._index = index
        self._roots = {str(root): number for number, root in enumerate(index.roots)}

    def row_of(self, root: str | None, image: str) -> int | None:
        """The row; None where no root or, without a known `root`, more than one has the image."""
        number = self._roots.get(root) if root is not None else None
        if number is not None:
            return self._index.find_row(number, image)
        found = [self._index.find_row(number, image) for number in range(len(self._roots))]
        rows = [row for row in found if row is not None]
        return rows[0] if len(rows) == 1 else None

    def row_of_file(self, path: Path) -> int | None:
        """The row of the image at an absolute path, whose folders may be links; None where no root has it."""
        for spelled in (path, path.parent.resolve() / path.name):
            for number, root in enumerate(self._index.roots):
                if spelled.is_relative_to(root):
                    row = self._index.find_row(number, spelled.relative_to(root).as_posix())
                    if row is not None:
                        return row
        return None


def _columns(index: Rows, corrected: Mapping[int, tuple[Record, Record]], report: tuple[str, ...]) -> Corrections:
    num_known = len(index.tag_names)
    numbers = {name: number for number, name in enumerate(index.tag_names)} if corrected else {}
    rating_changes = np.zeros(len(RATINGS) + 1, dtype=np.int64)
    ids: list[int] = []
    removed: list[int] = []
    lengths: list[int] = []
    ratings: list[int] = []
    digest = hashlib.blake2b(digest_size=8)
    for before, after in corrected.values():
        ids += [numbers.setdefault(tag, len(numbers)) for tag in after.tags]
        removed += [numbers[tag] for tag in before.tags]
        lengths.append(len(after.tags))
        ratings.append(_code(after.rating))
        rating_changes[_code(before.rating)] -= 1
        rating_changes[_code(after.rating)] += 1
        content = "\0".join([after.stem, after.rating or "", *sorted(after.tags)])
        digest.update(content.encode("utf-8", "surrogatepass") + b"\0\0")
    num_tags = len(numbers) if corrected else num_known
    tag_changes = np.bincount(_int64(ids), minlength=num_tags) - np.bincount(_int64(removed), minlength=num_tags)
    return Corrections(
        rows=_int64(list(corrected)),
        tag_offsets=_int64([0, *np.cumsum(lengths, dtype=np.int64).tolist()]),
        tag_ids=_int64(ids),
        ratings=np.array(ratings, dtype=np.uint8),
        new_tags=tuple(list(numbers)[num_known:]),
        tag_changes=tag_changes.astype(np.int64),
        rating_changes=rating_changes,
        hash=((int.from_bytes(digest.digest(), "little") >> 11) or 1) if corrected else 0,
        report=report,
    )


def _code(rating: str | None) -> int:
    return 0 if rating is None else 1 + RATINGS.index(rating)


def _int64(values: Sequence[int]) -> Numbers:
    return np.array(values, dtype=np.int64)
