"""Files that outlive a process: atomic replacement and format versions. Refuses files newer than the reader."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from tagger.errors import InputError


class FormatError(InputError):
    """A file that this version cannot read; the message names it and says what to do."""


class NewerFormatError(FormatError):
    """A whole file of a newer program: not broken, so nothing may be put in its place."""


def write_atomic(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace `path` by `content` so that a reader sees the old file or the new one, never a part (fsync, rename).

    Not `durable`: without waiting for the disk; after a power cut the old file may be back, or be empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Mapping[str, Any], *, durable: bool = True) -> None:
    """Atomic, indented JSON; NumPy scalars are allowed, NaN becomes null. `durable` as for `write_atomic`."""
    encoded = orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n"
    write_atomic(path, encoded, durable=durable)


def json_line(content: Mapping[str, object]) -> bytes:
    """One line of JSON Lines. File names with undecodable bytes are escaped; `json.loads` gives them back."""
    try:
        return json.dumps(content, ensure_ascii=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        return json.dumps(content).encode("ascii") + b"\n"


def refusal_to_write(folder: Path) -> str | None:
    """Why no file can be made in a folder, or below the nearest one that is there where it is missing; None: one can.

    Tried out with a file that leaves no trace.
    """
    place = folder.absolute()
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            return f"{place} is not a folder"
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"{place}: {error.strerror}"


def read_json(path: Path, kind: str, format_version: int) -> dict[str, Any]:
    """The object in a JSON file of ours. `kind` names it for people ("vocabulary").

    Raises FormatError when it is missing, not a JSON object, or newer than `format_version`.
    """
    try:
        content = orjson.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FormatError(f"{kind} {path} does not exist") from error
    except orjson.JSONDecodeError as error:
        raise FormatError(
            f"{kind} {path} is not valid JSON ({error}); restore it from a copy or make it anew"
        ) from error
    if not isinstance(content, dict):
        raise FormatError(f"{kind} {path} holds a {type(content).__name__}; expected a JSON object")
    found = content.get("format_version")
    if not isinstance(found, int) or found < 1:
        raise FormatError(f"{kind} {path} has no format_version; it was not written by this program")
    if found > format_version:
        raise NewerFormatError(
            f"{kind} {path} has format_version {found}, this program reads up to {format_version}; update the program"
        )
    return content
