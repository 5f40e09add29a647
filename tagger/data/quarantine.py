"""Failures of input files: which are the file's own, which the storage's, and how many a run puts up with.

Transient errors are waited out and never blamed on the file. A missing or unreadable file is left out and looked for
again. Bytes that cannot be decoded come with their evidence (size, time, SHA-256), which `quarantine_log` remembers.
Past the budget the run stops and names what went wrong: one corrupt image passes, a dying disk does not.
"""

import errno
import hashlib
import logging
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tagger.data.image_header import RefusedImage
from tagger.data.scan import TRANSIENT_ERRORS, printable
from tagger.errors import DataFailureError, StorageError

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_FILE_BYTES = 1 << 30
OUTAGE_S = 300.0
_FIRST_WAIT_S = 0.02
_LONGEST_WAIT_S = 5.0
_REASONS = {
    errno.ENOENT: "missing",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EISDIR: "not a regular file",
    errno.ELOOP: "link loop",
}
# Windows translates line ends in files opened without O_BINARY; elsewhere a FIFO opened without O_NONBLOCK hangs.
_OPEN_FLAGS = os.O_RDONLY
for _name in ("O_BINARY", "O_NONBLOCK", "O_CLOEXEC"):
    _OPEN_FLAGS |= vars(os).get(_name, 0)


class Clock:
    """Monotonic time, and waiting: what a test replaces to let an outage pass at once."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        return time.monotonic()

    def wait(self, stop: threading.Event, seconds: float) -> bool:
        """Wait until `stop` is set, at most `seconds`; whether it is."""
        return stop.wait(seconds)


SYSTEM_CLOCK = Clock()


class UnreadableFile(RefusedImage):
    """A file that cannot be read for a reason of its own."""


@dataclass(frozen=True)
class FileFacts:
    """What tells a file from another version of it without reading it."""

    size: int
    mtime_ns: int


class UndecodableFile(RefusedImage):
    """Bytes that were read whole and are no usable image, with the evidence against them."""

    def __init__(self, refusal: RefusedImage, facts: FileFacts, content: bytes) -> None:
        super().__init__(refusal.reason, refusal.detail)
        self.facts = facts
        self.sha256 = hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Refusal:
    """A file that was left out, and why; plain data, so that a worker of any kind can report it.

    path: printable. facts and sha256 (hexadecimal) are those of bytes that failed to decode, else None.
    """

    path: str
    reason: str
    detail: str = ""
    facts: FileFacts | None = None
    sha256: str | None = None

    @classmethod
    def of(cls, path: Path, error: RefusedImage) -> "Refusal":
        """What an attempt to use `path` ended with."""
        evidence = (error.facts, error.sha256) if isinstance(error, UndecodableFile) else (None, None)
        return cls(printable(path), error.reason, error.detail, *evidence)

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


def read_image_file(path: Path) -> bytes:
    """As `read_with_facts`, the bytes alone."""
    return read_with_facts(path)[0]


def read_with_facts(path: Path, known_bad: Callable[[FileFacts], str | None] | None = None) -> tuple[bytes, FileFacts]:
    """The bytes of a regular file, and the facts of the very file that they were read from.

    `known_bad` gives a reason to leave the file unread. Raises UnreadableFile for the file's own faults; an OSError of
    TRANSIENT_ERRORS passes through.
    """
    try:
        handle = os.open(path, _OPEN_FLAGS)
        try:
            facts = os.fstat(handle)
            if not stat.S_ISREG(facts.st_mode):
                raise UnreadableFile("not a regular file")
            if facts.st_size > MAX_FILE_BYTES:
                raise UnreadableFile("file too large", f"{facts.st_size} bytes, the limit is {MAX_FILE_BYTES}")
            found = FileFacts(facts.st_size, facts.st_mtime_ns)
            reason = known_bad(found) if known_bad is not None else None
            if reason is not None:
                raise UnreadableFile(reason, "in quarantine")
            parts = [os.read(handle, facts.st_size + 1)]
            while parts[-1]:  # a short read is legal, and a growing file ends where it ends
                parts.append(os.read(handle, 1 << 16))
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in TRANSIENT_ERRORS:
            raise
        raise UnreadableFile(_REASONS.get(error.errno or 0, "unreadable"), error.strerror or str(error)) from error
    return (parts[0] if len(parts) == 2 else b"".join(parts)), found


def retry_transient(
    attempt: Callable[[], T],
    path: Path,
    stop: threading.Event,
    *,
    outage_s: float = OUTAGE_S,
    clock: Clock | None = None,
) -> T:
    """What `attempt` returns; it is run again after each transient error or lack of memory, waiting longer each time.

    Raises StorageError when that goes on for `outage_s` seconds or when `stop` is set; what else it raises passes
    through. `path` names the file for people.
    """
    clock = clock or SYSTEM_CLOCK
    started: float | None = None
    wait_s = _FIRST_WAIT_S
    while True:
        try:
            return attempt()
        except (OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno not in TRANSIENT_ERRORS:
                raise
            now = clock.now()
            reason = (error.strerror if isinstance(error, OSError) else None) or "out of memory"
            if started is None:
                started = now
                logger.warning("%s: %s; trying again for up to %.0f s", printable(path), reason, outage_s)
            if now - started > outage_s or clock.wait(stop, wait_s):
                raise StorageError(
                    f"{printable(path)}: {reason}, still after {now - started:.0f} s; "
                    "check the disk, the network and the free memory, then start again"
                ) from error
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


class FailureBudget:
    """Counts refused files against files seen; safe to use from any thread.

    Stops the run at more than `max_fraction` of the files seen, once `min_seen` were, or at `max_in_a_row` refusals
    with no success between. A file that is used after all counts no longer. `num_files`: files that there are to see.
    """

    def __init__(
        self,
        num_files: int,
        *,
        max_fraction: float = 0.001,
        min_seen: int = 1000,
        max_in_a_row: int = 50,
    ) -> None:
        self._num_files = num_files
        self._max_fraction = max_fraction
        self._min_seen = min_seen
        self._max_in_a_row = max_in_a_row
        self._lock = threading.Lock()
        self._num_tried = 0
        self._in_a_row = 0
        self._reasons: dict[str, str] = {}
        self._failure: str | None = None

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Every file that counts as refused, in the order of discovery, with the reason of its last refusal."""
        with self._lock:
            return tuple(Refusal(path, reason) for path, reason in self._reasons.items())

    def accept(self, path: str | None = None) -> None:
        """A file was used; `path`, printable, where it was refused before."""
        with self._lock:
            self._num_tried += 1
            self._in_a_row = 0
            if path is not None:
                self._reasons.pop(path, None)

    def refuse(self, refusal: Refusal) -> None:
        """A file was left out. Raises DataFailureError past the budget."""
        with self._lock:
            self._num_tried += 1
            self._in_a_row += 1
            self._reasons[refusal.path] = refusal.reason
            if self._failure is None:
                self._failure = self._judge()
            if self._failure is not None:
                raise DataFailureError(self._failure)

    def _judge(self) -> str | None:
        # Epochs repeat the same files: a file refused every epoch is one file of the set.
        num_seen = min(self._num_tried, self._num_files)
        # The nearest number below as people count: 0.001 * 3000 is a little less than 3 in binary.
        allowed = int(self._max_fraction * num_seen + 1e-9)
        if self._in_a_row >= self._max_in_a_row:
            return self._describe(f"{self._in_a_row} images in a row were refused")
        if num_seen >= self._min_seen and len(self._reasons) > allowed:
            finding = f"{len(self._reasons)} of {num_seen} images were refused, {allowed} are put up with"
            return self._describe(finding) + ", or raise data.max_refused_fraction"
        return None

    def _describe(self, finding: str) -> str:
        counts = Counter(self._reasons.values()).most_common(3)
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts)
        return f"{finding}: {reasons}; for example {', '.join(list(self._reasons)[:5])}; mend or remove them"
