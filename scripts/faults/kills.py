"""Processes killed while they save: at random moments, and at every file operation of the writer in turn.

Nothing in the program knows of it: the child puts its own functions in the place of the system's, gives each operation
a name ("before fsync manifest.json") and kills itself at the one it was told.
"""

import io
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeAlias

import torch

from scripts.faults.toy_run import Outcome, audit, audit_next_start, receive, save_until_killed, send_name, toy_state
from tagger.checkpoint.writer import list_temporaries

Acknowledged: TypeAlias = tuple[int, float]

# What the order of a save consists of. A writer that leaves one out is found by the order's own test; a discovery that
# misses one would test nothing there.
REQUIRED_POINTS = frozenset(
    f"{when} {what}"
    for when in ("before", "after")
    for what in (
        *(
            f"{operation} {name}"
            for operation in ("write", "fsync")
            for name in (
                "model.safetensors",
                "ema.safetensors",
                "optimizer.safetensors",
                "rng.safetensors",
                "state.json",
                "manifest.json",
                "best.json",
                "last.json",
            )
        ),
        "fsync temporary",
        "rename temporary",
        "fsync folder",
        "replace best.json",
        "replace last.json",
        "rename checkpoint",
        "unlink manifest.json",
        "rmdir removed",
        "rmdir temporary",
    )
)
_DISCOVERY_SAVES = 8
_MOST_SAVES = 40


_FORK = sys.platform == "linux"


def context() -> ForkContext | SpawnContext:
    """Fork where it is safe and fast; elsewhere every child starts afresh, which takes seconds."""
    return multiprocessing.get_context("fork") if _FORK else multiprocessing.get_context("spawn")


def _import_all() -> None:
    """What torch imports only when it makes its first optimizer, seconds of it, is then there in every fork."""
    if _FORK:
        torch.set_num_threads(1)
        toy_state()


def random_kills(folder: Path, number: int, seed: int = 0) -> Outcome:
    """Kill a process that saves at every step, after up to three acknowledgements and part of the next save; audit."""
    outcome = Outcome("random kill -9")
    _import_all()
    draw = random.Random(seed)
    stray = steps = 0
    save_s = 0.05  # follows what the disk takes, so that kills fall all over a save
    for kill in range(number):
        target = folder / f"kills-{kill // 20}"  # a few at a time, since all that is there is read after each kill
        target.mkdir(parents=True, exist_ok=True)
        process, connection = _start(save_until_killed, target)
        first = last = _acknowledgement(connection)
        for _ in range(draw.randint(0, 3)):
            asked = time.monotonic()
            last = _acknowledgement(connection)
            save_s = 0.5 * save_s + 0.5 * (time.monotonic() - asked)
        time.sleep(draw.uniform(0.0, 1.2 * save_s))
        process.kill()
        process.join()
        while isinstance(message := receive(connection), tuple):
            last = message
        connection.close()
        steps += last[0] - first[0]
        stray += bool(list_temporaries(target))
        found = [*audit(target, last), *audit_next_start(target)]
        outcome.trials += 1
        outcome.violations += [f"kill {kill}: {each}" for each in found]
    outcome.facts = {"steps acknowledged": steps, "left a temporary": stray}
    return outcome


def _acknowledgement(connection: Connection) -> Acknowledged:
    message = receive(connection)
    if not isinstance(message, tuple):
        raise RuntimeError("the child ended before it was killed; its error is above")
    return message


def _start(target: Callable[..., None], *arguments: object) -> tuple[BaseProcess, Connection]:
    """A child that is given the other end of the connection after its first argument."""
    ours, theirs = context().Pipe(duplex=False)
    process = context().Process(target=target, args=(arguments[0], theirs, *arguments[1:]), daemon=True)
    process.start()
    theirs.close()
    return process, ours


class Tripwire:
    """Names the file operations in `folder` as they happen; at the chosen occurrence of one the process kills itself.

    Installed, it replaces functions of `os` and `io` in this process.
    """

    def __init__(self, folder: Path, point: str | None = None, occurrence: int = 1) -> None:
        self.counts: Counter[str] = Counter()
        self.order: list[str] = []
        self._folder = folder
        self._point = point
        self._occurrence = occurrence
        self._names: dict[int, str] = {}
        self._real: dict[tuple[Any, str], Any] = {}

    def install(self) -> None:
        """From now on operations are watched."""
        for name in ("rename", "replace", "unlink", "rmdir"):
            self._patch(os, name, self._around)
        self._patch(os, "fsync", self._around_fsync)
        self._patch(os, "open", self._around_os_open)
        self._patch(io, "open", self._around_open)

    def uninstall(self) -> None:
        """Put the system's functions back."""
        for (module, name), real in self._real.items():
            setattr(module, name, real)

    def _patch(self, module: Any, name: str, wrap: Callable[[str, Any], Any]) -> None:
        real = getattr(module, name)
        self._real[module, name] = real
        setattr(module, name, wrap(name, real))

    def reach(self, point: str) -> None:
        """Note that the process is here, or end it."""
        self.counts[point] += 1
        self.order.append(point)
        if point == self._point and self.counts[point] == self._occurrence:
            os.kill(os.getpid(), signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM)
            time.sleep(60)  # the signal may take a moment; nothing else may happen in it

    def label(self, path: str | os.PathLike[str]) -> str | None:
        """What a path stands for; None outside the folder."""
        where = Path(path)
        if where == self._folder:
            return "folder"
        if where.is_absolute() and not where.is_relative_to(self._folder):
            return None
        name = where.name
        for mark, meaning in ((".tmp-removed-", "removed"), (".tmp-", "temporary"), ("step-", "checkpoint")):
            if name.startswith(mark):
                return meaning
        for record in ("best.json", "last.json"):
            if name.startswith(f".{record}"):
                return record
        return name

    def _around(self, name: str, real: Any) -> Any:
        def call(path: Any, *rest: Any, **options: Any) -> Any:
            what = self.label(path)
            if what is None:
                return real(path, *rest, **options)
            self.reach(f"before {name} {what}")
            result = real(path, *rest, **options)
            self.reach(f"after {name} {what}")
            return result

        return call

    def _around_fsync(self, name: str, real: Any) -> Any:
        def call(handle: int) -> None:
            what = self._names.get(handle)
            if what is None:
                real(handle)
                return
            self.reach(f"before {name} {what}")
            real(handle)
            self.reach(f"after {name} {what}")

        return call

    def _around_os_open(self, _: str, real: Any) -> Any:
        def call(path: Any, flags: int, *rest: Any, **options: Any) -> int:
            handle: int = real(path, flags, *rest, **options)
            self._names.pop(handle, None)
            what = self.label(path)
            if what is not None:
                self._names[handle] = what
            return handle

        return call

    def _around_open(self, _: str, real: Any) -> Any:
        def call(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            what = self._names.get(file) if isinstance(file, int) else self.label(file)
            if what is None or not {"w", "x", "a"} & set(mode):
                return real(file, mode, *rest, **options)
            self.reach(f"before write {what}")
            stream = real(file, mode, *rest, **options)
            self._names[stream.fileno()] = what
            amid, after = f"amid write {what}", f"after write {what}"
            return _WatchedStream(stream, lambda: self.reach(amid), lambda: self.reach(after))

        return call


class _WatchedStream:
    """A file that tells of its first write and of its closing."""

    def __init__(self, stream: Any, on_write: Callable[[], None], on_close: Callable[[], None]) -> None:
        self._stream = stream
        self._on_write: Callable[[], None] | None = on_write
        self._on_close = on_close

    def write(self, data: Any) -> int:
        written: int = self._stream.write(data)
        if self._on_write is not None:
            self._on_write()
            self._on_write = None
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> "_WatchedStream":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._on_close()


def _rising(step: int) -> float:
    return float(step)


def _save_with_tripwire(folder: Path, connection: Connection, point: str | None, occurrence: int) -> None:
    """The child of the named points. Every save is the best one and drops the one before: all operations happen."""
    tripwire = Tripwire(folder, point, occurrence)
    save_until_killed(
        folder,
        connection,
        keep_last=1,
        wait=True,
        most_saves=_DISCOVERY_SAVES if point is None else _MOST_SAVES,
        score=float,
        prepare=tripwire.install,  # before the manager is made: its cleaning up is watched as well
    )
    tripwire.uninstall()
    for name in tripwire.order:
        send_name(connection, name)


def discover_points(folder: Path) -> list[str]:
    """Names of all file operations of a start and eight saves, in the order they were made."""
    _import_all()
    folder.mkdir(parents=True)
    _plant_stray(folder)
    process, connection = _start(_save_with_tripwire, folder, None, 0)
    names = []
    while (message := receive(connection)) is not None:
        if isinstance(message, str):
            names.append(message)
    process.join()
    connection.close()
    return names


def _plant_stray(folder: Path) -> None:
    if not list_temporaries(folder):
        stray = folder / ".tmp-step-000000000-planted"
        stray.mkdir()
        (stray / "model.safetensors").write_bytes(b"part")


def kills_at_points(folder: Path, times: int, only: Sequence[str] = ()) -> Outcome:
    """Kill at each named point that often, at successive occurrences; audit, and go on in the same folder."""
    outcome = Outcome("kill at named points")
    counts = Counter(discover_points(folder / "discovery"))
    missing = sorted(REQUIRED_POINTS - counts.keys())
    if missing:
        outcome.violations.append(f"the writer does not pass {', '.join(missing)}")
    points = [point for point in counts if not only or point in only]
    for number, point in enumerate(points):
        target = folder / f"point-{number}"
        target.mkdir()
        acknowledged: Acknowledged = (0, math.nan)
        for time_ in range(1, times + 1):
            _plant_stray(target)
            killed, acknowledged = _kill_at(target, point, min(time_, counts[point]), acknowledged)
            found = [*audit(target, acknowledged), *audit_next_start(target)]
            if not killed:
                found.append("the point was not reached")
            outcome.trials += 1
            outcome.violations += [f"{point}, time {time_}: {each}" for each in found]
    outcome.facts = {"points": len(points)}
    return outcome


def _kill_at(folder: Path, point: str, occurrence: int, before: Acknowledged) -> tuple[bool, Acknowledged]:
    """Whether the child was killed there, and the last acknowledgement, of an earlier child if this one gave none."""
    process, connection = _start(_save_with_tripwire, folder, point, occurrence)
    last = before
    while (message := receive(connection)) is not None:
        if isinstance(message, tuple):
            last = message
    process.join()
    connection.close()
    return process.exitcode != 0, last
