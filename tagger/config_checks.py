"""Checks of settings that need nothing but the settings: ranges, files that must be there, parts of a split.

Each raises ConfigError with one line: what was found, and what to do.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from tagger.config_io import ConfigError

CALIB_STARTS_AT = 0.5  # of the numbers 0..1 that a split deals out: validation grows up from 0, test down from 1

# augmentation -> (greatest strength, its unit or what is usual)
AUGMENT_LIMITS = {
    "rotation": (180.0, "degrees"),
    "shift": (1.0, "share of the side"),
    "scale": (2.0, "logarithm of the factor"),
    "brightness": (1.0, "change of the factor 1"),
    "contrast": (1.0, "change of the factor 1"),
    "saturation": (1.0, "change of the factor 1"),
    "blur": (32.0, "standard deviation in pixels"),
    "erasing": (1.0, "share of the area"),
    # From there on every image is half of another.
    "mixup": (100.0, "a of Beta(a, a), 1 is usual"),
}


def require(condition: bool, found: str, remedy: str) -> None:
    """Raise ConfigError "<found>; <remedy>" unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{found}; {remedy}")


@dataclass(frozen=True)
class Range:
    """The values that a number may have, what to say of one outside them, and what to do then."""

    holds: Callable[[float], bool]
    fault: str
    remedy: str

    def check(self, name: str, value: float | None) -> None:
        """Raise ConfigError where `value`, of the setting `name`, lies outside; None passes."""
        require(value is None or self.holds(value), f"{name}={value} {self.fault}", self.remedy)

    def with_remedy(self, remedy: str) -> "Range":
        """The same range with other advice."""
        return replace(self, remedy=remedy)


POSITIVE = Range(lambda x: x > 0 and math.isfinite(x), "is not above 0 or not finite", "use a positive number")
NOT_NEGATIVE = Range(lambda x: x >= 0 and math.isfinite(x), "is below 0 or not finite", "use 0 or a positive number")
FRACTION = Range(lambda x: 0 <= x <= 1, "is not between 0 and 1", "use a share, e.g. 0.1")
SHARE = Range(lambda x: 0 < x < 1, "is not between 0 and 1", "use a share, e.g. 0.1")
PART = Range(lambda x: 0 < x <= 1, "is not above 0 and at most 1", "use a share, e.g. 0.8")
MEMBERS = Range(lambda x: 1 <= x <= 64, "is not a whole number from 1 to 64", "4 is usual, 1 is a single network")
BELOW_ONE = Range(lambda x: 0 <= x < 1, "is not in 0 <= x < 1", "0 turns it off")


def setting(default: float | None, allowed: Range) -> Any:
    """A field of a `Section`: its default, and the range that its values are held to."""
    return field(default=default, metadata={"range": allowed})


@dataclass
class Section:
    """A group of settings; each number is held to the range that its field declares.

    is_top_level: messages name the section; an item of a list is named by who reads the list.
    """

    is_top_level: ClassVar[bool] = True

    def __post_init__(self) -> None:
        prefix = type(self).__name__.removesuffix("Section").lower() + "." if self.is_top_level else ""
        for each in fields(self):
            if "range" in each.metadata:
                each.metadata["range"].check(f"{prefix}{each.name}", getattr(self, each.name))


def existing_files(**names: str | None) -> None:
    """Each is a file (None passes); in the names of settings two underscores stand for the dot."""
    for key, name in names.items():
        require(
            name is None or Path(name).is_file(),
            f"{key.replace('__', '.')}: {name} is not a file (looked in {Path.cwd()})",
            "correct the path, or set it to null",
        )


def existing_folder(key: str, name: str | None, remedy: str) -> None:
    """The setting `key` names a folder (None passes)."""
    require(name is None or Path(name).is_dir(), f"{key}: {name} is not a folder (looked in {Path.cwd()})", remedy)


def split_fractions(val_fraction: float, calib_fraction: float, test_fraction: float) -> None:
    """Parts of these shares do not overlap as they grow."""
    shares = {"val_fraction": val_fraction, "calib_fraction": calib_fraction, "test_fraction": test_fraction}
    for name, value in shares.items():
        FRACTION.check(f"data.{name}", value)
    others = calib_fraction + test_fraction
    require(
        others <= 1 - CALIB_STARTS_AT,
        f"data.calib_fraction={calib_fraction} and data.test_fraction={test_fraction} are more than half of the images",
        "lower one of them: 0.5 together is the most",
    )
    require(
        not others or val_fraction <= CALIB_STARTS_AT,
        f"data.val_fraction={val_fraction} is over 0.5, which leaves no place for data.calib_fraction={calib_fraction} "
        f"and data.test_fraction={test_fraction}",
        "lower it, or set those two to 0",
    )


def split_settings(
    val_fraction: float,
    calib_fraction: float,
    test_fraction: float,
    *,
    listed: bool = False,
    grouped: bool = False,
    stratified: bool = False,
) -> None:
    """The settings of a split go together and leave images for training.

    listed: data.val_list names the validation images, and val_fraction is not used. grouped: near-duplicates share a
    part. stratified: tags are dealt out evenly.
    """
    rival = "data.val_list" if listed else "data.group_near_duplicates"
    require(
        not (stratified and (listed or grouped)),
        f"data.stratified_split and {rival} decide about the same images",
        f"choose one of them: data.stratified_split=false, or {rival}={'null' if listed else 'false'}",
    )
    used = 0.0 if listed else val_fraction
    split_fractions(used, calib_fraction, test_fraction)
    require(
        used + calib_fraction + test_fraction < 1,
        f"data.val_fraction={val_fraction}, data.calib_fraction={calib_fraction} and "
        f"data.test_fraction={test_fraction} leave no image for training",
        "lower one of them",
    )


def whole_patches(image_size: int, patch_size: int, *, buckets: bool, name: str = "data.image_size") -> None:
    """Images are whole patches, and for aspect buckets there are enough of them; `name` is the setting's."""
    below = image_size // patch_size * patch_size
    require(
        image_size == below,
        f"{name}={image_size} is not a multiple of model.patch_size={patch_size}",
        f"use {below} or {below + patch_size}" if below else f"use {patch_size}",
    )
    require(
        not buckets or image_size >= 3 * patch_size,
        f"data.fit=buckets needs at least 3 patches a side; {name}={image_size} has "
        f"{image_size // patch_size} of model.patch_size={patch_size}",
        f"use {name}={3 * patch_size} or more, or data.fit=letterbox",
    )


def phase_settings(
    phases: Sequence[tuple[int, float | None]], image_size: int, patch_size: int, *, buckets: bool
) -> None:
    """The phases' (image size, share of the images seen) make one run, whose model is of `image_size`."""
    for number, (size, share) in enumerate(phases, 1):
        last, name = number == len(phases), f"training.phases: image_size of phase {number}"
        whole_patches(size, patch_size, buckets=buckets, name=name)
        require(
            size == image_size if last else size <= image_size,
            f"{name}={size} is {'not' if last else 'above'} data.image_size={image_size}",
            "the last phase has the size of the model, and no other a larger one",
        )
        found = f"training.phases: phase {number} of {len(phases)} has no share of the images"
        require(last or share is not None, found, "give it one, e.g. share: 0.8")
    if phases:
        before, last_share = math.fsum(share or 0.0 for _, share in phases[:-1]), phases[-1][1]
        require(
            before < 1 if last_share is None else abs(before + last_share - 1) < 1e-9,
            f"training.phases: the shares are {before + (last_share or 0.0):g} together",
            "lower them below 1, and leave out that of the last phase: it has the rest",
        )


def threshold_goal(objective: str, precision: float, tags_per_image: float | None) -> None:
    """What thresholds are fitted for is a goal that can be reached for."""
    require(
        0 < precision <= 1,
        f"validation.threshold_precision={precision} is not above 0 and at most 1",
        "0.9 lets one of ten tags given be wrong",
    )
    require(
        (objective == "tags_per_image") == (tags_per_image is not None),
        f"validation.threshold_objective={objective} with validation.threshold_tags_per_image={tags_per_image}",
        "tags_per_image needs a number, e.g. 20, and the other objectives take null",
    )


def check_strength(name: str, strength: float) -> None:
    """The augmentation `name` may be as strong."""
    limit, unit = AUGMENT_LIMITS[name]
    found = f"augment.{name}.strength={strength} is above {limit:g} ({unit})"
    require(strength <= limit, found, "use a smaller one")
