"""Thirteen faults, each made where it would really arise, and the exit codes that the documentation promises."""

import errno
import itertools
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import torch

import start_up
import train_direct
from tagger.alerts import Alerts
from tagger.checkpoint import writer
from tagger.checkpoint.format import FileEntry, Tensors
from tagger.data import image_reader, prefetch, quarantine, thread_pass
from tagger.data.quarantine import FileFacts
from tagger.data.windows import Window
from tagger.optim import MuonAdamW
from tests.integration.test_train_direct import arguments, results_of

FAULT_STEP, LAST_STEP = 3, 5
Words = list[str]


def at_fault_step(patch: pytest.MonkeyPatch, fault: Callable[[start_up.Parts], object]) -> None:
    """Have `fault` called before the step after `FAULT_STEP` updates."""
    real = train_direct.train_step

    def train_step(parts: start_up.Parts, window: Window) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if parts.state.step == FAULT_STEP:
            fault(parts)
        return real(parts, window)

    patch.setattr(train_direct, "train_step", train_step)


def allocate(*_: object) -> None:
    """More memory than there is: the allocator's own error."""
    torch.empty(1 << 60, dtype=torch.uint8)


def bad_configuration(_patch: pytest.MonkeyPatch, _images: Path) -> Words:
    return ["training.batch_size=0"]


def missing_data(_patch: pytest.MonkeyPatch, images: Path) -> Words:
    shutil.rmtree(images)
    return []


def broken_images(patch: pytest.MonkeyPatch, images: Path) -> Words:
    del patch
    for path in images.rglob("*"):
        if path.suffix in (".jpg", ".png", ".webp"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    return []


def not_a_number(patch: pytest.MonkeyPatch, _images: Path) -> Words:
    def spoil(parts: start_up.Parts) -> None:
        with torch.no_grad():
            parts.parameters[0].fill_(torch.nan)

    at_fault_step(patch, spoil)
    return [f"checkpoint.every_steps={FAULT_STEP}"]


def no_memory_in_the_forward_pass(patch: pytest.MonkeyPatch, _images: Path) -> Words:
    at_fault_step(patch, lambda parts: parts.model.register_forward_hook(allocate))
    return []


def no_memory_in_the_update(patch: pytest.MonkeyPatch, _images: Path) -> Words:
    at_fault_step(patch, lambda _: patch.setattr(MuonAdamW, "step", allocate))
    return ["checkpoint.every_steps=2"]


def full_disk_at_the_last_save(patch: pytest.MonkeyPatch, _images: Path) -> Words:
    real = writer.write_tensors

    def write_tensors(stream: IO[bytes], tensors: Tensors) -> FileEntry:
        if f"step-{LAST_STEP:09}" in str(stream.name):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(stream, tensors)

    patch.setattr(writer, "write_tensors", write_tensors)
    patch.setattr(writer, "RETRY_EVERY_S", 0.05)
    patch.setattr(writer, "PATIENCE_S", 0.2)
    return ["checkpoint.every_steps=3"]


def storage_outage(patch: pytest.MonkeyPatch, _images: Path) -> Words:
    real, gone = image_reader.read_with_facts, threading.Event()

    def read(*words: object) -> tuple[bytes, FileFacts]:
        if gone.is_set():
            raise OSError(errno.EIO, "Input/output error")
        return real(*words)  # type: ignore[arg-type]

    patch.setattr(image_reader, "read_with_facts", read)
    # Storage is waited for without waiting.
    seconds = itertools.count(step=100.0)
    patch.setattr(quarantine.Clock, "now", lambda _: next(seconds))
    patch.setattr(quarantine.Clock, "wait", lambda _, stop, __: stop.is_set())
    at_fault_step(patch, lambda _: gone.set())
    return ["training.num_epochs=3"]


def hung_disk(patch: pytest.MonkeyPatch, _images: Path) -> Words:
    real, gone = image_reader.read_with_facts, threading.Event()

    def read(*words: object) -> tuple[bytes, FileFacts]:
        while gone.is_set() and image_reader.read_with_facts is read:  # until the test is over
            threading.Event().wait(0.02)
        return real(*words)  # type: ignore[arg-type]

    patch.setattr(image_reader, "read_with_facts", read)
    patch.setattr(thread_pass, "END_S", 0.5)
    for name, seconds in (("_WAKE_S", 0.01), ("_JOIN_S", 0.05)):
        patch.setattr(prefetch, name, seconds)
    at_fault_step(patch, lambda _: gone.set())
    return ["training.num_epochs=3"]


def terminated(patch: pytest.MonkeyPatch, _images: Path) -> Words:
    at_fault_step(patch, lambda _: signal.raise_signal(signal.SIGTERM))
    return []


def interrupted(patch: pytest.MonkeyPatch, _images: Path) -> Words:
    at_fault_step(patch, lambda _: signal.raise_signal(signal.SIGINT))
    return []


def stop_file(patch: pytest.MonkeyPatch, _images: Path) -> Words:
    patch.setattr("tagger.stop._LOOK_EVERY_S", 0.0)
    at_fault_step(patch, lambda parts: parts.folder.stop_path.touch())
    return []


def unknown_error(patch: pytest.MonkeyPatch, _images: Path) -> Words:
    at_fault_step(patch, lambda _: 1 // 0)
    return []


# The fault; exit code, status, words of the reason; the step of the newest checkpoint, None where there is no run.
FAULTS = [
    (bad_configuration, 2, None, "training.batch_size", None),
    (missing_data, 2, None, "is not a folder", None),
    (broken_images, 3, "failed", "in a row", 0),
    (not_a_number, 4, "diverged", "has diverged", FAULT_STEP),
    (no_memory_in_the_forward_pass, 5, "failed", "training.accumulation_steps", FAULT_STEP),
    (no_memory_in_the_update, 5, "failed", "training.accumulation_steps", 2),
    (full_disk_at_the_last_save, 6, "failed", "No space left on device", 3),
    (storage_outage, 6, "failed", "Input/output error", None),
    (hung_disk, 6, "failed", "no image was loaded", None),
    (terminated, 143, "stopped", "SIGTERM", FAULT_STEP + 1),
    (interrupted, 130, "stopped", "SIGINT", FAULT_STEP + 1),
    (stop_file, 0, "stopped", "STOP was there", FAULT_STEP + 1),
    (unknown_error, 1, "failed", "ZeroDivisionError", FAULT_STEP),
]


@pytest.mark.parametrize(("fault", "code", "status", "reason", "saved"), FAULTS, ids=[f[0].__name__ for f in FAULTS])
def test_a_fault_has_its_exit_code(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: Callable[[pytest.MonkeyPatch, Path], Words],
    code: int,
    status: str | None,
    reason: str,
    saved: int | None,
) -> None:
    own = tmp_path / "images"
    shutil.copytree(images, own)
    with pytest.MonkeyPatch.context() as patch:
        words = arguments(own, tmp_path / "runs", "run", "training.num_epochs=1", *fault(patch, own))
        assert train_direct.main(words) == code
    errors = capsys.readouterr().err
    folder = tmp_path / "runs" / "run"
    if status is None:
        assert not folder.exists()
        assert [reason in line for line in errors.splitlines() if line.startswith("error: ")] == [True]
        return
    results = results_of(folder)
    assert (results["status"], results["exit_code"]) == (status, code)
    assert reason in str(results["error"])
    newest = max(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))
    assert newest == (results["steps"] if saved is None else saved)
    if status in ("failed", "diverged"):
        assert f"the newest checkpoint is of step {newest}" in str(results["error"])


def test_divergence_before_any_checkpoint_says_that_there_is_none(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    not_a_number(monkeypatch, images)
    assert train_direct.main(arguments(images, tmp_path, "run", "checkpoint.every_steps=1000")) == 4
    assert "there is no checkpoint yet: start over with --resume auto" in str(results_of(tmp_path / "run")["error"])
    assert "from a checkpoint" not in caplog.text


def test_a_run_whose_end_waits_for_a_full_disk_says_so_and_goes_on_once_there_is_room(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = full_disk_at_the_last_save(monkeypatch, images)
    monkeypatch.setattr(writer, "PATIENCE_S", 60.0)
    full, sent = writer.write_tensors, []

    def write_tensors(stream: IO[bytes], tensors: Tensors) -> FileEntry:
        if "waiting for the disk" in sent:  # then somebody makes room
            monkeypatch.undo()
        return (writer.write_tensors if "waiting for the disk" in sent else full)(stream, tensors)

    monkeypatch.setattr(writer, "write_tensors", write_tensors)
    monkeypatch.setattr(Alerts, "send", lambda _, event, *__, **___: sent.append(event))
    assert train_direct.main(arguments(images, tmp_path, "run", "training.num_epochs=1", *words)) == 0
    assert "waiting for the disk" in sent
    assert results_of(tmp_path / "run")["status"] == "completed" and (tmp_path / "run" / "model").is_dir()
