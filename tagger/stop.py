"""Stopping on request: the first SIGINT or SIGTERM asks, the second one ends the process at once."""

import logging
import signal
import threading
from types import FrameType, TracebackType

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether a signal has asked the run to stop; `signal_number` says which. A context manager of the main thread.

    After the first signal the system's own handlers are back, so that a second one does not wait for anything.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous = {number: signal.getsignal(number) for number in _SIGNALS}

    @property
    def requested(self) -> bool:
        """True from the first signal on."""
        return self.signal_number is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it: 130 for Ctrl-C, 143 for SIGTERM."""
        assert self.signal_number is not None
        return 128 + self.signal_number

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the interpreter's signature
        self.signal_number = number
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        logger.warning(
            "%s: stopping after this step with a checkpoint; once more to end at once", signal.Signals(number).name
        )
