"""How a run ends: its status, its exit code and the reason in one line, told from the error that ended it.

Refuses nothing: an error that it does not know is a failure with exit code 1.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch

from tagger.checkpoint.format import NotFiniteError
from tagger.checkpoint.writer import CheckpointWriteError
from tagger.errors import (
    DivergedError,
    InputError,
    LostFolderError,
    PeerFailedError,
    StorageError,
    is_storage_failure,
)

# "killed" is never written: it is what a reader says of a run that is said to be running and whose process is gone.
Status = Literal["running", "completed", "stopped", "failed", "diverged", "killed"]
KILLED_REASON = "its process is gone without a word (kill -9, a second signal, a power cut); go on with --resume latest"

OUT_OF_MEMORY_ADVICE = (
    "lower training.batch_size and raise training.accumulation_steps by the same factor (the updates stay the same), "
    "or lower data.image_size"
)
STORAGE_ADVICE = "make room or mend the disk"
# torch raises plain RuntimeErrors for some of these; the texts are those of its allocators and of cuBLAS.
_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "cannot allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Ending:
    """What `results.json`, the exit code and an alert say about a run."""

    status: Status
    exit_code: int | None = None
    reason: str | None = None


def diagnose(error: BaseException) -> Ending:
    """The ending that an error means, with what to do about it where that is known."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, DivergedError):
        return Ending("diverged", 4, text)
    if isinstance(error, PeerFailedError):
        return Ending(cast(Status, error.status), 1 if error.exit_code is None else error.exit_code, text)
    if isinstance(error, InputError):
        return Ending("failed", error.exit_code, text)
    if is_out_of_memory(error):
        return Ending("failed", 5, f"out of memory ({text[:200]}); {OUT_OF_MEMORY_ADVICE}")
    if isinstance(error.__cause__, NotFiniteError):
        return Ending("diverged", 4, f"{text}; lower optimizer.learning_rate")
    if LostFolderError in (type(error), type(error.__cause__)):
        return Ending("failed", 6, text)
    if isinstance(error, CheckpointWriteError | StorageError) or is_storage_failure(error):
        return Ending("failed", 6, f"{text}; {STORAGE_ADVICE}")
    return Ending("failed", 1, f"{type(error).__name__}: {text}")


def is_unknown(error: BaseException) -> bool:
    """Whether it may be a fault of the program: one of no known kind, whose traceback is all that tells of it."""
    return diagnose(error).exit_code == 1 and not isinstance(error, PeerFailedError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text.lower() in str(error).lower() for text in _MEMORY_TEXTS)
