"""Files and storage that change under a running loader: what is broken is left out, and nothing else is lost."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataset_loader import DataLoader, Position
from tagger.batch import Batch
from tagger.data import batch_job, image_reader
from tagger.data.decode import describe_decoder
from tagger.data.quarantine import Clock, FailureBudget, FileFacts, read_with_facts
from tagger.data.quarantine_log import Quarantine
from tagger.errors import StorageError
from tests.tiny_dataset import assert_same, draw, epoch_of, loaders, path_of, rows_of, write_dataset

ROOT = Path(__file__).resolve().parents[2]


class SimulatedClock(Clock):
    """Time that passes only while somebody waits or reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = 0.0

    def now(self) -> float:
        with self._lock:
            return self._now

    def advance(self, seconds: float) -> float:
        with self._lock:
            self._now += seconds
            return self._now

    def wait(self, stop: threading.Event, seconds: float) -> bool:
        self.advance(seconds)
        return stop.is_set()


def with_clock(loader: DataLoader, clock: Clock) -> DataLoader:
    loader._source = replace(loader._source, clock=clock)
    return loader


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "set")
    return tmp_path / "set"


def with_log(loader: DataLoader, log: Path, **options: Any) -> DataLoader:
    """The same loader with a quarantine on disk and a budget that a small set does not exceed."""
    source = loader._source
    return DataLoader(
        loader.dataset,
        source.sampler.rows,
        8,
        loader.options,
        seed=source.sampler.seed,
        mirroring=source.mirroring,
        split=loader.split,
        quarantine=Quarantine(log, describe_decoder(loader.options.decoding)),
        budget=FailureBudget(60, min_seen=10**9, max_in_a_row=10**9),
        **options,
    )


def test_a_tenth_of_reads_failing_for_a_while_loses_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, _, _ = loaders(root)
    expected = [epoch_of(train, epoch) for epoch in range(4)]
    clock, rng, lock, failures = SimulatedClock(), np.random.default_rng(1), threading.Lock(), 0

    def flaky(*args: Any) -> tuple[bytes, FileFacts]:
        nonlocal failures
        now = clock.advance(0.05)
        with lock:
            fails = now < 5.0 and rng.random() < 0.1
            failures += fails
        if fails:
            raise OSError(errno.EIO, "Input/output error")
        return read_with_facts(*args)

    monkeypatch.setattr(image_reader, "read_with_facts", flaky)
    log = tmp_path / "quarantine.jsonl"
    disturbed = with_clock(with_log(train, log), clock)
    for epoch, batches in enumerate(expected):
        assert_same(epoch_of(disturbed, epoch), batches)
    assert failures >= 5 and clock.now() > 5.0  # the fault came, and went
    assert disturbed.refused == 0 and not log.exists()


def test_an_outage_of_five_minutes_stops_the_run_and_blames_no_file(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, _, _ = loaders(root)
    clock = SimulatedClock()

    def dead(*_: Any) -> tuple[bytes, FileFacts]:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(image_reader, "read_with_facts", dead)
    log = tmp_path / "quarantine.jsonl"
    disturbed = with_clock(with_log(train, log), clock)
    with pytest.raises(StorageError, match=r"Input/output error, still after 30\d s; check the disk"):
        epoch_of(disturbed)
    assert disturbed.refused == 0 and not log.exists()


Change = Callable[[Path], None]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:90])


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def images_by_row(batches: list[tuple[Batch, Position]]) -> dict[int, torch.Tensor]:
    return {row: batch.images[i] for batch, _ in batches for i, row in enumerate(batch.row_ids.tolist())}


@pytest.mark.parametrize(
    ("change", "recorded"), [(Path.unlink, False), (truncate, True), (to_folder, False)], ids=["gone", "cut", "folder"]
)
def test_a_file_that_breaks_during_a_run_is_the_only_one_lost(
    root: Path, tmp_path: Path, change: Change, recorded: bool
) -> None:
    train = with_log(loaders(root, orientation__mirror_probability=0)[0], tmp_path / "quarantine.jsonl")
    whole = epoch_of(train, 0)
    victim = rows_of(whole)[-1]
    batches, iterator = [], iter(train)
    batches.append(next(iterator))
    change(path_of(train, victim))
    batches += list(iterator)  # batches in flight may have read the file before
    for epoch in (1, 2):
        train.set_epoch(epoch)
        batches += list(train)
    assert train.refused == 1
    found = images_by_row(batches)
    for row, image in images_by_row(whole).items():
        if row != victim:
            assert torch.equal(found[row], image)
    assert set(rows_of(batches)) >= set(train._source.sampler.rows.tolist()) - {victim}
    assert train.ledger.num_quarantined == recorded
    assert all(len(batch) == 8 for batch, _ in batches)


@pytest.mark.parametrize("known", [False, True])
def test_a_batch_is_the_same_whether_a_file_is_known_bad_or_found_so(root: Path, tmp_path: Path, known: bool) -> None:
    train, _, _ = loaders(root)
    for row in train._source.sampler.rows[:10].tolist():
        truncate(path_of(train, row))
    fresh = with_log(train, tmp_path / "fresh.jsonl")
    expected = epoch_of(fresh, 5)
    other = with_log(train, tmp_path / "known.jsonl")
    if known:
        for _ in range(3):
            epoch_of(other, 5)
        assert other.ledger.num_quarantined >= 5
        other = with_log(train, tmp_path / "known.jsonl")  # as after a resume
    assert_same(epoch_of(other, 5), expected)
    assert [r.reason for r in other.refusals] == [r.reason for r in fresh.refusals]


def test_a_known_bad_file_is_not_read_again_until_it_changes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "quarantine.jsonl"
    train = with_log(loaders(root, orientation__mirror_probability=0)[0], log)
    row = rows_of(epoch_of(train, 0))[0]
    good = path_of(train, row).read_bytes()
    truncate(path_of(train, row))
    for _ in range(2):
        epoch_of(train, 0)
    assert train.ledger.num_quarantined == 1
    decoded: list[int] = []
    real = batch_job.decode

    def counting(content: bytes, *args: Any) -> Any:
        decoded.append(len(content))
        return real(content, *args)

    monkeypatch.setattr(batch_job, "decode", counting)
    assert row not in rows_of(epoch_of(train, 0))
    assert 90 not in decoded
    path_of(train, row).write_bytes(good)
    assert rows_of(epoch_of(train, 0))[0] == row
    assert train.ledger.num_quarantined == 0
    assert json.loads(log.read_bytes().splitlines()[-1])["cleared"] is True


def test_a_file_that_comes_back_is_used_again(root: Path, tmp_path: Path) -> None:
    train = with_log(loaders(root)[0], tmp_path / "quarantine.jsonl")
    row = rows_of(epoch_of(train, 0))[0]
    path = path_of(train, row)
    path.rename(path.with_suffix(".away"))
    for _ in range(3):
        assert row not in rows_of(epoch_of(train, 0))
    assert [refusal.reason for refusal in train.refusals] == ["missing"] and train.refused == 1
    path.with_suffix(".away").rename(path)
    assert rows_of(epoch_of(train, 0))[0] == row
    assert train.refusals == () and train.refused == 0


def test_a_file_replaced_by_another_image_is_used_as_it_is_now(root: Path, tmp_path: Path) -> None:
    train = with_log(loaders(root, orientation__mirror_probability=0)[0], tmp_path / "quarantine.jsonl")
    row = rows_of(epoch_of(train, 0))[0]
    before = images_by_row(epoch_of(train, 0))
    other = tmp_path / "other.png"
    draw(1000).save(other)
    other.replace(path_of(train, row))
    after = images_by_row(epoch_of(train, 0))
    assert not torch.equal(after[row], before[row]) and after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before if key != row)
    assert train.refused == 0


def test_partial_images_are_used_and_counted_where_they_are_allowed(root: Path) -> None:
    train, _, _ = loaders(root, data__partial_images=True)
    row = next(r for r in rows_of(epoch_of(train, 0)) if path_of(train, r).suffix == ".jpg")
    draw(7).resize((300, 300)).save(path_of(train, row))
    content = path_of(train, row).read_bytes()
    path_of(train, row).write_bytes(content[: len(content) * 9 // 10])
    assert row in rows_of(epoch_of(train, 0))
    assert train.ledger.partial == (str(path_of(train, row)),) and train.refused == 0
    strict, _, _ = loaders(root)
    assert row not in rows_of(epoch_of(strict, 0))
    assert strict.ledger.partial == () and strict.refused == 1


NOBODY = 65534
WITHOUT_RIGHTS = """
import os, sys
from pathlib import Path
NOBODY = 65534
from tests.tiny_dataset import epoch_of, loaders, path_of, rows_of
root = Path(sys.argv[1])
train, _, _ = loaders(root)
planned = rows_of(epoch_of(train, 0))
if os.getuid() == 0:  # after everything is imported: the interpreter's own files may be root's alone
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
locked, inside = planned[0], planned[3]
iterator = iter(train)
path_of(train, locked).chmod(0)
path_of(train, inside).chmod(0)
try:
    path_of(train, locked).read_bytes()
except PermissionError:
    pass
else:
    sys.exit("this process may read what it may not")
served = rows_of(list(iterator)) + rows_of(epoch_of(train, 0))
again = rows_of(epoch_of(train, 0))
assert not {locked, inside} & set(again), again
assert set(planned) - {locked, inside} <= set(served)
reasons = sorted(refusal.reason for refusal in train.refusals)
for row in (locked, inside):
    path_of(train, row).chmod(0o644)
assert rows_of(epoch_of(train, 0)) == planned
print(*reasons, train.ledger.num_quarantined)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="file modes do not lock files on Windows")
def test_files_without_read_rights_are_left_out_until_they_have_them() -> None:
    # Below /tmp itself: pytest's own folders are closed to other users.
    folder = Path(tempfile.mkdtemp(prefix="tagsmith-chmod-"))
    try:
        write_dataset(folder / "set")
        if os.getuid() == 0:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(folder)}
        command = [sys.executable, "-c", WITHOUT_RIGHTS, str(folder / "set")]
        run = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
        assert (run.returncode, run.stdout.strip()) == (0, "permission denied permission denied 0"), run.stderr
    finally:
        shutil.rmtree(folder)
