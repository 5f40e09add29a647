"""The lock of a run folder: one process at a time, on every platform, and a killed one does not block the next.

The lock is a file that names its process. Whether that process still lives is asked of the system, so nothing has to be
cleaned up after a kill; a process of another host cannot be asked and is believed to live.
"""

import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
import psutil

from tagger.errors import InputError
from tagger.files import FormatError, read_json, write_atomic

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_SAME_PROCESS_S = 2.0  # start times of one process, read twice, differ by their rounding only
_BEING_WRITTEN_S = 10.0  # a lock without content is one that is being made, or was made by a process that died then


class LockedError(InputError):
    """Another live process has the lock; the message says which and since when."""


@dataclass(frozen=True)
class _Owner:
    """The process that holds a lock. Two start times, because setting the clock moves either one or the other."""

    pid: int
    host: str
    created: float  # seconds since 1970
    created_after_boot: float  # seconds
    token: str  # tells two locks of one process apart
    taken: str  # for people
    format_version: int = FORMAT_VERSION

    @classmethod
    def this_process(cls) -> "_Owner":
        created = psutil.Process().create_time()
        return cls(
            pid=os.getpid(),
            host=socket.gethostname(),
            created=created,
            created_after_boot=created - psutil.boot_time(),
            token=secrets.token_hex(8),
            taken=time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    @classmethod
    def read(cls, path: Path) -> "_Owner":
        """Raises FormatError when the file is gone, torn or of a newer version."""
        content = read_json(path, "lock", FORMAT_VERSION)
        try:
            return cls(
                pid=int(content["pid"]),
                host=str(content["host"]),
                created=float(content["created"]),
                created_after_boot=float(content["created_after_boot"]),
                token=str(content["token"]),
                taken=str(content["taken"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"lock {path} is not complete ({error}); delete it if its run is over") from error

    def lives(self) -> bool:
        if self.host != socket.gethostname():
            return True
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            created = process.create_time()
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return True
        after_boot = created - psutil.boot_time()
        return (
            abs(created - self.created) < _SAME_PROCESS_S or abs(after_boot - self.created_after_boot) < _SAME_PROCESS_S
        )


class FolderLock:
    """Held from construction to `release`. Raises LockedError when another live process holds it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._owner = _Owner.this_process()
        content = orjson.dumps(asdict(self._owner), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        if _create(path, content):
            return
        with _only_one_taker(path):
            held_by = _refuse_live(path)
            write_atomic(path, content)
        logger.info("took over %s, left by %s", path.name, held_by)

    def loss(self) -> str | None:
        """What became of the lock, for people; None while it is held, or where that cannot be read just now."""
        try:
            owner = _Owner.read(self._path)
        except OSError:
            return None
        except FormatError as error:
            if self._path.exists():
                return str(error)
            return f"{self._path if self._path.parent.is_dir() else self._path.parent} is gone"
        if owner.token == self._owner.token:
            return None
        return f"{self._path} is held by process {owner.pid} on {owner.host} since {owner.taken}"

    def release(self) -> None:
        """Let go; a lock that was meanwhile deleted or taken over by hand is left as it is."""
        with contextlib.suppress(FormatError):
            if _Owner.read(self._path).token == self._owner.token:
                self._path.unlink(missing_ok=True)


def is_held(path: Path) -> bool:
    """Whether a live process holds the lock at `path`."""
    try:
        return _Owner.read(path).lives()
    except FormatError:
        return False


def _create(path: Path, content: bytes) -> bool:
    try:
        with path.open("xb") as stream:
            stream.write(content)
    except FileExistsError:
        return False
    return True


def _refuse_live(path: Path) -> str:
    """Who left the lock, for people. Raises LockedError when its process lives."""
    try:
        owner = _Owner.read(path)
    except FormatError as error:
        try:
            age_s = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            return "a process that has just let go"
        if abs(age_s) < _BEING_WRITTEN_S:
            raise LockedError(f"{path.name} is being written by another process ({error})") from error
        return "a process that died while it took it"
    if owner.lives():
        raise LockedError(f"in use by process {owner.pid} on {owner.host} since {owner.taken}")
    return f"process {owner.pid}, which is gone"


@contextlib.contextmanager
def _only_one_taker(path: Path) -> Iterator[None]:
    """Two processes that find the same dead lock must not both take it."""
    guard = path.with_name(f"{path.name}.taking")
    if not _create(guard, b""):
        raise LockedError(f"another process is taking it over; if none is, delete {guard}")
    try:
        yield
    finally:
        guard.unlink(missing_ok=True)
