"""Log records of a command: one line an event on the console, and all of them with tracebacks in a run's `train.log`.

A full disk or a closed console loses lines and counts them; it never stops the work and never prints a traceback of
the logging module itself.
"""

import logging
import sys
from pathlib import Path

_FILE_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


class RunLogHandler(logging.FileHandler):
    """Appends every record to a file; `dropped` counts the records that the disk did not take."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(path, mode="a", encoding="utf-8")
        self.dropped = 0
        self.setFormatter(logging.Formatter(_FILE_FORMAT))

    def handleError(self, record: logging.LogRecord) -> None:
        """Count a record that the disk refused; any other fault is one of the program and shown as logging does."""
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)
            return
        if self.dropped == 0:
            _to_stderr(f"WARNING: {self.baseFilename} does not take more lines (is the disk full?); they are counted")
        self.dropped += 1

    def close(self) -> None:
        dropped, self.dropped = self.dropped, 0
        if dropped:
            _to_stderr(f"WARNING: {self.baseFilename} lacks up to {dropped} lines that could not be written")
        try:
            super().close()
        except OSError as error:
            # The last flush of a full disk; what it held is lost and was counted above where it was a whole record.
            _to_stderr(f"WARNING: {self.baseFilename} could not be closed in order: {error}")


class ConsoleLogHandler(logging.Handler):
    """Prints `WARNING: message` (no prefix for INFO) to whatever `sys.stderr` is at that moment.

    The stream is looked up for each record because a progress bar replaces `sys.stderr` to print above itself. The
    traceback of a record stays out: it is in the log file.
    """

    speaker = ""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = self.speaker + ("" if record.levelno == logging.INFO else f"{record.levelname}: ")
        try:
            line = prefix + record.getMessage()
        except (TypeError, ValueError, KeyError):
            # The record's arguments do not fit its text; logging's own way to say where.
            self.handleError(record)
            return
        _to_stderr(line)


def log_to_console(level: int = logging.INFO) -> None:
    """Send the records of this process to the console, once however often it is called."""
    root = logging.getLogger()
    root.setLevel(min(root.level, level))
    if not any(isinstance(handler, ConsoleLogHandler) for handler in root.handlers):
        root.addHandler(ConsoleLogHandler(level))


def log_as_rank(rank: int, level: int) -> None:
    """From now on the console shows what this process logs from a level on, and that it is not rank 0 that says it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, ConsoleLogHandler):
            handler.speaker = f"rank {rank}: "
            handler.setLevel(level)


def _to_stderr(line: str) -> None:
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        # A console that is closed, full or absent (pythonw): there is nobody left to tell.
        return
