"""The journal of corrected tags: append-only JSON Lines, one accepted or undone correction a line.

A line is on the disk before anything that depends on it happens, and none is ever changed, so each correction can be
taken back. What a killed process left of a last line is cut off by the next one that writes, and said. Writers take the
journal's lock; readers need none. Refuses a journal of a newer version, and one with a damaged line before the last.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tagger.data.sidecar import RATINGS
from tagger.errors import InputError
from tagger.files import FormatError, json_line, write_atomic
from tagger.record import Record
from tagger.run_lock import FolderLock, LockedError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
Action = Literal["add", "remove"]
ImageKey = tuple[str, str]
RATING_TAGS = {f"rating:{rating}": rating for rating in RATINGS}


class LastTagError(ValueError):
    """A removal that would leave an image without any tag."""


@dataclass(frozen=True)
class SidecarEdit:
    """SHA-256 of a sidecar's bytes before its first correction, which are kept, and of those written."""

    original: str
    written: str


@dataclass(frozen=True)
class Change:
    """One accepted correction of the image `image` (POSIX path) below `root`.

    before: tags and rating that the image had. state: `state_of` its sidecar. sidecar: None where it was not touched.
    """

    id: int
    time: str
    action: Action
    tag: str
    root: str
    image: str
    image_id: str
    before: tuple[tuple[str, ...], str | None]
    state: str
    sidecar: SidecarEdit | None = None

    @property
    def key(self) -> ImageKey:
        return self.root, self.image

    def to_line(self) -> dict[str, object]:
        """The line of the journal."""
        tags, rating = self.before
        edit = self.sidecar
        return {
            **vars(self),
            "before": {"tags": tags, "rating": rating},
            "sidecar": None if edit is None else {"original": edit.original, "written": edit.written},
        }


@dataclass
class WrittenSidecar:
    """The corrections that one sidecar holds now: its bytes before them, those of the last writing, and their ids."""

    original: str
    written: str
    ids: list[int] = field(default_factory=list)


class CorrectionLog:
    """What a journal says. `changes` in the order of their ids; `undone` by id."""

    def __init__(self, path: Path) -> None:
        """Read it; one that does not exist is empty. Raises FormatError."""
        self.path = path
        self.changes: dict[int, Change] = {}
        self.undone: dict[int, str] = {}
        self.sidecars: dict[ImageKey, WrittenSidecar] = {}
        self.last_id = 0
        self.torn_bytes = 0
        self._whole_bytes = 0
        self._ends_line = True
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise FormatError(f"corrections {path} cannot be read: {error.strerror or error}") from error
        self._read(content)

    @property
    def active(self) -> list[Change]:
        """Corrections that are not undone, oldest first."""
        return [change for change in self.changes.values() if change.id not in self.undone]

    @property
    def originals(self) -> Path:
        """The folder of sidecars as they were, named by their SHA-256."""
        return self.path.with_name(f"{self.path.name}.originals")

    def append(self, changes: Sequence[Change]) -> None:
        """Add corrections; on return they are on the disk."""
        self._write([change.to_line() for change in changes])

    def append_undo(self, ids: Sequence[int], written: str | None = None) -> None:
        """Take corrections back. written: SHA-256 of their sidecar, where they had been written to it."""
        now = utc_now()
        self._write(
            [
                {"id": self.last_id + place, "time": now, "action": "undo", "of": number, "written": written}
                for place, number in enumerate(ids, 1)
            ]
        )

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        content = b"".join(map(json_line, lines))
        if not self._whole_bytes:
            write_atomic(self.path, json_line({"format_version": FORMAT_VERSION, "holds": "corrections"}) + content)
            self._whole_bytes = self.path.stat().st_size
        else:
            content = content if self._ends_line else b"\n" + content
            with self.path.open("r+b") as stream:
                stream.truncate(self._whole_bytes)  # drops what a killed process left of a line
                stream.seek(self._whole_bytes)
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            self._whole_bytes += len(content)
        self._ends_line, self.torn_bytes = True, 0
        for line in lines:
            self._take(json.loads(json_line(line)))

    def _read(self, content: bytes) -> None:
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if number == 1:
                    self._check_header(entry)
                else:
                    self._take(entry)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                if isinstance(error, FormatError):
                    raise
                if number == len(lines) and not line.endswith(b"\n"):
                    self.torn_bytes = len(line)
                    message = "corrections %s: the last line is torn (%d bytes of an interrupted write); it is left out"
                    logger.warning(message, self.path, len(line))
                    return
                raise FormatError(
                    f"corrections {self.path} line {number} is damaged ({type(error).__name__}: {error}); restore the "
                    "file from a copy, or delete that line to lose that correction alone"
                ) from error
            self._whole_bytes += len(line)
            self._ends_line = line.endswith(b"\n")

    def _check_header(self, entry: Mapping[str, Any]) -> None:
        version = entry["format_version"]
        if type(version) is not int or version < 1 or entry.get("holds") != "corrections":
            raise ValueError("the first line is not that of a journal of corrections")
        if version > FORMAT_VERSION:
            raise FormatError(
                f"corrections {self.path} have format_version {version}, this program reads up to {FORMAT_VERSION}; "
                "update the program"
            )

    def _take(self, entry: Mapping[str, Any]) -> None:
        number = entry["id"]
        if type(number) is not int or number <= self.last_id:
            raise ValueError(f"id {number!r} does not follow {self.last_id}")
        if entry["action"] == "undo":
            self._take_undo(entry)
        else:
            change = _change(entry)
            self.changes[number] = change
            if change.sidecar is not None:
                held = self.sidecars.get(change.key)
                if held is None or held.original != change.sidecar.original:
                    held = self.sidecars[change.key] = WrittenSidecar(change.sidecar.original, "")
                held.written = change.sidecar.written
                held.ids.append(number)
        self.last_id = number

    def _take_undo(self, entry: Mapping[str, Any]) -> None:
        change = self.changes[entry["of"]]
        if change.id in self.undone:
            raise ValueError(f"correction {change.id} is undone twice")
        self.undone[change.id] = str(entry["time"])
        held = self.sidecars.get(change.key)
        if entry["written"] is not None and held is not None and change.id in held.ids:
            held.ids.remove(change.id)
            held.written = str(entry["written"])
            if not held.ids:
                del self.sidecars[change.key]


@contextmanager
def locked_log(path: Path) -> Iterator[CorrectionLog]:
    """The journal, for one writer at a time. Raises InputError when another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FolderLock(path.with_name(f"{path.name}.lock"))
    except LockedError as error:
        raise InputError(f"corrections {path}: {error}; try again when it is done") from error
    try:
        yield CorrectionLog(path)
    finally:
        lock.release()


def change_tags(
    tags: tuple[str, ...], rating: str | None, action: Action, tag: str
) -> tuple[tuple[str, ...], str | None] | None:
    """Tags and rating after a correction; None where it is so already. Raises LastTagError.

    `rating:<word>` is the rating: adding one replaces another.
    """
    if tag in RATING_TAGS:
        word = RATING_TAGS[tag]
        if (rating == word) == (action == "add"):
            return None
        return tags, word if action == "add" else None
    if (tag in tags) == (action == "add"):
        return None
    if action == "add":
        return (*tags, tag), rating
    if len(tags) == 1:
        raise LastTagError(f"it would leave the image without a tag: '{tag}' is its only one")
    return tuple(name for name in tags if name != tag), rating


def state_of(record: Record) -> str:
    """Hash of an image's tags and rating: tells whether they are still what a suspect was found against."""
    content = "\n".join([record.rating or "", *sorted(record.tags)])
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def utc_now() -> str:
    """The time for a line of the journal."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _change(entry: Mapping[str, Any]) -> Change:
    texts = {key: entry[key] for key in ("time", "tag", "root", "image", "image_id", "state")}
    before, edit = entry["before"], entry["sidecar"]
    for value in (*texts.values(), *before["tags"]):
        if not isinstance(value, str):
            raise TypeError(f"{value!r} is not a text")
    if entry["action"] not in ("add", "remove"):
        raise ValueError(f"action {entry['action']!r} is not known")
    return Change(
        id=entry["id"],
        action=entry["action"],
        before=(tuple(before["tags"]), before["rating"]),
        sidecar=None if edit is None else SidecarEdit(str(edit["original"]), str(edit["written"])),
        **texts,
    )
