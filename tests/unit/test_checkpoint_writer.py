"""Durable order on disk, a writer that never holds up training, and snapshots that nobody changes."""

import contextlib
import errno
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tagger.checkpoint import writer as checkpoint_writer
from tagger.checkpoint.format import CheckpointError, encode_state, list_checkpoints, verify_checkpoint
from tagger.checkpoint.snapshot import SnapshotPool, capture_random_state, restore_random_state
from tagger.checkpoint.writer import (
    MAX_KEPT_WAITING,
    AsyncCheckpointWriter,
    CheckpointContent,
    CheckpointWriteError,
    write_checkpoint,
)
from tagger.errors import is_storage_failure

LAST, BEST = frozenset({"last"}), frozenset({"last", "best"})


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((64,), value)}, "rng": {"torch": torch.zeros(8, dtype=torch.uint8)}}


class Trace:
    """The system's calls in the order they were made, with paths relative to a folder."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        self.root = root
        fsync, rename = os.fsync, os.rename
        write_bytes, write_tensors = checkpoint_writer._write_bytes, checkpoint_writer._write_tensor_file

        def traced_fsync(handle: int) -> None:
            self.add("fsync", Path(f"/proc/self/fd/{handle}").readlink())
            fsync(handle)

        def traced_rename(source: Path, target: Path) -> None:
            self.add("rename", Path(source))
            rename(source, target)
            self.add("renamed", Path(target))

        def traced(inner: Callable[..., object]) -> Callable[..., object]:
            def call(path: Path, *rest: object) -> object:
                self.add("write", path)
                return inner(path, *rest)

            return call

        patch.setattr(os, "fsync", traced_fsync)
        patch.setattr(os, "rename", traced_rename)
        patch.setattr(checkpoint_writer, "_write_bytes", traced(write_bytes))
        patch.setattr(checkpoint_writer, "_write_tensor_file", traced(write_tensors))

    def add(self, kind: str, path: Path) -> None:
        name = str(path.relative_to(self.root))
        self.calls.append((kind, "TMP" + name[name.find("/") :] if name.startswith(".tmp") and "/" in name else name))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads file names from /proc")
def test_files_then_manifest_then_folder_are_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = Trace(tmp_path, monkeypatch)
    write_checkpoint(tmp_path, CheckpointContent(3, 1, tensors(1.0), encode_state({})))
    files = ["model.safetensors", "rng.safetensors", "state.json", "manifest.json"]
    expected = [call for name in files for call in (("write", f"TMP/{name}"), ("fsync", f"TMP/{name}"))]
    assert trace.calls[: len(expected)] == expected
    temporary, source, target, parent = trace.calls[len(expected) :]
    assert temporary[0] == "fsync" and temporary[1].startswith(".tmp-step-000000003")
    assert source == ("rename", temporary[1])
    assert target == ("renamed", "step-000000003")
    assert parent == ("fsync", ".")


def test_a_crash_at_any_call_leaves_a_whole_checkpoint_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power goes at each fsync and rename in turn; what stands afterwards under a checkpoint's name is whole."""

    class PowerCutError(BaseException):
        pass

    real = {"fsync": os.fsync, "rename": os.rename}
    # What a power cut leaves is not tidied up.
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    for cut in range(12):
        folder = tmp_path / str(cut)
        left = [cut]

        def counted(name: str, left: list[int] = left) -> Callable[..., object]:
            def call(*arguments: object) -> object:
                if left[0] == 0:
                    raise PowerCutError
                left[0] -= 1
                return real[name](*arguments)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", counted("fsync"))
            patch.setattr(os, "rename", counted("rename"))
            with contextlib.suppress(PowerCutError):
                write_checkpoint(folder, CheckpointContent(3, 1, tensors(1.0), encode_state({})))
        for path in list_checkpoints(folder):
            verify_checkpoint(path)
    assert list_checkpoints(tmp_path / "0") == [] and len(list_checkpoints(tmp_path / "11")) == 1


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_checkpoint(tmp_path, CheckpointContent(3, 1, tensors(1.0), encode_state({})))
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


# The background thread


class SlowDisk:
    """A `write` that waits for permission, item by item, and may fail."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self.dropped: list[int] = []
        self.released: list[int] = []
        self.waited_for: list[str] = []
        self.started = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)
        self.fail: set[int] = set()

    def write(self, item: int) -> None:
        self.started.release()
        assert self.gate.acquire(timeout=10)
        if item in self.fail:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.written.append(item)

    def release(self, item: int, dropped: bool) -> None:
        self.released.append(item)
        if dropped:
            self.dropped.append(item)


@pytest.fixture
def disk() -> SlowDisk:
    return SlowDisk()


@pytest.fixture
def writer(disk: SlowDisk) -> Iterator[AsyncCheckpointWriter[int]]:
    made = AsyncCheckpointWriter(disk.write, disk.release)
    yield made
    disk.gate.release(100)
    with contextlib.suppress(CheckpointWriteError):
        made.close()


def occupy(writer: AsyncCheckpointWriter[int], disk: SlowDisk) -> None:
    writer.submit(0, LAST)
    assert disk.started.acquire(timeout=10)


def test_saves_give_way_to_the_newest_while_the_disk_is_slow(
    writer: AsyncCheckpointWriter[int], disk: SlowDisk
) -> None:
    occupy(writer, disk)
    for item in range(1, 50):
        writer.submit(item, LAST)
    assert writer.lag_s() > 0
    disk.gate.release(100)
    writer.flush()
    assert disk.written == [0, 49] and disk.dropped == list(range(1, 49)) and writer.lag_s() == 0


def test_a_best_one_is_dropped_for_a_better_one_only(writer: AsyncCheckpointWriter[int], disk: SlowDisk) -> None:
    occupy(writer, disk)
    for item, purposes in ((1, LAST), (2, BEST), (3, LAST), (4, LAST)):
        writer.submit(item, purposes)
    assert disk.dropped == [1, 3]
    disk.gate.release(100)
    writer.flush()
    assert disk.written == [0, 2, 4]


def test_a_better_one_serves_every_purpose(writer: AsyncCheckpointWriter[int], disk: SlowDisk) -> None:
    occupy(writer, disk)
    for item, purposes in ((1, BEST), (2, LAST), (3, BEST)):
        writer.submit(item, purposes)
    disk.gate.release(100)
    writer.flush()
    assert disk.written == [0, 3] and disk.dropped == [1, 2]


def test_submitting_never_waits_for_the_disk(writer: AsyncCheckpointWriter[int], disk: SlowDisk) -> None:
    occupy(writer, disk)
    writer.submit(1, LAST)  # returns although item 0 is stuck
    assert disk.written == []


def test_items_to_be_kept_are_not_dropped(writer: AsyncCheckpointWriter[int], disk: SlowDisk) -> None:
    occupy(writer, disk)
    for item in range(1, 9):
        writer.submit(item, LAST, keep=item % 3 == 0)
    disk.gate.release(100)
    writer.flush()
    assert disk.written == [0, 3, 6, 8] and disk.dropped == [1, 2, 4, 5, 7]


def test_a_disk_that_hangs_holds_a_bounded_number_whatever_is_submitted(
    writer: AsyncCheckpointWriter[int], disk: SlowDisk
) -> None:
    occupy(writer, disk)
    generator = random.Random(0)
    most = 0
    for item in range(1, 500):
        writer.submit(item, generator.choice([LAST, BEST]), keep=generator.random() < 0.5)
        most = max(most, item - len(disk.dropped))
    assert most == MAX_KEPT_WAITING + 2  # and the one that is being written
    disk.gate.release(100)
    writer.flush()
    assert disk.written[-1] == 499
    writer.submit(500, LAST, keep=True)  # there is room again
    writer.flush()
    assert disk.written[-1] == 500
    assert sorted(disk.released) == list(range(501))


def test_room_is_made_before_the_newer_one_is_there(writer: AsyncCheckpointWriter[int], disk: SlowDisk) -> None:
    occupy(writer, disk)
    writer.submit(1, LAST)
    writer.supersede(LAST)
    assert disk.dropped == [1]


def test_an_error_of_the_newest_is_raised_until_a_newer_one_succeeds(
    writer: AsyncCheckpointWriter[int], disk: SlowDisk
) -> None:
    disk.fail = {1}
    disk.gate.release(100)
    writer.submit(1)
    for _ in range(2):
        with pytest.raises(CheckpointWriteError, match="No space left on device") as caught:
            writer.flush()
        assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC
    writer.submit(2)
    writer.flush()
    assert disk.written == [2]


def test_closing_writes_what_waits_and_raises_the_error_of_the_newest() -> None:
    disk = SlowDisk()
    disk.fail = {2}
    disk.gate.release(100)
    writer = AsyncCheckpointWriter(disk.write)
    writer.submit(1, BEST)
    writer.submit(2, LAST)
    for _ in range(2):
        with pytest.raises(CheckpointWriteError):
            writer.close()
    assert disk.written == [1]
    with pytest.raises(RuntimeError, match="closed"):
        writer.submit(3)


def test_closing_after_an_older_failure_is_no_error() -> None:
    disk = SlowDisk()
    disk.fail = {1}
    disk.gate.release(100)
    writer = AsyncCheckpointWriter(disk.write)
    writer.submit(1, BEST)
    writer.submit(2, LAST)
    writer.close()
    assert disk.written == [2]


@pytest.fixture
def retrying(disk: SlowDisk, monkeypatch: pytest.MonkeyPatch) -> Iterator[AsyncCheckpointWriter[int]]:
    """A writer that tries again what fails."""
    monkeypatch.setattr(checkpoint_writer, "RETRY_EVERY_S", 0.01)
    monkeypatch.setattr(checkpoint_writer, "PATIENCE_S", 10.0)
    made = AsyncCheckpointWriter(disk.write, disk.release, may_pass=is_storage_failure, on_wait=disk.waited_for.append)
    yield made
    monkeypatch.setattr(checkpoint_writer, "PATIENCE_S", 0.0)
    disk.gate.release(10_000)
    with contextlib.suppress(CheckpointWriteError):
        made.close()


@pytest.fixture
def holding(retrying: AsyncCheckpointWriter[int], disk: SlowDisk) -> AsyncCheckpointWriter[int]:
    """The same beside a disk that answers at once."""
    disk.gate.release(10_000)
    return retrying


def failed_often(disk: SlowDisk) -> None:
    """Wait for the fourth try from here."""
    for _ in range(4):
        assert disk.started.acquire(timeout=10)


def test_what_failed_is_written_once_the_disk_has_room(
    holding: AsyncCheckpointWriter[int], disk: SlowDisk, caplog: pytest.LogCaptureFixture
) -> None:
    disk.fail = {1}
    holding.submit(1)
    failed_often(disk)
    assert disk.written == [] and disk.released == [] and holding.lag_s() > 0
    disk.fail.clear()
    holding.flush()
    assert disk.written == [1] and disk.released == [1] and holding.lag_s() == 0
    assert [record.levelname for record in caplog.records].count("ERROR") <= 2  # the failure, and that flush waits


def test_what_failed_gives_way_to_whatever_is_newer(holding: AsyncCheckpointWriter[int], disk: SlowDisk) -> None:
    disk.fail = {1}
    holding.submit(1, BEST)
    failed_often(disk)
    holding.submit(2, LAST)
    holding.flush()
    disk.fail.clear()
    holding.flush()
    assert disk.written == [2] and sorted(disk.released) == [1, 2] and disk.dropped == []


def test_the_end_waits_for_the_disk(holding: AsyncCheckpointWriter[int], disk: SlowDisk) -> None:
    disk.fail = {1}
    holding.submit(1)
    failed_often(disk)
    closing = threading.Thread(target=holding.close)
    closing.start()
    failed_often(disk)
    assert closing.is_alive()
    disk.fail.clear()
    closing.join(10)
    assert not closing.is_alive() and disk.written == [1] and disk.released == [1]
    (message,) = disk.waited_for
    assert "is kept in memory and tried again every" in message


def test_the_end_waits_no_longer_than_its_patience(
    holding: AsyncCheckpointWriter[int], disk: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.fail = {1}
    holding.submit(1)
    monkeypatch.setattr(checkpoint_writer, "PATIENCE_S", 0.2)
    for _ in range(2):
        with pytest.raises(CheckpointWriteError, match="No space left on device"):
            holding.close()
    assert disk.written == [] and disk.released == [1] and len(disk.waited_for) == 1


def test_what_failed_while_a_newer_one_waits_is_not_tried_again(
    retrying: AsyncCheckpointWriter[int], disk: SlowDisk
) -> None:
    disk.fail = {1}
    retrying.submit(1)
    assert disk.started.acquire(timeout=10)
    retrying.submit(2)
    disk.gate.release(1)
    assert disk.started.acquire(timeout=10)  # of 2, so that 1 has failed
    disk.fail.clear()
    disk.gate.release(100)
    retrying.close()
    assert disk.written == [2] and disk.released == [1, 2]


def test_what_fails_while_a_newer_one_is_made_gives_way_to_it(
    retrying: AsyncCheckpointWriter[int], disk: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between `supersede`, which makes room, and `submit`."""
    monkeypatch.setattr(checkpoint_writer, "RETRY_EVERY_S", 0.3)
    disk.fail = {1}
    retrying.submit(1)
    assert disk.started.acquire(timeout=10)
    retrying.supersede(LAST)
    disk.gate.release(100)
    while retrying._failed is None:
        time.sleep(0.001)
    disk.fail.clear()
    retrying.submit(2)
    retrying.flush()
    time.sleep(0.4)  # past the next try
    retrying.close()
    assert disk.written == [2] and sorted(disk.released) == [1, 2]


def test_a_release_that_fails_ends_no_writer(disk: SlowDisk, caplog: pytest.LogCaptureFixture) -> None:
    def release(item: int, _: bool) -> None:
        if item == 1:
            raise RuntimeError("the device is gone")

    disk.gate.release(100)
    writer = AsyncCheckpointWriter(disk.write, release)
    writer.submit(1)
    writer.flush()  # it is on disk
    writer.submit(2)
    writer.close()
    assert disk.written == [1, 2] and "is lost: the device is gone" in caplog.text


def test_a_fault_of_the_program_is_not_tried_again(disk: SlowDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "RETRY_EVERY_S", 0.01)
    monkeypatch.setattr(checkpoint_writer, "PATIENCE_S", 1.0)
    tries: list[int] = []

    def write(item: int) -> None:
        tries.append(item)
        raise ValueError("no tensor")

    writer = AsyncCheckpointWriter(write, disk.release, may_pass=is_storage_failure)
    writer.submit(1)
    with pytest.raises(CheckpointWriteError, match="no tensor"):
        writer.close()
    assert tries == [1] and disk.released == [1]


# Snapshots


def test_a_snapshot_is_a_copy_and_its_memory_is_used_again() -> None:
    pool = SnapshotPool()
    live = {"model": {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}}
    first = pool.capture(live)
    live["model"]["w"].zero_()
    assert torch.equal(first.tensors["model"]["w"], torch.arange(6.0).reshape(2, 3))
    second = pool.capture(live)  # the first one is still being read
    assert second.tensors["model"]["w"].data_ptr() != first.tensors["model"]["w"].data_ptr()
    pool.release(first)
    live["model"]["w"].fill_(7.0)
    third = pool.capture(live)
    assert third.tensors["model"]["w"].data_ptr() == first.tensors["model"]["w"].data_ptr()
    assert torch.equal(third.tensors["model"]["w"], torch.full((2, 3), 7.0))
    assert third.num_bytes == 6 * 4 + 8


def test_reserved_memory_is_what_snapshots_are_made_in() -> None:
    pool = SnapshotPool()
    live = {"model": {"a": torch.rand(5), "b": torch.rand(5), "c": torch.rand(2, 2)}}
    pool.reserve(live, sets=2)
    reserved = {buffer.data_ptr() for buffers in pool._free.values() for buffer in buffers}
    assert len(reserved) == 6
    snapshots = [pool.capture(live) for _ in range(2)]
    used = {t.data_ptr() for snapshot in snapshots for t in snapshot.tensors["model"].values()}
    assert used == reserved
    assert pool.capture(live).tensors["model"]["a"].data_ptr() not in reserved


def test_a_pool_follows_changes_of_shape_type_and_names() -> None:
    pool = SnapshotPool()
    for tensor in (torch.zeros(3), torch.ones(4), torch.ones(4, dtype=torch.int32), torch.rand(2, 2).T):
        snapshot = pool.capture({"model": {"w": tensor}, "optimizer": {f"{tensor.dtype}": tensor}})
        assert torch.equal(snapshot.tensors["model"]["w"], tensor)
        assert set(snapshot.tensors["optimizer"]) == {f"{tensor.dtype}"}
        pool.release(snapshot)


def test_random_state_restores_every_generator() -> None:
    def draw() -> tuple[float, ...]:
        return (float(torch.randn(())), float(np.random.standard_normal()), random.random(), random.gauss(0, 1))

    device = torch.device("cpu")
    draw()
    state, numbers = capture_random_state(device)
    expected = [draw() for _ in range(3)]
    assert restore_random_state(state, numbers, device) == []
    assert [draw() for _ in range(3)] == expected


def test_random_state_that_does_not_fit_is_an_error() -> None:
    device = torch.device("cpu")
    state, numbers = capture_random_state(device)
    for bad in ({**state, "torch": state["torch"][:-1]}, {k: v for k, v in state.items() if k != "numpy"}):
        with pytest.raises(CheckpointError, match="random state cannot be restored"):
            restore_random_state(bad, numbers, device)
    assert restore_random_state({**state, "cuda": torch.zeros(16)}, numbers, device) == ["cuda"]
