"""Standard output of a command whose reader may have seen enough (`| head`) or be gone. Refuses nothing."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Print inside; when the reader is gone the command ends with code 1 (SystemExit) and without a word."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        raise SystemExit(1) from None


def print_if_read(line: str) -> None:
    """Print a line; a reader or terminal that is gone changes nothing about how the command ends."""
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except OSError:
        _drop_output()


def _drop_output() -> None:
    # Nothing more may be written, not even what the interpreter flushes at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
