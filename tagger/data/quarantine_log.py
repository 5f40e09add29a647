"""The memory of files that cannot be decoded: `quarantine.jsonl`, append-only, one JSON object a line.

A file is quarantined when the same bytes (by SHA-256) failed twice with the same decoder; it is free again as soon as
its size or time changes, or the decoder does. One process owns the log and writes it; workers look things up in a
`KnownBad`, plain data that is made anew for each epoch. Whether a row is known or found broken again changes nothing in
a batch. Refuses a log written by a newer version; the torn last line of a killed run is cut off.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import orjson

from tagger.data.quarantine import FileFacts, Refusal
from tagger.files import FormatError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
QUARANTINE_FILE = "quarantine.jsonl"
FAILURES_TO_QUARANTINE: Final = 2


@dataclass(frozen=True)
class KnownBad:
    """Files that are not worth another attempt, by printable path. Read-only, small, and fit to be sent to workers."""

    entries: Mapping[str, tuple[FileFacts, str]] = field(default_factory=dict)

    def knows(self, path: str) -> bool:
        """Whether a file of this path is quarantined, as it is now or as it was."""
        return path in self.entries

    def is_known_bad(self, path: str, facts: FileFacts) -> bool:
        """Whether the file of this path and these facts is quarantined."""
        return self.reason(path, facts) is not None

    def reason(self, path: str, facts: FileFacts) -> str | None:
        """Why the file is quarantined; None where it is not, or has changed since."""
        entry = self.entries.get(path)
        return entry[1] if entry is not None and entry[0] == facts else None


@dataclass(frozen=True)
class _Entry:
    facts: FileFacts
    reason: str
    sha256: str
    decoder: str
    failures: int


class Quarantine:
    """The owner's side of the log: what fails is recorded, what was mended is cleared. For one thread of one process.

    `path` None keeps it in memory, for loaders outside a run. `decoder` names what decodes and its limits: entries of
    another one do not count. Raises FormatError for a log that cannot be read, with what to do.
    """

    def __init__(self, path: Path | None, decoder: str, *, writes: bool = True) -> None:
        """writes: whether what is found goes into the file, which has one writer; else it is kept in memory."""
        self.path = path if writes else None
        self._decoder = decoder
        self._entries: dict[str, _Entry] = {}
        self._whole_bytes = 0  # length of what is there and whole
        if path is not None and path.exists():
            self._read(path)

    @property
    def num_files(self) -> int:
        """Files that are quarantined now."""
        return len(self.known_bad().entries)

    def known_bad(self) -> KnownBad:
        """The files quarantined now, for workers."""
        return KnownBad(
            {path: (entry.facts, entry.reason) for path, entry in self._entries.items() if self._counts(entry)}
        )

    def is_known_bad(self, path: str, facts: FileFacts) -> bool:
        """As `known_bad().is_known_bad`, for the owner."""
        entry = self._entries.get(path)
        return entry is not None and self._counts(entry) and entry.facts == facts

    def _counts(self, entry: _Entry) -> bool:
        return entry.failures >= FAILURES_TO_QUARANTINE and entry.decoder == self._decoder

    def record(self, refusal: Refusal) -> None:
        """Count a failure of bytes that were read; missing and unreadable files are looked for again, unrecorded."""
        if refusal.facts is None or refusal.sha256 is None:
            return
        before = self._entries.get(refusal.path)
        failures = 1
        if before is not None and (before.sha256, before.decoder) == (refusal.sha256, self._decoder):
            failures = min(before.failures + 1, FAILURES_TO_QUARANTINE)
        entry = _Entry(refusal.facts, refusal.reason, refusal.sha256, self._decoder, failures)
        if entry == before:
            return
        self._entries[refusal.path] = entry
        self._append(
            {
                "path": refusal.path,
                "reason": refusal.reason,
                "detail": refusal.detail,
                "size": refusal.facts.size,
                "mtime_ns": refusal.facts.mtime_ns,
                "sha256": refusal.sha256,
                "decoder": self._decoder,
                "failures": failures,
            }
        )

    def clear(self, path: str) -> None:
        """Forget a file that was decoded after all."""
        if self._entries.pop(path, None) is not None:
            logger.info("%s has changed and is used again", path)
            self._append({"path": path, "cleared": True})

    def _append(self, line: Mapping[str, object]) -> None:
        """A log that cannot be written (a full disk) is no reason to stop: the files are found broken again."""
        if self.path is None:
            return
        header = b"" if self._whole_bytes else orjson.dumps({"format_version": FORMAT_VERSION}) + b"\n"
        content = header + orjson.dumps(line) + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("r+b" if self.path.exists() else "wb") as stream:
                stream.truncate(self._whole_bytes)  # drops what a kill or a full disk left of a line
                stream.seek(self._whole_bytes)
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            logger.warning("cannot write %s: %s; what it would hold is found again", self.path, error.strerror or error)
            return
        self._whole_bytes += len(content)

    def _read(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise FormatError(f"quarantine {path} cannot be read: {error.strerror or error}") from error
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                self._take(orjson.loads(line), path, number)
            except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                if isinstance(error, FormatError):
                    raise
                if number == len(lines):
                    break
                raise FormatError(
                    f"quarantine {path} line {number} is damaged ({type(error).__name__}); delete the file: "
                    "broken images are found again"
                ) from error
            self._whole_bytes += len(line)

    def _take(self, entry: object, path: Path, number: int) -> None:
        if not isinstance(entry, dict):
            raise TypeError("not an object")
        if number == 1:
            version = entry["format_version"]
            if not isinstance(version, int) or version < 1:
                raise ValueError("not a format_version")
            if version > FORMAT_VERSION:
                raise FormatError(
                    f"quarantine {path} has format_version {version}, this program reads up to {FORMAT_VERSION}; "
                    "update the program, or delete the file: broken images are found again"
                )
        elif entry.get("cleared"):
            self._entries.pop(str(entry["path"]), None)
        else:
            facts = FileFacts(int(entry["size"]), int(entry["mtime_ns"]))
            reason, sha256, decoder = (str(entry[key]) for key in ("reason", "sha256", "decoder"))
            self._entries[str(entry["path"])] = _Entry(facts, reason, sha256, decoder, int(entry["failures"]))
