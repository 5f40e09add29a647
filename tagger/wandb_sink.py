"""Weights & Biases behind a bounded queue and a process of its own: the trainer never waits for it.

A full queue refuses values, which the caller counts; `metrics.jsonl` has them all. Refuses to start without the
package.
"""

import importlib.util
import json
import os
import secrets
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from PIL import Image

from tagger.alerts import URL_VARIABLE
from tagger.errors import SinkError
from tagger.files import write_atomic
from tagger.metrics.levels import Levels
from tagger.sinks import HISTOGRAM_BINS, PictureSink
from tagger.wandb_process import HEADER

MAX_ENTRIES = 1000
MAX_BYTES = 32 << 20
CLOSE_S = 15.0
_GONE_S = 2.0


class WandbSink(PictureSink):
    """Weights & Biases, which needs no network in mode `offline`.

    The identity of the W&B run is kept in `folder`, so that a resumed run continues it. W&B steps may not go back, so
    the step is logged as a value and named the x axis. No call waits for the client but `close`, and that at most
    `close_s`; what the client raises comes back as the SinkError of a later call.
    """

    name = "Weights & Biases"

    def __init__(
        self,
        folder: Path,
        *,
        project: str,
        run_name: str,
        mode: Literal["online", "offline"],
        settings: Mapping[str, object],
        resume_step: int | None = None,
        timeout_s: float = 30.0,
        close_s: float = CLOSE_S,
    ) -> None:
        """`timeout_s`: how long the client may take to begin. Raises SinkError where the package is missing."""
        if importlib.util.find_spec("wandb") is None:
            raise SinkError("the package is not installed; run 'pip install wandb'")
        identity = folder / "wandb-id"
        if resume_step is None or not identity.is_file():
            write_atomic(identity, secrets.token_hex(8).encode())
        self._close_s = close_s
        self._failures: deque[str] = deque()
        self._fatal: str | None = None
        self._fatal_told = False
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tagger.wandb_process", str(os.getpid())],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            **_own_group(),
        )
        assert self._process.stdin is not None
        self._outbox = _Outbox(self._process.stdin)
        self._listener = threading.Thread(target=self._listen, name="wandb-listen", daemon=True)
        self._listener.start()
        setup = {
            "project": project,
            "run_name": run_name,
            "identity": identity.read_text(encoding="ascii").strip(),
            "folder": str(folder),
            "mode": mode,
            "settings": dict(settings),
            "timeout_s": timeout_s,
        }
        self._outbox.offer(_packed(setup))

    def write_scalars(self, scalars: Mapping[str, float], step: int, epoch: int, wall_time: float) -> None:
        self._send({"values": {**scalars, "step": step, "epoch": epoch, "time": wall_time}})

    def write_picture(self, name: str, picture: Image.Image, step: int, wall_time: float) -> None:
        message = {"values": {"step": step, "time": wall_time}, "picture": name, "size": picture.size}
        self._send(message, picture.convert("RGB").tobytes())

    def write_histogram(self, name: str, values: np.ndarray, step: int, wall_time: float) -> None:
        counts, edges = np.histogram(values, bins=HISTOGRAM_BINS)
        bins = {"histogram": name, "counts": counts.tolist(), "edges": edges.tolist()}
        self._send({"values": {"step": step, "time": wall_time}, **bins})

    def write_curves(self, name: str, curves: Mapping[str, Levels], step: int, wall_time: float) -> None:
        taken = {label: curve.predicted > 0 for label, curve in curves.items()}
        lines = {
            "keys": list(curves),
            "xs": [np.round(curve.recall[taken[label]], 5).tolist() for label, curve in curves.items()],
            "ys": [np.round(curve.precision[taken[label]], 5).tolist() for label, curve in curves.items()],
        }
        self._send({"values": {"step": step, "time": wall_time}, "curves": name, "lines": lines})

    def close(self) -> None:
        """Raises SinkError for what could not be handed over."""
        self._outbox.end(_packed({"end": True}))
        try:
            self._process.wait(self._close_s)
            in_time = True
        except subprocess.TimeoutExpired:
            in_time = False
            self._process.kill()
            self._process.wait(_GONE_S)
        self._listener.join(_GONE_S)
        self._outbox.join(_GONE_S)
        if not in_time:
            raise SinkError(f"not everything was taken within {self._close_s:.0f} s; metrics.jsonl has it")
        if self._fatal is not None and not self._fatal_told:
            raise SinkError(self._fatal)
        if self._failures:
            raise SinkError(f"{self._failures[0]} ({len(self._failures)} times)")

    def _send(self, message: Mapping[str, object], raw: bytes = b"") -> None:
        if self._fatal is not None:
            self._fatal_told = True
            raise SinkError(self._fatal)
        if not self._outbox.offer(_packed(message, raw)):
            raise SinkError("its queue is full; metrics.jsonl has what it misses")
        if self._failures:
            raise SinkError(self._failures.popleft())

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                answer = json.loads(line)
                if "fatal" in answer:
                    self._fatal = answer["fatal"]
                else:
                    self._failures.append(answer["failed"])
        code = self._process.wait()
        if self._fatal is None and not self._outbox.ended:
            self._fatal = f"its process ended with code {code}; metrics.jsonl has what it misses"


class _Outbox:
    """What a pipe has not taken yet, bounded in number and bytes, and the thread that waits for the pipe."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.ended = False
        self._stream = stream
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._thread = threading.Thread(target=self._work, name="wandb-write", daemon=True)
        self._thread.start()

    def offer(self, data: bytes) -> bool:
        """Queue a message without waiting for the pipe; False where there is no room."""
        with self._changed:
            room = len(self._waiting) < MAX_ENTRIES and self._bytes + len(data) <= MAX_BYTES
            if room:
                self._waiting.append(data)
                self._bytes += len(data)
                self._changed.notify_all()
            return room

    def end(self, data: bytes) -> None:
        """Queue the last message, for which there is always room."""
        with self._changed:
            self._waiting.append(data)
            self._bytes += len(data)
            self.ended = True
            self._changed.notify_all()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread."""
        self._thread.join(timeout_s)

    def _work(self) -> None:
        try:
            with self._stream:
                while True:
                    with self._changed:
                        self._changed.wait_for(lambda: self._waiting)
                        data = self._waiting.popleft()
                        last = self.ended and not self._waiting
                    remaining = memoryview(data)
                    while remaining:
                        # Unbuffered, and no lock is held while the pipe is full.
                        remaining = remaining[self._stream.write(remaining) :]
                    with self._changed:
                        self._bytes -= len(data)
                    if last:
                        return
        except OSError:
            return  # the process is gone: `_listen` says so


def _packed(message: Mapping[str, object], raw: bytes = b"") -> bytes:
    text = json.dumps(message, default=str).encode()
    return HEADER.pack(len(text), len(raw)) + text + raw


def _environment() -> dict[str, str]:
    """Where this project lies, and no secret that is not the client's."""
    paths = [str(Path(path).resolve()) for path in sys.path]
    inherited = {name: value for name, value in os.environ.items() if name != URL_VARIABLE}
    return {**inherited, "PYTHONPATH": os.pathsep.join(paths)}


def _own_group() -> dict[str, Any]:
    """A terminal's Ctrl-C goes to the processes of a group; it must not reach this one before it has its handlers."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"process_group": 0}
