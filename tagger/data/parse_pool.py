"""Parsing of many sidecars in several processes, with the same outcome as in one.

The processes are plain commands that read tasks from a pipe and write arrays back: unlike those of multiprocessing
they do not import the program that runs here, and so they start in a quarter of a second, on every system, and never
load what they do not need. One that dies is replaced by this process, which says so.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Generic, TypeVar

import numpy as np
import orjson

from tagger.command import held_back
from tagger.data.scan import DatasetError
from tagger.data.sidecar import ExtraField
from tagger.data.sidecar_rows import ParsedSidecars, SidecarParser
from tagger.stop import SIGNALS

# Below this many files the start of other processes costs more than they save.
_MIN_FILES = 100_000
_MAX_PROCESSES = 16
_ARRAYS = ("tag_ids", "counts", "ratings", "image_ids", "sizes", "mtimes")

_log = logging.getLogger(__name__)

Block = TypeVar("Block")


@dataclass(frozen=True)
class ParseTask(Generic[Block]):
    """Sidecars to read below one root, for a block of rows; none is nothing to do."""

    block: Block
    root: str
    sidecars: Sequence[str]


def parse_in_order(
    tasks: Iterable[ParseTask[Block]],
    extra_fields: Sequence[ExtraField],
    num_files: int,
    processes: int | None = None,
) -> Iterator[tuple[ParseTask[Block], ParsedSidecars | None, int]]:
    """(task, what its sidecars say, number of the parser whose tag numbers those are), in the order of the tasks.

    processes: 1 for this one alone, None for as many as the machine has cores if `num_files` is worth it. Raises
    DatasetError when storage keeps failing.
    """
    if processes is None:
        processes = 1 if num_files < _MIN_FILES else min(_num_cores(), _MAX_PROCESSES)
    local = SidecarParser(extra_fields)
    try:
        if processes > 1 and sys.executable:
            with _Helpers(processes, extra_fields) as helpers:
                yield from helpers.run(tasks, local)
        else:
            for task in tasks:
                yield task, local.parse(task.root, task.sidecars) if task.sidecars else None, _HERE
    finally:
        local.close()


_HERE = -1


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _HelperLost(RuntimeError):
    """A helper ended in the middle of its work."""


class _Helper:
    """One parsing process, used by one thread at a time."""

    def __init__(self, number: int) -> None:
        self.number = number
        package_root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tagger.data.parse_pool"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )

    def begin(self, extra_fields: Sequence[ExtraField]) -> None:
        """Say how to parse; _HelperLost when the process is gone."""
        self._call([[field.name, field.prefix] for field in extra_fields], b"", expect_answer=False)

    def parse(self, root: str, sidecars: Sequence[str]) -> ParsedSidecars:
        """What sidecars say; DatasetError for failing storage, _HelperLost when the process is gone."""
        names = "\0".join((root, *sidecars)).encode("utf-8", "surrogatepass")
        answer = self._call([], names)
        head, arrays = answer
        if "error" in head:
            raise DatasetError(head["error"])
        columns, start = {}, 0
        for name, (dtype, length) in zip(_ARRAYS, head["arrays"], strict=True):
            columns[name] = np.frombuffer(arrays, dtype=dtype, count=length, offset=start)
            start += columns[name].nbytes
        notes = [(place, kind, text) for place, kind, text in head["notes"]]
        return ParsedSidecars(**columns, new_tags=head["new_tags"], notes=notes)

    def kill(self) -> None:
        """End the process at once; a call that waits for it fails."""
        self._process.kill()

    def close(self) -> None:
        """End the process: it leaves when its input does."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _call(self, head: object, body: bytes, *, expect_answer: bool = True) -> tuple[dict, bytes]:  # type: ignore[type-arg]
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            _send(stdin, head, body)
            found = _receive(stdout) if expect_answer else ({}, b"")
        except OSError as error:
            raise _HelperLost from error
        if found is None:
            raise _HelperLost
        return found


class _Helpers:
    """Several parsing processes."""

    def __init__(self, number: int, extra_fields: Sequence[ExtraField]) -> None:
        self._free: SimpleQueue[_Helper] = SimpleQueue()
        self._all: list[_Helper] = []
        self._number = number
        self._fields = extra_fields
        self._threads = ThreadPoolExecutor(number, thread_name_prefix="parse-sidecars")

    def __enter__(self) -> "_Helpers":
        for number in range(self._number):
            try:
                # The pipe's end is theirs; a signal to the whole group must not end them in the middle of a task.
                with held_back(*SIGNALS):
                    self._all.append(_Helper(number))
            except OSError as error:
                _log.warning("cannot start a process that parses sidecars (%s); going on with %d", error, number)
                break
            # One that is gone by then is found out by its first task.
            with contextlib.suppress(_HelperLost):
                self._all[-1].begin(self._fields)
            self._free.put(self._all[-1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for helper in self._all:
                helper.kill()
        self._threads.shutdown(cancel_futures=True)
        for helper in self._all:
            helper.close()

    def run(
        self, tasks: Iterable[ParseTask[Block]], local: SidecarParser
    ) -> Iterator[tuple[ParseTask[Block], ParsedSidecars | None, int]]:
        """As `parse_in_order`."""
        waiting: deque[tuple[ParseTask[Block], Future[tuple[ParsedSidecars, int]] | None]] = deque()
        source = iter(tasks)
        more = True
        while more or waiting:
            while more and len(waiting) < 2 * self._number:
                task = next(source, None)
                if task is None:
                    more = False
                else:
                    work = self._threads.submit(self._parse, task) if task.sidecars and self._all else None
                    waiting.append((task, work))
            if not waiting:
                return
            task, work = waiting.popleft()
            parsed, parser = None, _HERE
            if work is not None:
                try:
                    parsed, parser = work.result()
                except _HelperLost:
                    _log.warning("a process that parses sidecars ended before its work; doing that work here")
            if parsed is None and task.sidecars:
                parsed, parser = local.parse(task.root, task.sidecars), _HERE
            yield task, parsed, parser

    def _parse(self, task: ParseTask[Block]) -> tuple[ParsedSidecars, int]:
        helper = self._free.get()
        try:
            parsed = helper.parse(task.root, task.sidecars)
        finally:
            # A lost one too: whoever gets it learns at once that it is gone.
            self._free.put(helper)
        return parsed, helper.number


# Each message: the lengths of its two parts, eight bytes each, then JSON, then bytes.


def _send(stream: IO[bytes], head: object, body: bytes) -> None:
    text = orjson.dumps(head)
    stream.write(len(text).to_bytes(8, "little") + len(body).to_bytes(8, "little") + text + body)
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[dict, bytes] | None:  # type: ignore[type-arg]
    """None at the end of the stream, wherever that comes."""
    lengths = stream.read(16)
    sizes = int.from_bytes(lengths[:8], "little"), int.from_bytes(lengths[8:], "little")
    content = stream.read(sum(sizes))
    if len(lengths) < 16 or len(content) < sum(sizes):
        return None
    return orjson.loads(content[: sizes[0]]), content[sizes[0] :]


def main() -> int:
    """A parsing process: tasks on the standard input until it ends, answers on the standard output."""
    # Both reach the whole group; this process ends when its parent closes the pipe.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    tasks, answers = sys.stdin.buffer, sys.stdout.buffer
    first = _receive(tasks)
    if first is None:
        return 0
    parser = SidecarParser([ExtraField(name, prefix) for name, prefix in first[0]])
    while (task := _receive(tasks)) is not None:
        root, *sidecars = task[1].decode("utf-8", "surrogatepass").split("\0")
        try:
            parsed = parser.parse(root, sidecars)
        except DatasetError as error:
            _send(answers, {"error": str(error)}, b"")
            continue
        arrays = [np.asarray(getattr(parsed, name)) for name in _ARRAYS]
        head = {
            "arrays": [[array.dtype.str, len(array)] for array in arrays],
            "new_tags": parsed.new_tags,
            "notes": [[place, kind, text] for place, kind, text in parsed.notes],
        }
        _send(answers, head, b"".join(array.tobytes() for array in arrays))
    parser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
