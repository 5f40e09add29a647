"""How a run ends when something goes wrong, and that going on from there is as if nothing had happened."""

import errno
from pathlib import Path

import orjson
import pytest
import torch

import start_up
import train_direct
from tagger.checkpoint.writer import CheckpointWriteError
from tagger.data import image_reader
from tagger.data.quarantine import FileFacts
from tagger.errors import DataFailureError, StorageError
from tagger.optim import MuonAdamW
from tests.integration.test_train_direct import arguments, final_state, images, losses_of, results_of, run

__all__ = ["images"]  # the fixture

FAULT_STEP = 7


@pytest.fixture(scope="module")
def straight(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(images, tmp_path_factory.mktemp("straight"), "run")


def newest_step(folder: Path) -> int:
    return max(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def assert_goes_on_as(straight: Path, images: Path, folder: Path) -> None:
    run(images, folder.parent, folder.name, "--resume", "latest")
    ours, theirs = final_state(folder), final_state(straight)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert losses_of(folder) == losses_of(straight)


FAULTS = [
    (torch.OutOfMemoryError("CUDA out of memory"), 5),
    (MemoryError(), 5),
    (DataFailureError("60 images in a row were refused"), 3),
    (StorageError("img.png: Input/output error, still after 300 s"), 6),
    (OSError(errno.ENOSPC, "No space left on device"), 6),
    (ZeroDivisionError("division by zero"), 1),
]


@pytest.mark.parametrize(("fault", "code"), FAULTS, ids=[type(fault).__name__ for fault, _ in FAULTS])
def test_a_fault_in_the_forward_pass_loses_nothing(
    straight: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Exception,
    code: int,
) -> None:
    real = start_up.build

    def build(*words: object) -> start_up.Parts:
        parts = real(*words)  # type: ignore[arg-type]
        inner = parts.criterion.forward

        def failing(*tensors: torch.Tensor) -> torch.Tensor:
            # Dropout has drawn and the batch norms have moved by now: both must be taken back.
            if parts.state.step == FAULT_STEP and parts.model.training:
                raise fault
            return inner(*tensors)  # type: ignore[no-any-return]

        parts.criterion.forward = failing  # type: ignore[method-assign]
        return parts

    with monkeypatch.context() as patch:
        patch.setattr(train_direct, "build", build)
        assert train_direct.main(arguments(images, tmp_path, "run", "checkpoint.every_steps=1000")) == code
    results = results_of(tmp_path / "run")
    assert (results["status"], results["exit_code"], results["steps"]) == ("failed", code, FAULT_STEP)
    assert newest_step(tmp_path / "run") == FAULT_STEP
    assert_goes_on_as(straight, images, tmp_path / "run")


def test_a_fault_in_the_middle_of_an_update_falls_back_on_the_newest_checkpoint(
    straight: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls = MuonAdamW.step, 0

    def failing(self: MuonAdamW, closure: None = None) -> float | None:
        nonlocal calls
        calls += 1
        if calls == FAULT_STEP + 1:
            self.muon.step()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, closure)

    with monkeypatch.context() as patch:
        patch.setattr(MuonAdamW, "step", failing)
        assert train_direct.main(arguments(images, tmp_path, "run", "checkpoint.every_steps=3")) == 5
    assert newest_step(tmp_path / "run") == 6
    assert_goes_on_as(straight, images, tmp_path / "run")


def test_bad_updates_are_left_out_and_too_many_end_the_run_with_their_images(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = start_up.build

    def spoiled_from(first: int, last: int) -> None:
        def build(*words: object) -> start_up.Parts:
            parts = real(*words)  # type: ignore[arg-type]
            inner = parts.criterion.forward

            def spoiled(*tensors: torch.Tensor) -> torch.Tensor:
                bad = first <= parts.state.step <= last and parts.model.training
                return inner(*tensors) * (float("nan") if bad else 1.0)  # type: ignore[no-any-return]

            parts.criterion.forward = spoiled  # type: ignore[method-assign]
            return parts

        monkeypatch.setattr(train_direct, "build", build)

    spoiled_from(2, 4)
    assert train_direct.main(arguments(images, tmp_path, "mended")) == 0
    lines = [orjson.loads(line) for line in (tmp_path / "mended" / "metrics.jsonl").read_bytes().splitlines()]
    assert max(line.get("train/skipped_updates", 0) for line in lines) == 3

    spoiled_from(5, 100)
    assert train_direct.main(arguments(images, tmp_path, "spoiled")) == 4
    results = results_of(tmp_path / "spoiled")
    assert (results["status"], results["exit_code"]) == ("diverged", 4)
    told = orjson.loads((tmp_path / "spoiled" / "diverged.json").read_bytes())
    assert len(told["row_ids"]) == len(told["images"]) == 8 and all(Path(image).is_file() for image in told["images"])
    assert all(torch.isfinite(t).all() for t in final_state(tmp_path / "spoiled").values() if t.is_floating_point())


def test_a_stop_file_stops_with_a_checkpoint_and_is_consumed(
    straight: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = train_direct.train_step

    def with_stop_file(parts: start_up.Parts, window: train_direct.Window) -> tuple[torch.Tensor, ...]:
        if parts.state.step == FAULT_STEP - 1:
            parts.folder.stop_path.touch()
            parts.stop._looked_at = 0.0
        return real(parts, window)

    with monkeypatch.context() as patch:
        patch.setattr(train_direct, "train_step", with_stop_file)
        run(images, tmp_path, "run")
    results = results_of(tmp_path / "run")
    assert (results["status"], results["exit_code"], results["steps"]) == ("stopped", 0, FAULT_STEP)
    assert not (tmp_path / "run" / "STOP").exists()
    (tmp_path / "run" / "STOP").touch()  # from before the next start: no reason to stop it
    assert_goes_on_as(straight, images, tmp_path / "run")


def test_a_failed_last_save_is_a_failure(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise CheckpointWriteError("a checkpoint could not be written: No space left on device")

    monkeypatch.setattr(start_up.CheckpointManager, "close", full)
    assert train_direct.main(arguments(images, tmp_path, "run")) == 6
    assert results_of(tmp_path / "run")["exit_code"] == 6


def test_too_many_broken_images_end_with_their_own_code(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts = FileFacts(13, 0)
    monkeypatch.setattr(image_reader, "read_with_facts", lambda *_: (b"not a picture", facts))
    assert train_direct.main(arguments(images, tmp_path, "run")) == 3
    assert results_of(tmp_path / "run")["status"] == "failed"
