"""Writing checkpoints: durably in the right order, and on a thread of its own.

A checkpoint is written into a temporary folder (each file and, last, the manifest: written, flushed, fsynced; then the
folder itself), moved to its name, and the folder around it fsynced. What a crash leaves is either a whole checkpoint or
a temporary folder, which the next start removes.
"""

import hashlib
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from tagger.checkpoint.format import (
    MANIFEST_FILE,
    STATE_FILE,
    CheckpointError,
    FileEntry,
    Manifest,
    Tensors,
    checkpoint_name,
    write_tensors,
)

logger = logging.getLogger(__name__)

MAX_KEPT_WAITING = 2  # each is a whole training state in memory
RETRY_EVERY_S = 30.0
# How long the end of a run waits for a disk that is full: long enough for whom an alert wakes.
PATIENCE_S = 3600.0
TEMPORARY_PREFIX = ".tmp-"
_RECORD = re.compile(r"\.(last|best)\.json\..*\.tmp$")  # as tagger.files.write_atomic names them
T = TypeVar("T")


class CheckpointWriteError(RuntimeError):
    """A save that did not reach the disk; `__cause__` is what happened (an OSError for a full disk)."""


@dataclass(frozen=True)
class SaveFailure:
    """A save that failed in the background; an OSError for a full disk.

    `on_disk`: the checkpoint itself is whole, and what failed are its records or the deletion of older ones.
    """

    step: int
    error: Exception
    on_disk: bool

    def __str__(self) -> str:
        what = "is saved, but not its records" if self.on_disk else "was not saved"
        return f"the checkpoint of step {self.step} {what}: {self.error}"


@dataclass(frozen=True)
class CheckpointContent:
    """All that goes into one checkpoint folder; `state` is the finished `state.json`."""

    step: int
    sequence: int
    tensors: Mapping[str, Tensors]
    state: bytes
    vocabulary_sha256: str | None = None
    config_sha256: str | None = None
    metric: str | None = None
    value: float | None = None
    yardstick: str | None = None


def write_checkpoint(folder: Path, content: CheckpointContent) -> Path:
    """Write a checkpoint under `folder` and return its path; it stands there whole or not at all."""
    if not folder.is_dir():
        folder.mkdir()  # not its parents: a run's folder that was deleted is not made again
        fsync_folder(folder.parent)
    temporary = folder / f"{TEMPORARY_PREFIX}{checkpoint_name(content.step)}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        files: dict[str, FileEntry] = {}
        for part, tensors in content.tensors.items():
            files[f"{part}.safetensors"] = _write_tensor_file(temporary / f"{part}.safetensors", tensors)
        files[STATE_FILE] = _write_bytes(temporary / STATE_FILE, content.state)
        manifest = Manifest(
            content.step,
            content.sequence,
            files,
            content.vocabulary_sha256,
            content.config_sha256,
            content.metric,
            content.value,
            content.yardstick,
        ).encode()
        _write_bytes(temporary / MANIFEST_FILE, manifest)
        fsync_folder(temporary)
        path = _free_path(folder, content.step)
        temporary.rename(path)
    except BaseException:
        # A part of a checkpoint is of no use, and on a full disk it would stand in the way of the next one.
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(folder)
    return path


def _write_tensor_file(path: Path, tensors: Tensors) -> FileEntry:
    # A stream of our own: a full disk is then an OSError with its number, not a library's message.
    with path.open("xb") as stream:
        entry = write_tensors(stream, tensors)
        stream.flush()
        os.fsync(stream.fileno())
    return entry


def _write_bytes(path: Path, data: bytes) -> FileEntry:
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    if os.name == "nt":
        return  # Windows opens no folders; NTFS journals names by itself.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free_path(folder: Path, step: int) -> Path:
    copy = 1
    while (path := folder / checkpoint_name(step, copy)).exists():
        copy += 1
    return path


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint so that no crash leaves a part of it under its name."""
    doomed = path.with_name(f"{TEMPORARY_PREFIX}removed-{path.name}-{secrets.token_hex(4)}")
    path.rename(doomed)
    if doomed.is_symlink():
        doomed.unlink()  # what it leads to is not ours
    else:
        shutil.rmtree(doomed)


def list_temporaries(folder: Path) -> list[Path]:
    """What writes and deletions that are under way, or were interrupted, keep in a folder of checkpoints."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.name.startswith(TEMPORARY_PREFIX) or _RECORD.match(path.name)]


def remove_temporaries(folder: Path) -> int:
    """Delete what interrupted writes and deletions left; returns how many. Only for the folder's one writer."""
    stray = list_temporaries(folder)
    for path in stray:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return len(stray)


class _Waiting(NamedTuple, Generic[T]):
    item: T
    purposes: frozenset[str]
    since_s: float
    kept: bool


class _Failed(NamedTuple, Generic[T]):
    item: T
    since_s: float
    again_s: float


class AsyncCheckpointWriter(Generic[T]):
    """Runs `write(item)` for submitted items on a background thread, in order; used by one training thread.

    Each item is submitted for some purposes. While the writer is busy, items wait; one that waits is dropped as soon
    as a newer one serves all its purposes. So with purposes {"last"} and {"last", "best"} at most two wait however slow
    the disk is, and a best one is dropped for a better one only. An item to be kept is not dropped, but no more than
    MAX_KEPT_WAITING of them are held at a time: a disk that hangs must not fill the memory, which would end the run,
    nor hold up training, which saves nothing. One above that number is like any other.

    An error of `write` is logged and stops nothing: later items are written all the same. The newest item, where its
    error is one that `may_pass`, is held and tried again every RETRY_EVERY_S until it is written or any newer one is
    submitted: never is an older item written after a newer one. `flush` and `close` wait for that for PATIENCE_S, and
    raise the error of the newest item, whose state is then not on disk.

    Every item ends in one call of `release(item, dropped)`, `dropped` where it was never tried. `name` is what messages
    call an item. `on_wait` is told, once each time, that `flush` or `close` waits for the disk to mend.
    """

    def __init__(
        self,
        write: Callable[[T], None],
        release: Callable[[T, bool], None] = lambda _item, _dropped: None,
        name: Callable[[T], str] = lambda _: "a checkpoint",
        may_pass: Callable[[Exception], bool] = lambda _: False,
        on_wait: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._write = write
        self._name = name
        self._release = release
        self._may_pass = may_pass
        self._on_wait = on_wait
        self._waiting: deque[_Waiting[T]] = deque()
        self._failed: _Failed[T] | None = None
        self._busy_since: float | None = None
        self._error: Exception | None = None
        self._failed_name = ""
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def submit(self, item: T, purposes: frozenset[str] = frozenset({"last"}), *, keep: bool = False) -> None:
        """Accept an item without waiting for the disk; `keep` it where not too many such wait already."""
        with self._changed:
            if self._closing:
                raise RuntimeError("the checkpoint writer is closed; nothing more can be saved through it")
            dropped = self._drop(purposes)
            failed, self._failed = self._failed, None
            kept = keep and sum(each.kept for each in self._waiting) < MAX_KEPT_WAITING
            self._waiting.append(_Waiting(item, purposes, time.monotonic(), kept))
            self._changed.notify_all()
        self._release_dropped(dropped)
        if failed is not None:
            self._release(failed.item, False)

    def supersede(self, purposes: frozenset[str]) -> None:
        """Drop what an item for these purposes takes the place of; before it is made, its memory can then be theirs."""
        with self._changed:
            dropped = self._drop(purposes)
        self._release_dropped(dropped)

    def _drop(self, purposes: frozenset[str]) -> list[T]:
        dropped = [each.item for each in self._waiting if each.purposes <= purposes and not each.kept]
        self._waiting = deque(each for each in self._waiting if each.kept or not each.purposes <= purposes)
        return dropped

    def _release_dropped(self, items: list[T]) -> None:
        for item in items:
            logger.info("the disk is slow: a waiting checkpoint gives way to a newer one")
            self._release(item, True)

    def flush(self) -> None:
        """Wait until everything accepted so far is written; raises CheckpointWriteError if the newest was not."""
        self._settle()
        with self._changed:
            error = self._error
        if error is not None:
            raise CheckpointWriteError(f"{self._failed_name} could not be written: {error}") from error

    def _settle(self) -> None:
        """Wait until nothing is left to write: while the disk hangs without end, while it fails for PATIENCE_S."""
        deadline: float | None = None
        given_up: _Failed[T] | None = None
        with self._changed:
            while self._waiting or self._busy_since is not None or self._failed is not None:
                if self._failed is None or self._busy_since is not None:
                    self._changed.wait()
                    continue
                if deadline is None:
                    deadline = time.monotonic() + PATIENCE_S
                    if PATIENCE_S > 0:
                        self._tell_of_waiting()
                if (left := deadline - time.monotonic()) > 0:
                    self._changed.wait(left)
                else:
                    given_up, self._failed = self._failed, None
                    self._changed.notify_all()
        if given_up is not None:
            self._release(given_up.item, False)

    def _tell_of_waiting(self) -> None:
        message = (
            f"{self._failed_name} is kept in memory and tried again every {RETRY_EVERY_S:.0f} s for "
            f"{PATIENCE_S / 60:.0f} min: make room on the disk; ending the process loses it"
        )
        logger.error(message)
        self._on_wait(message)

    def lag_s(self) -> float:
        """Seconds since the oldest unfinished item was submitted; 0 when all is written."""
        with self._changed:
            times = [each.since_s for each in self._waiting]
            if self._failed is not None:
                times.append(self._failed.since_s)
            if self._busy_since is not None:
                times.append(self._busy_since)
        return time.monotonic() - min(times) if times else 0.0

    def close(self) -> None:
        """`flush`, and end the thread; raises as `flush` does, each time."""
        with self._changed:
            self._closing = True
        self._settle()
        with self._changed:
            self._changed.notify_all()
        self._thread.join()
        self.flush()

    def _next(self) -> tuple[T, float, bool] | None:
        """What to write now, since when it waits and whether it has failed before; None once closed."""
        with self._changed:
            while True:
                if self._waiting:
                    item, _, self._busy_since, _ = self._waiting.popleft()
                    return item, self._busy_since, False
                pause = None
                if self._failed is not None:
                    pause = self._failed.again_s - time.monotonic()
                    if pause <= 0:
                        (item, self._busy_since, _), self._failed = self._failed, None
                        return item, self._busy_since, True
                elif self._closing:
                    return None
                self._changed.wait(pause)

    def _run(self) -> None:
        while (due := self._next()) is not None:
            item, since_s, again = due
            failure: Exception | None = None
            try:
                self._write(item)
            except Exception as error:  # handed over: flush and close raise it
                expected = isinstance(error, OSError | CheckpointError)
                level = logging.DEBUG if again and self._may_pass(error) else logging.ERROR
                self._failed_name = self._name(item)
                logger.log(level, "%s could not be written: %s", self._failed_name, error, exc_info=not expected)
                failure = error.with_traceback(None)  # its frames hold the whole state
            with self._changed:
                held = failure is not None and self._may_pass(failure) and not self._waiting
                if held:
                    self._failed = _Failed(item, since_s, time.monotonic() + RETRY_EVERY_S)
            try:
                if not held:
                    self._release(item, False)
            except Exception as error:  # what was to be written is not touched by that; the next save has other memory
                logger.error("the memory of %s is lost: %s", self._name(item), error)
            finally:
                with self._changed:
                    self._error = failure
                    self._busy_since = None
                    self._changed.notify_all()
