"""The process that talks to Weights & Biases, so that the trainer never waits for it. Started by tagger/wandb_sink.py.

It reads messages from its standard input and answers failures, one JSON object a line, on its standard output. It ends
with the trainer, whatever the client is at. The `wandb` package is imported here and only here.
"""

import contextlib
import importlib
import json
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import psutil
from PIL import Image

from tagger.errors import SinkError
from tagger.stop import SIGNALS

# Lengths of the JSON and of the raw bytes that follow it.
HEADER = struct.Struct("<QQ")
_LOOK_EVERY_S = 1.0


def messages(stream: BinaryIO) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Each message with its raw bytes; ends where the stream does, even inside of one."""
    while len(head := stream.read(HEADER.size)) == HEADER.size:
        json_bytes, raw_bytes = HEADER.unpack(head)
        text, raw = stream.read(json_bytes), stream.read(raw_bytes)
        if len(text) + len(raw) < json_bytes + raw_bytes:
            return
        yield json.loads(text), raw


@contextlib.contextmanager
def failures_named() -> Iterator[None]:
    """Whatever the W&B client raises becomes a SinkError of one line."""
    try:
        yield
    except Exception as error:
        raise SinkError(" ".join(f"{type(error).__name__}: {error}".split())) from error


class _Client:
    """The W&B run."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        with failures_named():
            self._wandb: Any = importlib.import_module("wandb")
            self._run: Any = self._wandb.init(
                project=setup["project"],
                name=setup["run_name"],
                id=setup["identity"],
                resume="allow",
                dir=setup["folder"],
                mode=setup["mode"],
                config=setup["settings"],
                settings=self._wandb.Settings(
                    console="off", silent=True, init_timeout=setup["timeout_s"], x_disable_stats=True
                ),
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")

    def take(self, message: Mapping[str, Any], raw: bytes) -> None:
        with failures_named():
            values = dict(message["values"])
            if "picture" in message:
                values[message["picture"]] = self._wandb.Image(Image.frombytes("RGB", tuple(message["size"]), raw))
            if "histogram" in message:
                bins = message["counts"], message["edges"]
                values[message["histogram"]] = self._wandb.Histogram(np_histogram=bins)
            if "curves" in message:
                lines, name = message["lines"], message["curves"]
                values[name] = self._wandb.plot.line_series(**lines, title=name, xname="recall")
            self._run.log(values)

    def finish(self) -> None:
        with failures_named():
            self._run.finish()


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, also while the client waits for a network."""
    while psutil.pid_exists(parent) if sys.platform == "win32" else os.getppid() == parent:
        time.sleep(_LOOK_EVERY_S)
    os._exit(1)


def main() -> None:
    """Serve the process that started this one until it says `end`."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    # The client may read and print; neither may come between the messages.
    commands, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - not a path of ours
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)

    def answer(kind: str, error: SinkError) -> None:
        answers.write(json.dumps({kind: str(error)}) + "\n")
        answers.flush()

    received = messages(commands)
    setup, _ = next(received)
    try:
        client = _Client(setup)
    except SinkError as error:
        answer("fatal", error)
        return
    for message, raw in received:
        try:
            if message.get("end"):
                client.finish()
                return
            client.take(message, raw)
        except SinkError as error:
            answer("failed", error)
    # No `end`: the trainer is gone, and nobody waits for what is pending.
    os._exit(1)


if __name__ == "__main__":
    main()
