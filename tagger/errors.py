"""How a command ends when something is wrong: kinds of error, and the exit code that tells them apart.

0        done (also: stopped by a STOP file, with a checkpoint)
1        anything else; the traceback is in train.log, or on the console where there is none
2        bad configuration or input
3        too many images refused
4        the loss or its gradient is no longer a number
5        out of memory
6        storage: a checkpoint or the data could not be written or read
129, 130, 143 stopped by SIGHUP, Ctrl-C or SIGTERM; a training run with a checkpoint, anything else
         with its temporary files removed
"""

import errno

# What the system says of a path that somebody named; other errors are the storage's.
PATH_ERRORS = frozenset(
    (
        errno.EACCES,
        errno.EPERM,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.EINVAL,
    )
)

# What it says of a disk that is full, failing or gone; with luck it passes.
STORAGE_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE))


class InputError(ValueError):
    """Bad configuration or input. One line: what was found, where, what was expected, what to do."""

    exit_code = 2


class DataFailureError(InputError):
    """More refused images than the budget allows."""

    exit_code = 3


class StorageError(RuntimeError):
    """Storage or memory that did not recover in time; no file is to blame."""


class LostFolderError(StorageError):
    """A run's folder is gone or another process's; nothing more may be written there."""


class DivergedError(RuntimeError):
    """Updates that had to be left out because they were not finite; the weights are those of before.

    `step` counts the updates up to the last bad one, `row_ids` are its images; both are empty where no single update
    is known to be the cause.
    """

    def __init__(self, message: str, step: int | None = None, row_ids: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.step = step
        self.row_ids = row_ids


class PeerFailedError(RuntimeError):
    """Another process of this run has ended; `status` and `exit_code` are those that it ended with, where known."""

    def __init__(self, message: str, status: str = "failed", exit_code: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.exit_code = exit_code


class SinkError(Exception):
    """A sink could not take a value; the run goes on without it."""


class RunFailedError(RuntimeError):
    """A run that ended badly and has said why, its traceback in train.log."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def is_storage_failure(error: BaseException) -> bool:
    """Whether the system says that a disk is full, failing or gone."""
    return isinstance(error, OSError) and error.errno in STORAGE_ERRORS
