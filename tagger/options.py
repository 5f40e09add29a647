"""Options of a command line, checked before the work: numbers in their range, places that can be read or written.

What is wrong is one line and exit code 2. A place for output is tried out with a file that leaves no trace.
"""

import argparse
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tagger.errors import InputError
from tagger.files import refusal_to_write

_LARGEST = 2**31 - 1


class OptionError(argparse.ArgumentTypeError, InputError):
    """What was given for an option is of no use; the message is one line. The parser names the option."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say it and end the command."""
        hint = "" if message.startswith("argument ") else "; --help lists the options"
        self.exit(2, f"error: {message}{hint}\n")


def whole(least: int = 1, most: int = _LARGEST) -> Callable[[str], int]:
    """A whole number in `least`..`most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise OptionError(f"{text[:40]} is not a whole number in {least}..{most}")
        return value

    return parse


def number(above: float = 0.0, most: float = 1e12, *, least: float | None = None) -> Callable[[str], float]:
    """A finite number above `above` (or from `least` on) and up to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not ((value > above if least is None else value >= least) and value <= most):
            low = f"above {above:g}" if least is None else f"from {least:g}"
            raise OptionError(f"{text[:40]} is not a number {low} up to {most:g}")
        return value

    return parse


def input_file(text: str) -> Path:
    """A file that can be read."""
    return _readable(text, folder=False)


def input_folder(text: str) -> Path:
    """A folder that can be read."""
    return _readable(text, folder=True)


def output_file(text: str) -> Path:
    """A file that can be written; folders above it may be missing."""
    path = Path(text)
    found = _stat(path)
    if not path.name or (found is not None and stat.S_ISDIR(found.st_mode)):
        raise OptionError(f"{text or 'nothing'} is a folder; name a file")
    if found is not None and not os.access(path, os.W_OK):
        raise OptionError(f"cannot write {text}: Permission denied; name another file")
    _try_to_write(path, path.absolute().parent)
    return path


def output_folder(text: str) -> Path:
    """A folder that can be written, or made."""
    if not text:
        raise OptionError("the name is empty; name a folder")
    path = Path(text)
    _stat(path)
    _try_to_write(path, path.absolute())
    return path


def _readable(text: str, *, folder: bool) -> Path:
    path = Path(text)
    found = _stat(path)
    kind = "folder" if folder else "file"
    if found is None:
        raise OptionError(f"{text} does not exist (looked in {Path.cwd()})")
    if stat.S_ISDIR(found.st_mode) != folder:
        raise OptionError(f"{text} is not a {kind}; name a {kind}")
    if not os.access(path, os.R_OK | (os.X_OK if folder else 0)):
        raise OptionError(f"{text} may not be read by this user; change its permissions")
    return path


def _stat(path: Path) -> os.stat_result | None:
    """What is there; None for nothing."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OptionError(f"cannot use {str(path)[:200]}: {error.strerror}; name another place") from error


def _try_to_write(named: Path, folder: Path) -> None:
    reason = refusal_to_write(folder)
    if reason is not None:
        raise OptionError(f"cannot write {named}: {reason}; name another place")
