"""Loader processes: the same batches as threads, and what becomes of processes that die, hang or are left alone."""

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch

from Configuration_System import DataSection
from dataset_loader import DataLoader, LoadOptions, Position
from tagger.batch import Batch
from tagger.data import patience, ring
from tagger.data.ring import LoaderProcessError, LoaderTraceback
from tagger.errors import DataFailureError, StorageError
from tests.faulty_images import FaultyImages
from tests.tiny_dataset import assert_same, epoch_of, loaders, path_of, rows_of

ROOT = Path(__file__).resolve().parents[2]


Open = Callable[..., tuple[DataLoader, DataLoader]]


@pytest.fixture
def open_loaders(root: Path) -> Iterator[Open]:
    """(training, validation) loaders that end with the test, and with them every process."""
    opened: list[DataLoader] = []

    def open_one(**overrides: object) -> tuple[DataLoader, DataLoader]:
        train, validation, _ = loaders(root, **overrides)
        opened.extend((train, validation))
        return train, validation

    yield open_one
    for loader in opened:
        loader.close()
    assert not [child for child in psutil.Process().children() if "loader_process" in " ".join(child.cmdline())]


def break_files(loader: DataLoader, rows: list[int]) -> None:
    for place, row in enumerate(rows):
        path = path_of(loader, row)
        path.write_bytes(path.read_bytes()[: 50 * (place % 2)])


def use(loader: DataLoader, row: int, fault: str, marker: Path | None = None) -> None:
    images = loader._source.images
    facts = {field.name: getattr(images, field.name) for field in dataclasses.fields(images)}
    faulty = FaultyImages(**facts, row=row, fault=fault, marker=marker)
    loader._source = dataclasses.replace(loader._source, images=faulty)


def is_gone(process_id: int) -> bool:
    try:
        return psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def test_processes_give_the_same_bytes_as_threads_through_all_that_a_run_does(open_loaders: Open) -> None:
    """One start of the processes serves all of it: epochs, a resume, loops left early, broken files, kept batches."""
    threads, _ = open_loaders()
    loader, _ = open_loaders(data__num_processes=1, data__num_threads=4)
    whole = epoch_of(threads, 2)
    assert_same(epoch_of(loader, 2), whole)
    assert loader.mirrored == threads.mirrored and loader.vetoed == threads.vetoed
    assert loader.wait_seconds > 0
    process_ids = loader._ring.process_ids
    for _ in loader:
        break
    loader.seek(whole[1][1])
    resumed = iter(loader)
    assert_same([next(resumed), next(resumed)], whole[2:4])
    beside = list(loader)  # while a pass is open
    assert_same(beside, whole)
    del resumed
    break_files(threads, rows_of(epoch_of(threads, 1))[3:11])
    kept = epoch_of(loader, 1)
    copies = [batch.images.clone() for batch, _ in kept]
    assert_same(kept, epoch_of(threads, 1))
    assert loader.refusals == threads.refusals and loader.refused == 8
    assert_same(epoch_of(loader, 1), epoch_of(threads, 1))
    assert loader.ledger.known_bad() == threads.ledger.known_bad() and loader.ledger.num_quarantined
    epoch_of(loader, 3)
    assert all(torch.equal(batch.images, copy) for (batch, _), copy in zip(kept, copies, strict=True))
    assert loader._ring.process_ids == process_ids
    loader.close()
    wait_until(lambda: all(map(is_gone, process_ids)))
    assert all(torch.equal(batch.images, copy) for (batch, _), copy in zip(kept, copies, strict=True))


def test_fewer_processes_than_asked_for_are_said_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert LoadOptions.from_config(DataSection(num_processes=2, num_threads=2), 16).num_processes == 2
    assert "loader processes: 2 (as configured), 2 threads" in caplog.text
    assert LoadOptions.from_config(DataSection(num_processes=2, num_threads=1), 16).num_processes == 1
    assert "loader processes: 1 (as configured 2; more than threads or batches would stand idle)" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "num_threads", "in_flight"), [(1, 1, 4), (1, 4, 1), (2, 2, 4), (2, 4, 2)])
def test_the_same_seed_and_epoch_give_the_same_bytes(
    open_loaders: Open, num_processes: int, num_threads: int, in_flight: int
) -> None:
    reference, reference_validation = open_loaders(data__num_threads=1, validation__batch_size=4)
    loader, validation = open_loaders(
        data__num_processes=num_processes,
        data__num_threads=num_threads,
        data__prefetch_batches=in_flight,
        validation__batch_size=4,
    )
    break_files(reference, rows_of(epoch_of(reference, 1))[5:9])
    break_files(reference_validation, rows_of(epoch_of(reference_validation))[:5])  # a whole batch, and one image
    for epoch in (1, 4):
        expected = epoch_of(reference, epoch)
        assert_same(epoch_of(loader, epoch), expected)
        loader.seek(expected[2][1])
        assert_same(list(loader), expected[3:])
    assert_same(epoch_of(validation), epoch_of(reference_validation))
    assert validation.refusals == reference_validation.refusals and validation.refused == 5


# Processes that die and hang


@pytest.mark.slow
def test_a_killed_process_is_replaced_and_no_sample_is_lost_or_repeated(
    open_loaders: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    threads, _ = open_loaders()
    expected = epoch_of(threads, 1)
    loader, _ = open_loaders(data__num_processes=2)
    victim = rows_of(expected)[13]
    use(loader, victim, "die", tmp_path / "died")
    assert_same(epoch_of(loader, 1), expected)
    assert "was ended by signal 9" in caplog.text and "starting it again (1 of 3 in 60 minutes)" in caplog.text
    assert str(path_of(loader, victim)) in caplog.text
    # While nothing is asked of it, and in the middle of a pass.
    os.kill(loader._ring.process_ids[0], signal.SIGKILL)
    wait_until(lambda: "(2 of 3 in" in caplog.text)
    assert_same(epoch_of(loader, 1), expected)
    found = []
    for batch, position in loader:
        found.append((batch, position))
        if len(found) == 2:
            os.kill(loader._ring.process_ids[1], signal.SIGKILL)
    assert_same(found, expected)
    # A fourth is too many within the hour, and not after it.
    monkeypatch.setattr(patience, "RESTART_WINDOW_S", 0.0)
    os.kill(loader._ring.process_ids[0], signal.SIGKILL)
    wait_until(lambda: "(1 of 3 in 0 minutes, 4 since the start)" in caplog.text)
    assert_same(epoch_of(loader, 1), expected)
    assert loader.refused == 0


@pytest.mark.slow
def test_a_process_that_keeps_dying_stops_the_run_with_the_image_in_hand(open_loaders: Open) -> None:
    loader, _ = open_loaders(data__num_processes=2, data__num_threads=2)
    row = rows_of(epoch_of(open_loaders()[0], 0))[20]
    use(loader, row, "die")
    with pytest.raises(LoaderProcessError, match=r"signal 9.*3 were started again.*num_processes=0") as caught:
        epoch_of(loader)
    assert str(path_of(loader, row)) in str(caught.value)
    with pytest.raises(LoaderProcessError):
        epoch_of(loader)


@pytest.mark.slow
def test_a_hung_process_is_noticed_with_its_stack_and_replaced(
    open_loaders: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert ring.HANG_S < 60
    monkeypatch.setattr(ring, "HANG_S", 2.0)
    threads, _ = open_loaders()
    expected = epoch_of(threads)
    # One batch ahead, so that not all is prepared when the process is stopped.
    loader, _ = open_loaders(data__num_processes=1, data__prefetch_batches=1)
    use(loader, rows_of(expected)[17], "hang", tmp_path / "hung")
    assert_same(epoch_of(loader), expected)
    assert "hung: no image begun for 2 s" in caplog.text
    assert "faulty_images.py" in caplog.text and "in _act" in caplog.text
    caplog.clear()
    wait_until(lambda: not loader._ring._state.seats[0].ending)
    stopped = loader._ring.process_ids[0]
    found = []
    for batch, position in loader:
        found.append((batch, position))
        if len(found) == 2:
            os.kill(stopped, signal.SIGSTOP)
    assert_same(found, expected)
    assert "hung" in caplog.text
    wait_until(lambda: is_gone(stopped))


@pytest.mark.slow
def test_errors_arrive_as_themselves_with_the_traceback(open_loaders: Open) -> None:
    expected = epoch_of(open_loaders()[0])
    row = rows_of(expected)[30]
    for fault, kind, words in (("storage", StorageError, "the disk is gone"), ("odd", RuntimeError, "salt and pepper")):
        loader, _ = open_loaders(data__num_processes=2)
        use(loader, row, fault)
        found: list[tuple[Batch, Position]] = []
        with pytest.raises(kind, match=words) as caught:
            found.extend(loader)
        assert_same(found, expected[:3])
        assert_same(list(islice(loader, 2)), expected[:2])
        assert isinstance(caught.value.__cause__, LoaderTraceback)
        assert "in load_into" in str(caught.value.__cause__)


@pytest.mark.slow
def test_the_failure_budget_stops_a_run_with_processes(root: Path, open_loaders: Open) -> None:
    loader, _ = open_loaders(data__num_processes=1)
    for path in root.rglob("*.*"):
        if path.suffix != ".json":
            path.write_bytes(b"not a picture")
    with pytest.raises(DataFailureError, match="50 images in a row were refused: not an image"):
        epoch_of(loader)


@pytest.mark.slow
def test_a_row_held_out_is_not_served_by_a_process_either(open_loaders: Open) -> None:
    loader, validation = open_loaders(data__num_processes=1)
    object.__setattr__(loader._source.sampler, "rows", validation._source.sampler.rows)
    with pytest.raises(AssertionError, match="held out"):
        next(iter(loader))


@pytest.mark.slow
def test_what_processes_say_reaches_the_log_and_they_import_no_model(
    open_loaders: Open, caplog: pytest.LogCaptureFixture
) -> None:
    loader, _ = open_loaders(data__num_processes=1)
    use(loader, rows_of(epoch_of(open_loaders()[0]))[0], "talk")
    caplog.set_level(logging.INFO)
    epoch_of(loader)
    said = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert ("tagger.data.quarantine", "WARNING", "a disk tries again") in said
    assert not [line for line in said if "not for the log" in line[2]]
    loader.close()
    (modules,) = [record.getMessage() for record in caplog.records if "modules:" in record.getMessage()]
    imported = set(modules.split())
    assert {"torch", "tagger.data.batch_job"} <= imported
    heavy = {"train_direct", "model_architecture", "training_utils", "Monitor_log", "tensorboard", "wandb", "rich"}
    assert not imported & heavy


# Being left


USING = """
import os, signal, sys, threading, time
import numpy as np
from dataset_loader import DataLoader, LoadOptions, SidecarJsonDataset
from tagger.preprocess import Preprocess
from vocabulary import TagVocabulary

dataset = SidecarJsonDataset([sys.argv[1]], TagVocabulary(["circle"], [1], ["general"]), index_dir=sys.argv[2])
options = LoadOptions(Preprocess(image_size=32), num_threads=4, num_processes=2)
loader = DataLoader(dataset, np.arange(len(dataset)), 2, options, seed=1)
batches = iter(loader)
next(batches)
print(*loader._ring.process_ids, flush=True)
how = sys.argv[3]
if how == "exit":
    sys.exit(0)
if how == "sleep":
    time.sleep(1000)
threading.Timer(0.3, lambda: os.killpg(0, signal.SIGINT)).start()
try:
    while True:
        for _ in loader:
            time.sleep(0.01)
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exit", "ctrl-c", "sleep"])
def test_no_process_and_no_memory_is_left_however_the_run_ends(root: Path, tmp_path: Path, how: str) -> None:
    shared_files = Path("/dev/shm")
    before = set(shared_files.iterdir()) if shared_files.is_dir() else set()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "dev", "-c", USING, str(root), str(tmp_path / "index"), how]
    run = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stdout is not None
    process_ids = [int(word) for word in run.stdout.readline().split()]
    assert len(process_ids) == 2
    assert how == "exit" or not any(map(is_gone, process_ids))
    if how == "sleep":
        run.kill()
    stdout, stderr = run.communicate(timeout=60)
    assert (stdout.strip(), stderr) == ("stopped" if how == "ctrl-c" else "", "")
    assert run.returncode == (-signal.SIGKILL if how == "sleep" else 0)
    wait_until(lambda: all(map(is_gone, process_ids)))
    assert not (set(shared_files.iterdir()) if shared_files.is_dir() else set()) - before


@pytest.mark.slow
def test_a_loader_that_is_forgotten_ends_its_processes(root: Path) -> None:
    loader, _, _ = loaders(root, data__num_processes=1)
    next(iter(loader))
    process_ids = loader._ring.process_ids
    del loader
    wait_until(lambda: all(map(is_gone, process_ids)))
