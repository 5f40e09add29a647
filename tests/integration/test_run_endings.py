"""How a run ends when something goes wrong, and that going on from there is as if nothing had happened."""

import errno
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
import torch

import start_up
import train_direct
from tagger import stop
from tagger.alerts import Alerts
from tagger.checkpoint import store
from tagger.checkpoint.format import verify_checkpoint
from tagger.checkpoint.writer import CheckpointContent, CheckpointWriteError
from tagger.data import image_reader
from tagger.data.quarantine import FileFacts
from tagger.errors import DataFailureError, StorageError
from tagger.optim import MuonAdamW
from tagger.run_lock import FolderLock
from tests.integration.test_train_direct import arguments, final_state, losses_of, results_of, run
from tests.webhook import CERTIFICATE, Webhook

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


def test_endings_are_told_to_a_webhook_whose_address_is_nowhere(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    secret = "canary5d1f"
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    monkeypatch.setenv("TAGSMITH_ALERT_ALLOW_PRIVATE", "1")
    with Webhook() as hook, caplog.at_level(logging.DEBUG):
        monkeypatch.setenv("TAGSMITH_ALERT_URL", f"https://localhost:{hook.port}/{secret}")
        run(images, tmp_path, "good", "training.num_epochs=1")
        with monkeypatch.context() as patch:
            patch.setattr(image_reader, "read_with_facts", lambda *_: (b"not a picture", FileFacts(13, 0)))
            assert train_direct.main(arguments(images, tmp_path, "bad")) == 3
        assert train_direct.main(arguments(images, tmp_path, "none", "--init-from", str(tmp_path / "nowhere"))) == 2
    assert len(hook.received) == 3
    good, bad, none = hook.received
    assert (good["event"], good["run"], good["status"], good["exit_code"]) == ("ended", "good", "completed", 0)
    assert good["step"] == 5 and set(good["best"]) == {"metric", "value", "step"}  # type: ignore[call-overload]
    assert (bad["status"], bad["exit_code"]) == ("failed", 3) and "in a row" in str(bad["reason"])
    assert (none["event"], none["exit_code"]) == ("could not start", 2)
    # A webhook that is gone: one line in the log, the same exit code, and its address still nowhere.
    run(images, tmp_path, "unheard", "training.num_epochs=1")
    log = (tmp_path / "unheard" / "train.log").read_text(encoding="utf-8")
    assert log.count("an alert could not be sent: ConnectionRefusedError") == 1
    shown = capfd.readouterr()
    assert secret not in shown.out + shown.err + caplog.text
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20 and not [path for path in written if secret.encode() in path.read_bytes()]
    monkeypatch.setenv("TAGSMITH_ALERT_URL", f"http://localhost/{secret}")
    assert train_direct.main(arguments(images, tmp_path, "refused")) == 2
    assert not (tmp_path / "refused").exists()
    error = capfd.readouterr().err
    assert "must be an https" in error and secret not in error


def test_a_save_that_fails_is_told_while_the_run_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, object]] = []
    real, calls = start_up.CheckpointManager.poll, 0

    def failing_once(self: start_up.CheckpointManager) -> list[object]:
        nonlocal calls
        calls += 1
        return ["the checkpoint of step 2 was not saved: No space left on device"] if calls == 3 else [*real(self)]

    monkeypatch.setattr(start_up.CheckpointManager, "poll", failing_once)
    monkeypatch.setattr(Alerts, "send", lambda _, event, *__, **values: sent.append((event, values["reason"])))
    run(images, tmp_path, "run", "training.num_epochs=1")
    assert sent == [
        ("save failed", "the checkpoint of step 2 was not saved: No space left on device"),
        ("ended", None),
    ]


def test_a_validation_that_failed_is_made_up_for(
    straight: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train_direct.evaluate_all
    calls = 0

    def failing(*words: object, **more: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*words, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(train_direct, "evaluate_all", failing)
        assert train_direct.main(arguments(images, tmp_path, "run")) == 5
    assert_goes_on_as(straight, images, tmp_path / "run")
    scores = [
        [
            line["val/mAP"]
            for line in map(orjson.loads, (folder / "metrics.jsonl").read_bytes().splitlines())
            if "val/mAP" in line
        ]
        for folder in (straight, tmp_path / "run")
    ]
    assert scores[0] == scores[1] and len(scores[0]) == 3


def test_divergence_leaves_the_good_checkpoints(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path, "run", "training.num_epochs=2", "checkpoint.keep_last=2")
    before = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")}
    words = ("training.num_epochs=40", "optimizer.learning_rate=1e30", "--resume", "latest")
    assert train_direct.main(arguments(images, tmp_path, "run", "checkpoint.keep_last=2", *words)) == 4
    after = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")}
    assert after == before


def test_a_run_that_early_stopping_ended_stays_ended(images: Path, tmp_path: Path) -> None:
    words = ("training.num_epochs=6", "training.early_stopping_patience=1", "training.early_stopping_min_delta=1.0")
    run(images, tmp_path, "run", *words)
    steps = results_of(tmp_path / "run")["steps"]
    run(images, tmp_path, "run", *words, "--resume", "latest")
    assert results_of(tmp_path / "run")["steps"] == steps


def test_a_start_without_memory_has_its_code(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(train_direct, "build", build)
    assert train_direct.main(arguments(images, tmp_path, "run")) == 5
    assert not (tmp_path / "run").exists()


SIGNALS = [(number, 128 + number) for number in stop.SIGNALS]
MOMENTS = ["open_data_and_model", "create_optimizer", "compile_model", "the first batch", "the first update"]


def interrupt_at(moment: str, number: int, patch: pytest.MonkeyPatch) -> None:
    """Have this process get a signal in the middle of what `moment` names."""
    places = {"the first batch": (train_direct, "accumulation_windows"), "the first update": (train_direct, "apply")}
    module, name = places.get(moment, (start_up, moment))
    real = getattr(module, name)

    def interrupted(*words: object, **more: object) -> object:
        if name != "accumulation_windows":
            signal.raise_signal(number)
            return real(*words, **more)

        def windows() -> Iterator[object]:
            signal.raise_signal(number)
            yield from real(*words, **more)

        return windows()

    patch.setattr(module, name, interrupted)


@pytest.mark.parametrize(("number", "code"), SIGNALS, ids=str)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_before_the_first_update_ends_at_once_and_leaves_no_run(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moment: str,
    number: int,
    code: int,
) -> None:
    interrupt_at(moment, number, monkeypatch)
    assert train_direct.main(arguments(images, tmp_path, "run")) == code
    shown = capsys.readouterr()
    assert "before the first update: there is nothing to save" in shown.err.splitlines()[-1]
    assert shown.out == "" and "Traceback" not in shown.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["open_data_and_model", "the first batch", "the first update"])
def test_a_signal_before_the_first_update_of_a_resume_leaves_the_run_as_it_was(
    straight: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    real = train_direct.train_step

    def stopping(parts: start_up.Parts, window: train_direct.Window) -> tuple[torch.Tensor, ...]:
        if parts.state.step == FAULT_STEP - 1:
            signal.raise_signal(signal.SIGTERM)
        return real(parts, window)

    with monkeypatch.context() as patch:
        patch.setattr(train_direct, "train_step", stopping)
        assert train_direct.main(arguments(images, tmp_path, "run")) == 143
    checkpoints = set((tmp_path / "run" / "checkpoints").rglob("*"))
    with monkeypatch.context() as patch:
        interrupt_at(moment, signal.SIGINT, patch)
        assert train_direct.main(arguments(images, tmp_path, "run", "--resume", "latest")) == 130
    assert set((tmp_path / "run" / "checkpoints").rglob("*")) == checkpoints
    results = results_of(tmp_path / "run")
    assert (results["status"], results["steps"]) == ("stopped", FAULT_STEP)
    assert not (tmp_path / "run" / "run.lock").exists()
    assert_goes_on_as(straight, images, tmp_path / "run")


@pytest.mark.parametrize("part", ["ema", "optimizer"])
def test_a_state_that_is_not_finite_is_not_saved_after_a_fatal_error(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    real = train_direct.train_step

    def spoiled(parts: start_up.Parts, window: train_direct.Window) -> tuple[torch.Tensor, ...]:
        if parts.state.step == FAULT_STEP:
            tensors = parts.state.snapshot_parts()[0][part]
            floats = [t for t in tensors.values() if t.is_floating_point() and t.numel() > 1]
            floats[-1].view(-1)[0] = float("nan")
            raise MemoryError
        return real(parts, window)

    words = ("checkpoint.every_steps=4", "checkpoint.keep_last=1")
    with monkeypatch.context() as patch:
        patch.setattr(train_direct, "train_step", spoiled)
        assert train_direct.main(arguments(images, tmp_path, "run", *words)) == 5
    assert f"({part}) is not finite at step {FAULT_STEP}: not saved" in caplog.text
    # 4 and 5 (the first epoch's end and so far the best) were saved before; 5 is the newest and stays it.
    assert newest_step(tmp_path / "run") == 5
    assert verify_checkpoint(tmp_path / "run" / "checkpoints" / "step-000000005").step == 5
    run(images, tmp_path, "run", *words, "--resume", "latest")
    assert all(torch.isfinite(t).all() for t in final_state(tmp_path / "run").values() if t.is_floating_point())


def test_an_average_that_is_no_longer_a_number_ends_as_divergence(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train_direct.train_step

    def spoiled(parts: start_up.Parts, window: train_direct.Window) -> tuple[torch.Tensor, ...]:
        if parts.state.step == FAULT_STEP and parts.state.ema is not None:
            parts.state.ema.state_dict()["pos_embed"].fill_(float("nan"))
            parts.stop._file_seen = True  # so that no validation finds it first
        return real(parts, window)

    monkeypatch.setattr(train_direct, "train_step", spoiled)
    assert train_direct.main(arguments(images, tmp_path, "run")) == 4
    assert results_of(tmp_path / "run")["status"] == "diverged"
    assert newest_step(tmp_path / "run") == 5


def test_a_disk_that_hangs_holds_up_no_step_and_gives_up_history_out_loud(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write, real_step = store.write_checkpoint, train_direct.train_step
    mended, told = threading.Event(), list[str]()

    def hangs(folder: Path, content: CheckpointContent) -> Path:
        assert mended.wait(60)
        return real_write(folder, content)

    def step(parts: start_up.Parts, window: train_direct.Window) -> tuple[torch.Tensor, ...]:
        if parts.state.step == 14:
            mended.set()
        return real_step(parts, window)

    monkeypatch.setattr(store, "write_checkpoint", hangs)
    monkeypatch.setattr(train_direct, "train_step", step)
    monkeypatch.setattr(Alerts, "send", lambda _, event, *__, **values: told.append(f"{event}: {values['reason']}"))
    run(images, tmp_path, "run", "checkpoint.keep_every=2", "checkpoint.keep_last=1")
    saved = {int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").glob("step-*")}
    best = results_of(tmp_path / "run")["best"]["step"]  # type: ignore[index]
    # One being written, two kept, the best, the newest; 14 where the disk was mended in time.
    assert saved - {14} == {2, 4, 6, best, 15}
    assert [line.partition(" was not saved: ")[0] for line in told if line.startswith("save failed")][:3] == [
        f"save failed: the checkpoint of step {step}" for step in (8, 10, 12)
    ]


def test_a_stop_during_validation_saves_at_once_and_makes_up_for_it(
    straight: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train_direct.evaluate_all

    def interrupted(*words: object, **more: object) -> object:
        if not (tmp_path / "run" / "asked").exists():
            (tmp_path / "run" / "asked").touch()
            raise train_direct.EvaluationStopped
        return real(*words, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(train_direct, "evaluate_all", interrupted)
        assert train_direct.main(arguments(images, tmp_path, "run")) == 0
    assert results_of(tmp_path / "run")["steps"] == 5
    assert_goes_on_as(straight, images, tmp_path / "run")


@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
def test_a_run_whose_folder_is_lost_ends_and_writes_nothing_more_there(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, replaced: bool
) -> None:
    folder, real = tmp_path / "run", train_direct.train_step

    def losing(parts: start_up.Parts, window: train_direct.Window) -> tuple[torch.Tensor, ...]:
        if parts.state.step == FAULT_STEP:
            folder.rename(tmp_path / "moved")
            if replaced:
                folder.mkdir()
                FolderLock(folder / "run.lock")
        return real(parts, window)

    monkeypatch.setattr(train_direct, "train_step", losing)
    assert train_direct.main(arguments(images, tmp_path, "run", "checkpoint.every_steps=2")) == 6
    assert [path.name for path in folder.rglob("*")] == ["run.lock"] if replaced else not folder.exists()
    assert "the run's folder was deleted, replaced or taken over" in caplog.text
    assert "is held by process" in caplog.text if replaced else "run is gone" in caplog.text
