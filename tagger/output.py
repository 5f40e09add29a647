"""Standard output of a command whose reader may have seen enough (`| head`). Refuses nothing."""

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
        # Nothing more may be written, not even what the interpreter flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
