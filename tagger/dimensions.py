"""Checks that several dimensions of a network share; each names the setting at fault.

Refuses with ConfigError what is not of the kind, range or multiple that it has to be.
"""

import math
from collections.abc import Sequence

from tagger.config_io import ConfigError

Rgb = tuple[float, float, float]


def setting_of(name: str) -> str:
    """The setting that gives a dimension, as the user writes it."""
    return {"image_size": "data.image_size", "num_tags": "num_tags"}.get(name, f"model.{name}")


def is_number(value: object) -> bool:
    """Whether it is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the choices."""
    if value not in choices:
        raise ConfigError(f"model.{name}={value!r} is not known; use {' or '.join(choices)}")


def check_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Refuse what the divisor leaves a rest of; the nearest multiples are named."""
    if value % divisor:
        below = value // divisor * divisor
        options = f"{below} or {below + divisor}" if below else str(divisor)
        raise ConfigError(f"{name}={value} is not a multiple of {divisor_name}={divisor}; use {options}")


def check_rgb(name: str, value: Sequence[float]) -> Rgb:
    """Three finite numbers, as floats."""
    if not isinstance(value, Sequence) or len(value) != 3 or not all(is_number(number) for number in value):
        raise ConfigError(f"{name}={value!r} is not three numbers; 0.5 for each channel is usual")
    return (float(value[0]), float(value[1]), float(value[2]))
