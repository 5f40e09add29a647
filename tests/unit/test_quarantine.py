import errno
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagger.data.decode import DecodeError
from tagger.data.quarantine import (
    DataFailureError,
    FailureBudget,
    Refusal,
    StorageError,
    UnreadableFile,
    read_image_file,
    retry_transient,
)

HERE = Path("picture.png")


@pytest.mark.parametrize("size", [0, 1, 4096, 300_000])
def test_a_file_is_read_whole(size: int, tmp_path: Path) -> None:
    content = os.urandom(size)
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert read_image_file(path) == content


def test_a_missing_file_and_a_folder_have_their_reasons(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile) as caught:
        read_image_file(tmp_path / "gone.png")
    assert caught.value.reason == "missing"
    with pytest.raises(UnreadableFile):
        read_image_file(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_refused_without_hanging(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnreadableFile) as caught:
        read_image_file(tmp_path / "pipe.png")
    assert caught.value.reason == "not a regular file"


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    with pytest.raises(UnreadableFile) as caught:
        read_image_file(tmp_path / "loop.png")
    assert caught.value.reason == "link loop"


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "io"), OSError(errno.ESTALE, "stale"), MemoryError()])
def test_transient_errors_are_waited_out(fault: Exception) -> None:
    attempts = 0

    def attempt() -> None:
        nonlocal attempts
        attempts += 1
        if attempts < 4:
            raise fault

    retry_transient(attempt, HERE, threading.Event())
    assert attempts == 4


def test_an_outage_ends_with_a_clear_line() -> None:
    def attempt() -> None:
        raise OSError(errno.EIO, "Input/output error")

    started = time.monotonic()
    with pytest.raises(StorageError, match=r"picture\.png: Input/output error, still after .*check the disk"):
        retry_transient(attempt, HERE, threading.Event(), outage_s=0.1)
    assert 0.1 <= time.monotonic() - started < 2


def test_stopping_ends_the_wait() -> None:
    stop = threading.Event()

    def attempt() -> None:
        stop.set()
        raise OSError(errno.ETIMEDOUT, "timed out")

    with pytest.raises(StorageError):
        retry_transient(attempt, HERE, stop)


def test_other_errors_are_not_retried() -> None:
    attempts = 0

    def attempt() -> None:
        nonlocal attempts
        attempts += 1
        raise DecodeError("truncated")

    with pytest.raises(DecodeError):
        retry_transient(attempt, HERE, threading.Event())
    assert attempts == 1


def refuse(budget: FailureBudget, number: int, reason: str = "truncated") -> None:
    budget.refuse(Refusal.of(Path(f"{number}.png"), DecodeError(reason)))


def test_a_refused_file_is_recorded_once() -> None:
    budget = FailureBudget(100)
    for _ in range(3):
        refuse(budget, 7)
        budget.accept()
    (refusal,) = budget.refusals
    assert (refusal.path, refusal.reason) == ("7.png", "truncated")


def test_more_than_a_thousandth_stops_the_run_and_says_why() -> None:
    budget = FailureBudget(100_000)
    for _ in range(10_000):
        budget.accept()
    for number in range(10):
        refuse(budget, number, "truncated" if number % 3 else "missing")
    with pytest.raises(DataFailureError) as caught:
        refuse(budget, 10)
    message = str(caught.value)
    assert "11 of 10011 images were refused, 10 are put up with" in message
    assert "truncated 7, missing 4" in message
    assert "0.png, 1.png, 2.png, 3.png, 4.png" in message and "5.png" not in message


def test_a_thousandth_is_put_up_with() -> None:
    budget = FailureBudget(100_000)
    for number in range(60):
        for _ in range(1000):
            budget.accept()
        refuse(budget, number)
    assert len(budget.refusals) == 60


def test_fifty_in_a_row_stop_the_run() -> None:
    budget = FailureBudget(100_000)
    for number in range(49):
        refuse(budget, number)
    budget.accept()
    for number in range(49):
        refuse(budget, number)
    with pytest.raises(DataFailureError, match="50 images in a row"):
        refuse(budget, 49)


def test_a_file_that_is_refused_in_every_epoch_is_one_file() -> None:
    budget = FailureBudget(2400)
    for _ in range(20):
        for number in range(2):
            for _ in range(1199):
                budget.accept()
            refuse(budget, number)
    with pytest.raises(DataFailureError, match="3 of 2400 images were refused, 2 are put up with") as caught:
        refuse(budget, 2)
    assert str(caught.value).endswith("mend or remove them, or raise data.max_refused_fraction")


def test_nothing_is_judged_before_a_thousand_files_were_seen_and_then_one_in_a_thousand_is_allowed() -> None:
    budget = FailureBudget(100_000)
    for number in range(10):
        refuse(budget, number)
    for _ in range(980):
        budget.accept()
    for number in range(9):
        refuse(budget, number)
    with pytest.raises(DataFailureError, match="10 of 1000 images were refused, 1 are put up with"):
        refuse(budget, 9)


@given(st.integers(1, 10_000), st.integers(0, 12))
def test_the_share_that_is_allowed_is_exact(thousands: int, extra: int) -> None:
    budget = FailureBudget(10**9, max_in_a_row=10**9)
    budget._num_tried = 1000 * thousands - 1
    budget._reasons = {str(number): "truncated" for number in range(thousands - 1 + extra)}
    if extra:
        with pytest.raises(DataFailureError):
            refuse(budget, 10**9)
    else:
        refuse(budget, 10**9)


def test_a_file_that_comes_back_no_longer_counts() -> None:
    budget = FailureBudget(3000)
    for _ in range(3000):
        budget.accept()
    for number in range(20):
        refuse(budget, number, "missing")
        budget.accept(f"{number}.png")
    assert budget.refusals == ()
    for number in range(3):
        refuse(budget, number)
    with pytest.raises(DataFailureError, match="4 of 3000"):
        refuse(budget, 3)
