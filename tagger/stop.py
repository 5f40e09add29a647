"""Stopping on request: a signal or a STOP file asks; a second signal, after SAME_REQUEST_S, ends the process at once.

While there is nothing to save yet, the first signal ends at once too, by an exception of the main thread.
"""

import contextlib
import logging
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

logger = logging.getLogger(__name__)

# What asks a process to end: Ctrl-C, a batch system, and a terminal that is closed, where the platform has it.
SIGNALS = (signal.SIGINT, signal.SIGTERM) + (() if sys.platform == "win32" else (signal.SIGHUP,))
# What sends a signal to a process and then to its whole group (as `timeout` does) means one request, not two.
SAME_REQUEST_S = 0.5
# A look at a file costs microseconds on a local disk and milliseconds on a slow network.
_LOOK_EVERY_S = 1.0
FILE_REQUEST = 1


class StoppedEarly(KeyboardInterrupt):
    """A signal that came while there was nothing to save; like Ctrl-C it may arrive at any line."""


class StopRequest:
    """Whether the run has been asked to stop. A context manager of the main thread.

    Half a second after the first signal the system's own handlers are back, so that a second one does not wait for
    anything. A SIGHUP that was ignored from the start stays so, as `nohup` wants it.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous = {
            number: handler
            for number in SIGNALS
            if (handler := signal.getsignal(number)) != signal.SIG_IGN or number in (signal.SIGINT, signal.SIGTERM)
        }
        self._made_at = time.time()
        self._at_once = False
        self._what_follows = "stopping after this step with a checkpoint"
        self._told = 0
        self._file: Path | None = None
        self._file_seen = False
        self._looked_at = 0.0

    def watch(self, file: Path) -> None:
        """From now on the existence of `file` asks too. One that is older than this request is removed."""
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_mtime < self._made_at:
                logger.warning("%s was there before this run started: removed", file)
                file.unlink()
        self._file = file

    def at_once(self) -> None:
        """From now until `hold`, a signal raises StoppedEarly; here, where one came before."""
        self._at_once = True
        if self.signal_number is not None:
            raise StoppedEarly

    def hold(self, what_follows: str = "stopping after this step with a checkpoint") -> None:
        """There is something to save: from now on a request is noted, and `what_follows` is what people are told."""
        self._at_once = False
        self._what_follows = what_follows

    @property
    def requested(self) -> bool:
        """True from the first signal on, or from when the file was seen (it is looked for once a second)."""
        if self.signal_number is not None or self._file_seen or self._told:
            return True
        now = time.monotonic()
        if self._file is not None and now - self._looked_at >= _LOOK_EVERY_S:
            self._looked_at = now
            self._file_seen = self._file.exists()
            if self._file_seen:
                logger.warning("%s: %s", self._file, self._what_follows)
        return self._file_seen

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it: 129 SIGHUP, 130 Ctrl-C, 143 SIGTERM. 0 for a STOP file."""
        if self.signal_number is None:
            return self._told if self._told > FILE_REQUEST else 0
        return 128 + self.signal_number

    @property
    def request(self) -> int:
        """What other ranks are told: 0 for no request, FILE_REQUEST for a STOP file, else the exit code of a signal."""
        return (self.exit_code or FILE_REQUEST) if self.requested else 0

    def adopt(self, request: int) -> None:
        """Take over a `request` of another rank. A signal that comes here as well is still this process's first."""
        if request and not self.requested:
            self._told = request
            logger.info("another rank was asked to stop: %s", self._what_follows)

    @property
    def reason(self) -> str:
        """What asked, for people."""
        number = self.exit_code - 128
        return signal.Signals(number).name if number > 0 else f"{self._file or 'a STOP file'} was there"

    def honour(self) -> None:
        """The run has stopped: the file has done its work and goes."""
        if self._file_seen and self._file is not None:
            self._file.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in self._previous:
                signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the interpreter's signature
        if self.signal_number is not None:
            return  # came before it could be ignored
        self.signal_number = number
        self._answer_all(signal.SIG_IGN)
        time.sleep(SAME_REQUEST_S)  # here, because later this thread may be where no Python runs
        self._answer_all(signal.SIG_DFL)
        if self._at_once:
            raise StoppedEarly
        logger.warning("%s: %s; once more to end at once", signal.Signals(number).name, self._what_follows)

    def _answer_all(self, handler: signal.Handlers) -> None:
        for number in self._previous:
            signal.signal(number, handler)
