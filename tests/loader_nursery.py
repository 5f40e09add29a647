"""Loader processes that start in 20 ms instead of a second: forked from a process that has imported all they need.

For tests that start hundreds of them; each still runs `loader_process.main` from the beginning, in memory of its own.
Not on Windows.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from typing import IO

from tagger.data import loader_process, ring

_MAX_DESCRIPTORS = 16


class NurseryProcess:
    """What the ring asks of a `subprocess.Popen`. The exit code is always 0: only a parent learns it."""

    def __init__(self, pid: int, pipes: list[int], alive: int) -> None:
        self.pid = pid
        self.stdin: IO[bytes] = os.fdopen(pipes[0], "wb")
        self.stdout: IO[bytes] = os.fdopen(pipes[1], "rb")
        self.stderr: IO[bytes] = os.fdopen(pipes[2], "rb")
        self._alive: IO[bytes] = os.fdopen(alive, "rb")

    def wait(self, timeout: float | None = None) -> int:
        """Until the process is gone, which closes its end of a pipe that nobody writes to."""
        if not select.select([self._alive], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a loader process", timeout or 0.0)
        return 0

    def kill(self) -> None:
        """SIGKILL, unless it is gone."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
            return
        os.kill(self.pid, signal.SIGKILL)


class Nursery:
    """Starts loader processes in the place of `ring._started`."""

    def __init__(self) -> None:
        self._line, theirs = socket.socketpair()
        self.num_started = 0
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tests.loader_nursery", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env=ring._environment(),
            )

    def start(self, setup: loader_process.Setup, descriptors: tuple[int, ...]) -> NurseryProcess:
        ends = [os.pipe() for _ in range(4)]
        theirs = [ends[0][0], ends[1][1], ends[2][1], ends[3][1]]
        ours = [ends[0][1], ends[1][0], ends[2][0]]
        request = json.dumps({"setup": asdict(setup), "descriptors": descriptors}).encode()
        socket.send_fds(self._line, [request], [*theirs, *descriptors])
        for descriptor in theirs:
            os.close(descriptor)
        pid = int(self._line.recv(32))
        self.num_started += 1
        return NurseryProcess(pid, ours, ends[3][0])

    def close(self) -> None:
        self._line.close()
        assert self._process.wait(20) == 0


@contextlib.contextmanager
def nursery() -> Iterator[Nursery]:
    """While it is open, rings of this process get their loader processes from it."""
    opened, inner = Nursery(), ring._started
    ring._started = opened.start
    try:
        yield opened
    finally:
        ring._started = inner
        opened.close()


def _serve(line: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system takes the dead away
    while True:
        content, received, _, _ = socket.recv_fds(line, 1 << 16, _MAX_DESCRIPTORS)
        if not content:
            return
        request = json.loads(content)
        if not (pid := os.fork()):
            _become(line, request["setup"], received, request["descriptors"])
        for descriptor in received:
            os.close(descriptor)
        line.send(str(pid).encode())


def _become(line: socket.socket, setup: dict[str, object], received: list[int], descriptors: list[int]) -> None:
    """A loader process, with each descriptor under the number that it has in the trainer."""
    try:
        line.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        free = 1 + max(received + descriptors)
        moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, free) for descriptor in received]
        for descriptor in received:
            os.close(descriptor)
        stdin, stdout, stderr, _alive, *shared = moved
        for source, target in zip([stdin, stdout, stderr, *shared], [0, 1, 2, *descriptors], strict=True):
            os.dup2(source, target)
            os.close(source)
        sys.argv = ["loader_process", json.dumps(setup)]
        loader_process.main()
    except BaseException:
        traceback.print_exc()
    os._exit(1)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
