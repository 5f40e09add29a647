"""What is said of the disk at a run's start is what its checkpoints take."""

import logging
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tagger.checkpoint.format import encode_state
from tagger.checkpoint.retention import SavePolicy
from tagger.checkpoint.room import plan_room, require_room, tensor_bytes
from tagger.checkpoint.saver import CheckpointSaver
from tagger.checkpoint.store import CheckpointStore
from tagger.errors import is_storage_failure


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("keep_every", [None, 4])
def test_the_room_that_is_said_is_the_most_that_a_run_takes(
    tmp_path: Path, keep_every: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = SavePolicy(keep_last=2, keep_every=keep_every)
    state = {"model": {"w": torch.rand(300_000)}, "optimizer": {"w": torch.rand(600_000)}}
    room = plan_room(tmp_path, policy, tensor_bytes(state), 0, 11)
    store = CheckpointStore(tmp_path, policy, "val/mAP")
    most = 0
    prune = CheckpointStore._prune

    def measured(self: CheckpointStore) -> None:
        nonlocal most
        most = max(most, bytes_in(tmp_path))  # the new one is there, the old ones not gone
        prune(self)

    monkeypatch.setattr(CheckpointStore, "_prune", measured)
    for step in range(1, 12):
        store.commit(step, state, encode_state({}), 1.0 if step == 1 else 0.0)
    assert most == pytest.approx(room.needed_bytes, rel=0.01)
    assert bytes_in(tmp_path / "step-000000011") == pytest.approx(room.checkpoint_bytes, rel=0.01)
    again = plan_room(tmp_path, policy, tensor_bytes(state), 11, 11)
    assert again.needed_bytes == room.checkpoint_bytes  # all the others are there


def test_a_folder_that_is_not_there_yet_is_on_the_disk_of_the_one_around_it(tmp_path: Path) -> None:
    room = plan_room(tmp_path / "runs" / "x" / "checkpoints", SavePolicy(), 1, 0, 10)
    assert room.free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, abs=1 << 30) and room.fits
    assert plan_room(Path("runs") / "none", SavePolicy(), 1, 0, 10).fits


@pytest.mark.parametrize(("free", "level"), [(50, logging.INFO), (49, logging.WARNING)])
def test_too_little_room_is_a_warning_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, free: int, level: int
) -> None:
    size = 2_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, free * size // 10))
    store = CheckpointStore(tmp_path, SavePolicy(keep_last=2, keep_every=10), "val/mAP")
    with CheckpointSaver(store) as saver, caplog.at_level(logging.INFO):
        saver.report_room({"model": {"w": torch.zeros(size // 4)}}, 0, 19)
    (record,) = caplog.records
    assert record.levelno == level
    expected = (
        "about 2.0 MB each: 8.0 MB for checkpoint.keep_last=2, the best and the one being written, and 2.0 MB for"
    )
    assert expected in record.message and f"10.0 MB still to come, {free / 5:.1f} MB free" in record.message
    assert ("make room" in record.message) == (level == logging.WARNING)


def test_a_disk_without_room_is_told_without_writing(tmp_path: Path) -> None:
    require_room(tmp_path / "checkpoints", 1)
    with pytest.raises(OSError, match=r"No space left on device: .* free of the 1000000\.0 TB needed") as caught:
        require_room(tmp_path, 10**18)
    assert is_storage_failure(caught.value)
    assert [*tmp_path.iterdir()] == []
