"""Each fault has its exit code and its reason."""

import errno

import pytest
import torch

from tagger.checkpoint.format import NotFiniteError
from tagger.checkpoint.writer import CheckpointWriteError
from tagger.config_io import ConfigError
from tagger.endings import diagnose
from tagger.errors import DataFailureError, DivergedError, InputError, StorageError
from tagger.files import FormatError

FAULTS: list[tuple[BaseException, str, int]] = [
    (ConfigError("loss.gamma_neg=-1 is below 0"), "failed", 2),
    (InputError("no images found"), "failed", 2),
    (FormatError("vocabulary is newer"), "failed", 2),
    (DataFailureError("51 of 1000 images were refused"), "failed", 3),
    (DivergedError("4 updates in a row", 7, (1, 2)), "diverged", 4),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "failed", 5),
    (MemoryError(), "failed", 5),
    (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        "failed",
        5,
    ),
    (CheckpointWriteError("a checkpoint could not be written: No space left on device"), "failed", 6),
    (OSError(errno.ENOSPC, "No space left on device"), "failed", 6),
    (StorageError("a.jpg: Input/output error, still after 300 s"), "failed", 6),
    (ZeroDivisionError("division by zero"), "failed", 1),
    (OSError(errno.ENOENT, "No such file or directory"), "failed", 1),
]


def test_a_last_state_that_is_not_finite_is_divergence_and_no_fault_of_the_disk() -> None:
    error = CheckpointWriteError(
        "the newest checkpoint could not be written: head.weight (ema) is not finite at step 7"
    )
    error.__cause__ = NotFiniteError("head.weight (ema) is not finite at step 7")
    ending = diagnose(error)
    assert (ending.status, ending.exit_code) == ("diverged", 4)
    assert ending.reason and "optimizer.learning_rate" in ending.reason and "disk" not in ending.reason


@pytest.mark.parametrize(("error", "status", "exit_code"), FAULTS, ids=[type(fault[0]).__name__ for fault in FAULTS])
def test_every_fault_has_its_ending(error: BaseException, status: str, exit_code: int) -> None:
    ending = diagnose(error)
    assert (ending.status, ending.exit_code) == (status, exit_code)
    assert ending.reason and "\n" not in ending.reason
    if exit_code == 5:
        assert "training.batch_size" in ending.reason
    if exit_code == 6:
        assert "lower " in ending.reason or "disk" in ending.reason
