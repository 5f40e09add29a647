"""How a command ends: a fault in one line with its exit code, Ctrl-C, SIGTERM and SIGHUP in one line, all left tidy.

A signal is raised as KeyboardInterrupt in the main thread, so that every `with` and `finally` does its work: temporary
files go, child processes end. Exit codes: tagger/errors.py. A fault of the program itself keeps its traceback.
"""

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, ParamSpec, Self

from tagger.errors import PATH_ERRORS, InputError, RunFailedError
from tagger.launch import launched_as
from tagger.stop import SAME_REQUEST_S, SIGNALS

P = ParamSpec("P")


class Stopped(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP came."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def command(when_stopped: str = "") -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Let a `main` raise what goes wrong; it returns the exit code, after one line on stderr.

    when_stopped: what a user should know who stops it, e.g. "what is committed stays".
    """

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def ending_in_one_line(*args: P.args, **kwargs: P.kwargs) -> int:
            with _Signals() as signals:
                try:
                    return main(*args, **kwargs)
                except KeyboardInterrupt as error:
                    number = error.number if isinstance(error, Stopped) else signal.SIGINT
                except Exception as error:
                    if signals.number is None:
                        code = _failed(error)
                        if code is None:
                            raise
                        return code
                    number = signals.number  # what broke on the way out is not what ended it
                return _stopped(number, when_stopped)

        return ending_in_one_line

    return decorate


def start_quietly() -> None:
    """For the first lines of a command: while it imports its parts, a signal ends it at once, without a traceback."""
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, lambda number, _frame: os._exit(_stopped(number, "")))


@contextlib.contextmanager
def held_back(*numbers: signal.Signals) -> Iterator[None]:
    """A process started inside never sees these signals, not even while it still imports; this one does, afterwards.

    To be used around every start of a process: an exception out of the middle of a fork leaves locks behind. Does
    nothing on Windows.
    """
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve_parent() -> None:
    """For a worker of a pool: what a terminal sends is its parent's affair; SIGTERM or its parent's end ends it."""
    for number in SIGNALS:
        # Never ignored, not even for a moment: that would throw away a SIGTERM that came while it was held back.
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


class _Signals:
    """The first signal is raised; one that comes later, while the command tidies up, ends it at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._came_at = 0.0
        self._previous: dict[int, Any] = {}
        self._previous_hook = sys.unraisablehook

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # What was ignored from the start stays so, as in a shell's background job.
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._on_signal)
            if self._previous:
                sys.unraisablehook = self._on_unraisable
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous:
            sys.unraisablehook = self._previous_hook
        for number, handler in self._previous.items():
            signal.signal(number, handler if self.number is None else signal.SIG_DFL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the interpreter's signature
        now = time.monotonic()
        if self.number is None:
            self.number, self._came_at = number, now
            raise Stopped(number)
        if now - self._came_at > SAME_REQUEST_S:
            os._exit(128 + number)

    def _on_unraisable(self, lost: "sys.UnraisableHookArgs") -> None:
        """What a finaliser or a callback swallowed is raised again, once that has ended."""
        if not isinstance(lost.exc_value, Stopped):
            self._previous_hook(lost)
            return
        number, self.number = lost.exc_value.number, None
        threading.Timer(0.05, _signal_main_thread, (number,)).start()


def _signal_main_thread(number: int) -> None:
    if sys.platform == "win32":
        signal.raise_signal(number)
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def _stopped(number: int, note: str) -> int:
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    _say(f"stopped by {name}" + (f"; {note}" if note else ""))
    return 128 + number


def _failed(error: Exception) -> int | None:
    """The exit code of an error that is known, its line said; None for any other."""
    if isinstance(error, RunFailedError):
        return error.exit_code  # it has said why
    if isinstance(error, InputError):
        _say(f"error: {error}")
        return error.exit_code
    if isinstance(error, OSError) and error.errno in PATH_ERRORS and error.filename is not None:
        _say(f"error: {os.fspath(error.filename)!s}: {error.strerror}")
        return InputError.exit_code
    from tagger.endings import diagnose  # imports torch, which many commands do without

    ending = diagnose(error)
    if ending.exit_code in (None, 1):
        return None
    _say(f"error: {ending.reason}")
    return ending.exit_code


def _say(line: str) -> None:
    rank, _ = launched_as()
    if rank:  # one of several processes of a run
        line = f"rank {rank}: {line}"
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a console that is closed or absent
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
