"""Which rows are for training, and which are held out: for validation, for calibration, for the final test.

By a hash of the image's name or path, which knows nothing of the training seed or of the other images, so no image
changes part when the set grows; validation may be a list of names instead. Images like a held-out one can be kept out
of training, and small sets can be stratified. Refuses splits with an empty part that was asked for.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from pathlib import Path, PurePath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tagger.config_checks import CALIB_STARTS_AT, split_fractions, split_settings
from tagger.data.hash_cache import image_hashes
from tagger.data.index import MetadataIndex
from tagger.data.near_duplicates import NearDuplicates, find_near_duplicates
from tagger.data.scan import image_suffixes
from tagger.data.sidecar import RATINGS
from tagger.data.stratify import stratified_parts
from tagger.errors import InputError
from tagger.rng import mix, stable_id, uniform

logger = logging.getLogger(__name__)

_SPLIT_STREAM = stable_id("split/validation")
_HASH_CHUNK = 1 << 20
_PATH_CHUNK = 1 << 16
# A part this many times its share, or this much smaller, is worth a line where names are shared.
_FAR_FROM_SHARE = 2.0
_SPLIT_FORMAT = "tagsmith split 1"


SplitKey = Literal["name", "path"]


class SplitError(InputError):
    """A split that cannot be used; the message says what to change."""


class Part(IntEnum):
    """What a row is for. Of near-duplicates, those of the highest part keep it, and the others are UNUSED.

    CALIB is for fitting thresholds, TEST for the one score at the end, VAL for watching training and choosing from it.
    """

    TRAIN = 0
    CALIB = 1
    TEST = 2
    VAL = 3
    UNUSED = 4

    @property
    def purpose(self) -> str:
        """The part in words, for messages."""
        return ("training", "calibration", "test", "validation", "no use (copies of held-out images)")[self]


_AS_TOLD = (Part.TRAIN, Part.VAL, Part.CALIB, Part.TEST, Part.UNUSED)


@dataclass(frozen=True)
class SplitRule:
    """How a data set is split.

    The fractions are of all images; with `val_list`, a file of image names, `val_fraction` is not used and the other
    two are of the images that the list leaves. key: what is hashed, the stem (a file that moves to another folder keeps
    its part, and all files of one name share it) or the path below its root without suffix. near_duplicate_bits: of
    near-duplicates within that distance only those of one part are used (None: each image by itself). stratified: by
    `stratified_parts` instead of by hash; `key` is not used.
    """

    val_fraction: float
    calib_fraction: float = 0.0
    test_fraction: float = 0.0
    val_list: Path | None = None
    key: SplitKey = "name"
    near_duplicate_bits: int | None = None
    stratified: bool = False


@dataclass(frozen=True)
class Split:
    """parts: uint8 [N], the `Part` of each row. keys: uint64 [N], by which the images of a part are known: `stable_id`
    of what `key` says. Files of one name that can be in different parts are known by path.
    """

    parts: NDArray[np.uint8]
    keys: NDArray[np.uint64]
    key: SplitKey = "name"

    def rows(self, part: Part) -> NDArray[np.integer]:
        """The rows of a part, ascending."""
        # Four bytes a row where they suffice: at ten million rows the order of an epoch is made from this array.
        dtype = np.int32 if len(self.parts) <= np.iinfo(np.int32).max else np.int64
        return np.flatnonzero(self.parts == part).astype(dtype)

    def others(self, part: Part) -> NDArray[np.bool_]:
        """bool [N]: the rows that whoever serves `part` must never serve."""
        rows: NDArray[np.bool_] = self.parts != part
        return rows

    @property
    def training_rows(self) -> NDArray[np.integer]:
        return self.rows(Part.TRAIN)

    @property
    def validation_rows(self) -> NDArray[np.integer]:
        return self.rows(Part.VAL)

    def part_sha256(self, part: Part) -> str:
        """Hash of which images are in a part, whatever their order; it stays when only other parts change."""
        ids = np.sort(self.keys[self.parts == part]).astype("<u8")
        return hashlib.sha256(f"{_SPLIT_FORMAT} {part.name} {len(ids)}\0".encode() + ids.tobytes()).hexdigest()

    @cached_property
    def split_sha256(self) -> str:
        """Hash of which images are in which part. Images of one key count as the same image."""
        return hashlib.sha256("".join(self.part_sha256(part) for part in Part).encode()).hexdigest()

    def describe(self) -> str:
        """One line for people: images in each part that has any, and the split's hash."""
        counts = np.bincount(self.parts, minlength=len(Part))
        listed = [f"{counts[part]} images for {part.purpose}" for part in _AS_TOLD]
        kept = [text for text in listed if not text.startswith("0 ")]
        return f"{', '.join(kept)}; split {self.split_sha256[:12]}"


def split_index(
    index: MetadataIndex, rule: SplitRule, *, max_pixels: int = 200_000_000, num_threads: int | None = None
) -> Split:
    """Split the rows of an index by a rule. Raises ConfigError or SplitError for one that cannot be used.

    With near-duplicates, every image is read at the first start; max_pixels and num_threads are for that.
    """
    split_settings(
        rule.val_fraction,
        rule.calib_fraction,
        rule.test_fraction,
        listed=rule.val_list is not None,
        grouped=rule.near_duplicate_bits is not None,
        stratified=rule.stratified,
    )
    if rule.stratified:
        keys = path_ids(index)
        return _checked(Split(_stratify(index, rule), keys, "path"), rule, keys)
    by_path = rule.key == "path" or (rule.val_list is not None and _names_paths(read_list(rule.val_list)))
    paths = path_ids(index) if by_path else None
    hashed = paths if rule.key == "path" and paths is not None else index.image_ids
    split = split_rows(index.image_ids, index.image_path, rule, hashed, paths)
    if rule.near_duplicate_bits is None:
        return split
    hashes = image_hashes(index, max_pixels=max_pixels, num_threads=num_threads)
    found = find_near_duplicates(hashes.hashes, hashes.usable, rule.near_duplicate_bits)
    grouped = replace(split, parts=separate_groups(split.parts, found.labels))
    _report_groups(split.parts, grouped.parts, found)
    return _checked(grouped, rule, hashed)


def path_ids(index: MetadataIndex) -> NDArray[np.uint64]:
    """uint64 [N]: `stable_id` of each image's path below its root, without suffix; 1.5 s a million rows."""
    # Not a column of the index: 8 bytes a row that few need.
    ids = np.empty(len(index), dtype=np.uint64)
    for start in range(0, len(ids), _PATH_CHUNK):
        rows = range(start, min(start + _PATH_CHUNK, len(ids)))
        ids[rows.start : rows.stop] = [stable_id(index.relative_path(row).rpartition(".")[0]) for row in rows]
    return ids


def split_rows(
    image_ids: NDArray[np.uint64],
    image_path: Callable[[int], PurePath],
    rule: SplitRule,
    hashed: NDArray[np.uint64] | None = None,
    paths: NDArray[np.uint64] | None = None,
) -> Split:
    """Split rows by the rule's list and by hash, each image by itself.

    image_ids: uint64 [N], `stable_id` of each stem. image_path: row -> path of the image. hashed: uint64 [N], what is
    hashed (None: image_ids). paths: uint64 [N], `path_ids`, by which the images are known then (None: by image_ids).
    Raises SplitError when the list cannot be read or a part is empty.
    """
    hashed = image_ids if hashed is None else hashed
    if rule.val_list is None:
        parts = hashed_parts(hashed, rule.val_fraction, rule.calib_fraction, rule.test_fraction)
    else:
        parts = hashed_parts(hashed, 0.0, rule.calib_fraction, rule.test_fraction)
        parts[listed_mask(image_ids, image_path, read_list(rule.val_list), str(rule.val_list))] = Part.VAL
    split = Split(parts, image_ids) if paths is None else Split(parts, paths, "path")
    split = _checked(split, rule, hashed)
    _report_shared_names(split, rule, hashed)
    return split


def hashed_parts(
    image_ids: NDArray[np.uint64], val_fraction: float, calib_fraction: float = 0.0, test_fraction: float = 0.0
) -> NDArray[np.uint8]:
    """uint8 [N]: the `Part` of each id, which depends on nothing but the id and the fractions.

    One number in 0 .. 1 an id: VAL grows up from 0, TEST down from 1, CALIB up from 0.5. So a larger fraction takes
    images from TRAIN alone, and a smaller one gives them back to it alone.
    """
    split_fractions(val_fraction, calib_fraction, test_fraction)
    parts = np.full(len(image_ids), Part.TRAIN, dtype=np.uint8)
    for start in range(0, len(image_ids), _HASH_CHUNK):  # the temporaries take 40 bytes a row
        chunk = slice(start, start + _HASH_CHUNK)
        place = uniform(mix(_SPLIT_STREAM, image_ids[chunk]))
        parts[chunk][(place >= CALIB_STARTS_AT) & (place < CALIB_STARTS_AT + calib_fraction)] = Part.CALIB
        parts[chunk][place >= 1.0 - test_fraction] = Part.TEST
        parts[chunk][place < val_fraction] = Part.VAL
    return parts


def separate_groups(parts: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    """uint8 [N]: rows of the highest `Part` in their group keep it, the others are UNUSED. labels: int64 [N], a row
    number for each group.

    Nobody gets a part that is not his own, so however the set grows no image changes side: a newcomer can only connect
    groups, and put what is no longer the highest in its group out of use. Following the highest instead would move
    images that were trained on into VAL. The price: a group is kept from training more often than a single image.
    """
    highest = parts.copy()
    np.maximum.at(highest, labels, parts)
    return np.where(parts == highest[labels], parts, np.uint8(Part.UNUSED))


def _stratify(index: MetadataIndex, rule: SplitRule) -> NDArray[np.uint8]:
    """By the sidecars' tags, so that a correction moves no image; ratings count as tags, as they do in training."""
    num_tags = len(index.tag_names)
    rated = index.sidecar_ratings > 0
    offsets = index.tag_offsets + np.concatenate([[0], np.cumsum(rated)])
    tags = np.empty(int(offsets[-1]), dtype=np.int64)
    last = offsets[1:][rated] - 1
    tags[last] = num_tags + index.sidecar_ratings[rated].astype(np.int64) - 1
    others = np.ones(len(tags), dtype=np.bool_)
    others[last] = False
    tags[others] = index.tag_ids
    assert tags.max(initial=0) < num_tags + len(RATINGS)
    held_out = {Part.VAL: rule.val_fraction, Part.CALIB: rule.calib_fraction, Part.TEST: rule.test_fraction}
    fractions = [1.0 - sum(held_out.values()), *(held_out[part] for part in Part if part in held_out)]
    return stratified_parts(offsets, tags, index.image_ids, fractions)


def _checked(split: Split, rule: SplitRule, hashed: NDArray[np.uint64]) -> Split:
    """The split, where each part that was asked for has an image."""
    if rule.val_list is None:
        chosen = f"data.val_fraction={rule.val_fraction} of {len(split.parts)} images"
        more, fewer = "raise data.val_fraction or add images", "lower data.val_fraction or add images"
    else:
        chosen = f"data.val_list={rule.val_list} with {len(split.parts)} images"
        more = "write one image name without its suffix per line, or leave data.val_list out to split by hash"
        fewer = "take names out of the list, or leave data.val_list out to split by hash"
    found = np.bincount(split.parts, minlength=len(Part))
    for part, remedy in ((Part.VAL, more), (Part.TRAIN, fewer)):
        if not found[part]:
            names = _shared_names(hashed, rule) if rule.val_list is None else ""
            raise SplitError(f"{chosen} leaves no image for {part.purpose}; {names}{remedy}")
    for part, name, fraction in (
        (Part.CALIB, "calib_fraction", rule.calib_fraction),
        (Part.TEST, "test_fraction", rule.test_fraction),
    ):
        if fraction and not found[part]:
            raise SplitError(
                f"data.{name}={fraction} of {len(split.parts)} images leaves no image for {part.purpose}; "
                f"{_shared_names(hashed, rule)}raise it, or set it to 0"
            )
    return split


def _shared_names(hashed: NDArray[np.uint64], rule: SplitRule) -> str:
    """Where images share names, and with them a part: that, and what to do, before another remedy; else empty."""
    num_names = len(np.unique(hashed))
    if rule.key == "path" or rule.stratified or num_names == len(hashed):
        return ""
    known = "1 distinct name" if num_names == 1 else f"{num_names} distinct names"
    return f"the images have only {known}, and those of one name share a part: set data.split_key=path, or "


def _report_shared_names(split: Split, rule: SplitRule, hashed: NDArray[np.uint64]) -> None:
    """A line where a part is far from its share because images share names."""
    found = np.bincount(split.parts, minlength=len(Part)) / len(split.parts)
    shares = {Part.CALIB: rule.calib_fraction, Part.TEST: rule.test_fraction}
    if rule.val_list is None:
        shares[Part.VAL] = rule.val_fraction
    for part, share in shares.items():
        far = not share / _FAR_FROM_SHARE <= found[part] <= share * _FAR_FROM_SHARE
        if far and (names := _shared_names(hashed, rule)):
            message = "%.1f %% of the images are for %s, %.1f %% were asked for: %slive with it"
            logger.warning(message, 100 * found[part], part.purpose, 100 * share, names)


def _report_groups(before: NDArray[np.uint8], after: NDArray[np.uint8], found: NearDuplicates) -> None:
    sizes = np.bincount(found.labels, minlength=len(found.labels))
    unused = after == Part.UNUSED
    from_training = int((before[unused] == Part.TRAIN).sum())
    logger.info(
        "near-duplicates: %d groups of %d images, the largest of %d; left out as copies of held-out images: "
        "%d from training, %d held-out ones",
        int((sizes > 1).sum()), int(sizes[sizes > 1].sum()), int(sizes.max()), from_training,
        int(unused.sum()) - from_training,
    )  # fmt: skip
    if from_training > int((before != Part.TRAIN).sum()):
        logger.warning(
            "near-duplicates: %d of %d images are lost to training, more than twice what the fractions say; "
            "lower data.near_duplicate_bits or the fractions, or name whole groups in data.val_list",
            int((after != Part.TRAIN).sum()), len(after),
        )  # fmt: skip


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


def _names_paths(lines: list[str]) -> bool:
    return any("/" in line for line in lines)


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
    if any(line.rpartition(".")[2].lower() in image_suffixes() for line in unmatched):
        examples += "; a name is written without its suffix"
    if len(unmatched) == num_lines:
        logger.error("%s: none of its %d lines names an image of this data set, e.g. %s", source, num_lines, examples)
    else:
        logger.warning("%s: %d of %d lines name no image, e.g. %s", source, len(unmatched), num_lines, examples)
