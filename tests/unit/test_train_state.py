"""Resuming is bitwise exact, and what a run saves is never lost, mixed up or changed behind its back."""

import copy
import dataclasses
import random
import threading
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from Configuration_System import OptimizerSection
from tagger.errors import InputError
from training_utils import (
    CheckpointError,
    CheckpointManager,
    CheckpointWriteError,
    EarlyStopping,
    ExponentialMovingAverage,
    MixedPrecisionTrainer,
    TrainState,
    create_optimizer,
    load_weights,
    seed_everything,
)

CPU = torch.device("cpu")
NAN = float("nan")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.tanh(self.fc(self.norm(x))))


class Toy(nn.Module):
    """A stem with running statistics, blocks with dropout, a position embedding and a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.bn = nn.BatchNorm1d(width)
        self.pos_embed = nn.Parameter(torch.zeros(1, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def section(name: typing.Literal["adamw", "adafactor", "muon"] = "adamw", **changes: typing.Any) -> OptimizerSection:
    return OptimizerSection(name=name, **changes)


def new_state(
    name: typing.Literal["adamw", "adafactor", "muon"] = "adamw", ema: bool = True, seed: int = 0
) -> TrainState:
    seed_everything(seed)
    model = Toy()
    return TrainState(
        model,
        create_optimizer(section(name), model),
        MixedPrecisionTrainer("off", CPU),
        ema=ExponentialMovingAverage(model, 0.9) if ema else None,
        early_stopping=EarlyStopping(5, metric="val/mAP"),
    )


def train(state: TrainState, steps: int) -> list[float]:
    """`steps` updates on data that depends on the position, as a loader gives it, and noise that does not."""
    losses = []
    for _ in range(steps):
        position = 0 if state.position is None else typing.cast(int, state.position["batch"])
        images = torch.randn(16, 4, generator=torch.Generator().manual_seed(position)) + 0.1 * torch.randn(16, 4)
        loss = (state.model(images) - images[:, :3]).square().sum(dim=1).mean() * (1 + 0.1 * random.random())
        loss = loss * float(np.random.uniform(0.9, 1.1))
        state.optimizer.zero_grad()
        state.precision.backward(loss)
        state.precision.step(state.optimizer, list(state.model.parameters()), 1.0)
        if state.ema is not None:
            state.ema.update()
        state.step += 1
        state.samples_seen += 16
        state.seconds += 0.1
        state.position = {"batch": position + 1}
        losses.append(float(loss.detach()))
    return losses


def assert_same(a: TrainState, b: TrainState) -> None:
    tensors, values = a.snapshot_parts()
    others, other_values = b.snapshot_parts()
    assert values == other_values
    assert tensors.keys() == others.keys()
    for part in tensors:
        assert tensors[part].keys() == others[part].keys()
        for name, tensor in tensors[part].items():
            assert torch.equal(tensor, others[part][name]), f"{part} {name}"


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("stop", [0, 1, 3, 6])
def test_resume_continues_bitwise(
    tmp_path: Path, name: typing.Literal["adamw", "adafactor", "muon"], stop: int
) -> None:
    straight = new_state(name)
    expected = train(straight, 7)

    first = new_state(name)
    losses = train(first, stop)
    with CheckpointManager(tmp_path, 3, "val/mAP") as manager:
        first.extra["note"] = [1, "two", None, 0.1]
        manager.save(first)
        train(first, 1)  # what happens while it is being written is not in it
    resumed = new_state(name, seed=99)
    with CheckpointManager(tmp_path, 3, "val/mAP") as manager:
        loaded = manager.load("latest")
    assert loaded is not None and loaded.step == stop
    resumed.restore(loaded)
    assert resumed.extra == {"note": [1, "two", None, 0.1]}
    losses += train(resumed, 7 - stop)
    assert losses == expected
    straight.extra = dict(resumed.extra)
    assert_same(straight, resumed)


def test_restoring_is_the_inverse_of_saving(tmp_path: Path) -> None:
    state = new_state("muon")
    train(state, 3)
    assert state.early_stopping is not None
    state.early_stopping.update(0.5)
    state.early_stopping.update(0.4)
    state.epoch = 2
    with CheckpointManager(tmp_path, 1, "val/mAP") as manager:
        manager.save(state, wait=True)
        loaded = manager.load()
    assert loaded is not None
    other = new_state("muon", seed=5)
    train(other, 2)
    other.restore(loaded)
    assert_same(state, other)
    assert (other.step, other.epoch, other.samples_seen, other.position) == (3, 2, 48, {"batch": 3})


def test_a_compiled_model_saves_and_loads_plain_names(tmp_path: Path) -> None:
    plain = new_state(ema=False)
    wrapped = nn.Module()
    wrapped.add_module("_orig_mod", plain.model)
    compiled = TrainState(wrapped, plain.optimizer, plain.precision)
    with CheckpointManager(tmp_path, 1, "val/mAP") as manager:
        manager.save(compiled, wait=True)
        loaded = manager.load()
    assert loaded is not None
    Toy().load_state_dict(dict(loaded.tensors["model"]))
    compiled.restore(loaded)
    plain.restore(loaded)


def saved_checkpoint(folder: Path, state: TrainState):  # type: ignore[no-untyped-def]
    with CheckpointManager(folder, 1, "val/mAP") as manager:
        manager.save(state, wait=True)
        loaded = manager.load()
    assert loaded is not None
    return loaded


def test_another_model_is_refused_by_the_names_that_differ(tmp_path: Path) -> None:
    loaded = saved_checkpoint(tmp_path, new_state(ema=False))
    wider = Toy(10)
    state = TrainState(wider, create_optimizer(section(), wider), MixedPrecisionTrainer("off", CPU))
    with pytest.raises(InputError, match=r"stem\.weight is float32 \[8, 4\] in the file and float32 \[10, 4\] here"):
        state.restore(loaded)
    deeper = Toy()
    deeper.blocks.append(Block(8))
    state = TrainState(deeper, create_optimizer(section(), deeper), MixedPrecisionTrainer("off", CPU))
    with pytest.raises(InputError, match=r"blocks\.2\.norm\.weight is missing"):
        state.restore(loaded)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    loaded = saved_checkpoint(tmp_path, new_state("adamw", ema=False))
    with pytest.raises(InputError, match="of the optimizer AdamW, this run has MuonAdamW"):
        new_state("muon", ema=False).restore(loaded)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", 4),
        ("epoch", "2"),
        ("epoch", -1),
        ("position", [1]),
        ("position", {"batch": "x"}),
        ("samples_seen", True),
        ("seconds", None),
        ("extra", None),
        ("optimizer", 5),
        ("optimizer", {"kind": "AdamW", "groups": [{}]}),
        ("precision", []),
        ("random", None),
        ("random", {"numpy": "abc", "python": [3, None]}),
        ("early_stopping", {"metric": "val/mAP"}),
        ("ema_updates", "many"),
    ],
)
def test_values_that_no_run_writes_are_refused_by_one_line(tmp_path: Path, key: str, value: object) -> None:
    loaded = saved_checkpoint(tmp_path, new_state())
    forged = dataclasses.replace(loaded, state={**loaded.state, key: value})
    with pytest.raises(InputError, match="checkpoint"):
        new_state().restore(forged)


def test_ema_that_comes_or_goes_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    without, with_ema = new_state(ema=False), new_state(ema=True)
    train(without, 2)
    with_ema.restore(saved_checkpoint(tmp_path / "a", without))
    assert "holds no EMA" in caplog.text and with_ema.ema is not None
    assert torch.equal(with_ema.ema.state_dict()["head.weight"], without.model.state_dict()["head.weight"])
    without.restore(saved_checkpoint(tmp_path / "b", with_ema))
    assert "EMA is off now" in caplog.text


# The manager


def scores(value: float) -> dict[str, float]:
    return {"val/mAP": value, "val/loss": 1.0}


def test_best_follows_the_metric_and_outlives_retention(tmp_path: Path) -> None:
    state = new_state()
    with CheckpointManager(tmp_path, 2, "val/mAP") as manager:
        for value in (0.3, 0.8, NAN, 0.5, None, 0.7):
            train(state, 1)
            manager.save(state, None if value is None else scores(value), wait=True)
        assert manager.best is not None and (manager.best.step, manager.best.value) == (2, 0.8)
        best, latest = manager.load("best"), manager.load("latest")
    assert best is not None and best.step == 2 and latest is not None and latest.step == 6
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{s:09d}" for s in (2, 5, 6)]


def test_best_goes_on_after_a_restart(tmp_path: Path) -> None:
    state = new_state()
    for value in (0.8, 0.5, 0.9):
        with CheckpointManager(tmp_path, 1, "val/mAP") as manager:
            train(state, 1)
            manager.save(state, scores(value))
    with CheckpointManager(tmp_path, 1, "val/mAP") as manager:
        assert manager.best is not None and manager.best.step == 3


def test_load_sees_every_save_so_far(tmp_path: Path) -> None:
    state = new_state()
    with CheckpointManager(tmp_path, 1, "val/mAP") as manager:
        assert manager.load() is None
        for _ in range(5):
            train(state, 1)
            manager.save(state)
        loaded = manager.load()
    assert loaded is not None and loaded.step == 5


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_failed_save_is_told_once_and_the_next_one_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tagger.checkpoint import writer

    state = new_state()
    manager = CheckpointManager(tmp_path, 2, "val/mAP")
    manager.save(state, scores(0.2), wait=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_tensors", full)
        train(state, 1)
        with pytest.raises(CheckpointWriteError, match="No space left"):
            manager.save(state, scores(0.9), wait=True)
        train(state, 1)
        manager.save(state)  # says nothing: nothing waits for it
        manager.load()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    failures = manager.poll()
    assert [(failure.step, failure.on_disk) for failure in failures] == [(1, False), (2, False)]
    assert all(isinstance(failure.error, OSError) and failure.error.errno == 28 for failure in failures)
    assert "step 1 was not saved: [Errno 28] No space left" in str(failures[0])
    assert manager.poll() == [] and manager.num_failures == 2 and manager.saved_step == 0
    train(state, 1)
    manager.save(state, scores(0.5), wait=True)  # better than what is on disk, if not than what was lost
    assert manager.best is not None and manager.best.value == 0.5 and manager.saved_step == 3


def test_a_save_that_the_disk_refused_is_made_once_it_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tagger.checkpoint import saver, writer

    monkeypatch.setattr(writer, "RETRY_EVERY_S", 0.01)
    monkeypatch.setattr(writer, "PATIENCE_S", 10.0)
    state, writes, looks = new_state(), [], threading.Semaphore(0)

    def no_room(*_: object) -> None:
        looks.release()
        full()

    def full_once(*words: object) -> None:
        writes.append(words)
        full()

    with CheckpointManager(tmp_path, 2, "val/mAP") as manager:
        with monkeypatch.context() as patch:
            patch.setattr(writer, "write_tensors", full_once)
            patch.setattr(saver, "require_room", no_room)
            train(state, 1)
            manager.save(state, scores(0.9))
            for _ in range(4):
                assert looks.acquire(timeout=10)
            assert len(writes) == 1  # a full disk is not filled again and again
        weights = copy.deepcopy(state.model.state_dict())
        train(state, 3)  # what is saved is the state of then
        manager.flush()
        assert [failure.step for failure in manager.poll()] == [1] and manager.num_failures == 1
        loaded = manager.load("best")
    assert loaded is not None and loaded.step == 1 and "step 1 is saved now" in caplog.text
    torch.testing.assert_close(dict(loaded.tensors["model"]), dict(weights), rtol=0, atol=0)


def test_a_second_try_that_fails_in_another_way_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tagger.checkpoint import writer

    monkeypatch.setattr(writer, "RETRY_EVERY_S", 0.01)
    monkeypatch.setattr(writer, "PATIENCE_S", 10.0)
    errors = iter([OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])

    def fail(*_: object) -> None:
        raise next(errors)

    state = new_state()
    manager = CheckpointManager(tmp_path, 2, "val/mAP")
    monkeypatch.setattr(writer, "write_tensors", fail)
    with pytest.raises(CheckpointWriteError, match="Permission denied"):
        manager.save(state, wait=True)
    assert [type(failure.error) for failure in manager.poll()] == [OSError, PermissionError]
    with pytest.raises(CheckpointWriteError, match="Permission denied"):
        manager.close()


def test_a_failed_last_save_is_raised_by_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tagger.checkpoint import store

    manager = CheckpointManager(tmp_path, 2, "val/mAP")
    monkeypatch.setattr(store, "write_checkpoint", full)
    manager.save(new_state())
    with pytest.raises(CheckpointWriteError, match="No space left"):
        manager.close()


def test_a_failed_last_save_does_not_hide_what_ended_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tagger.checkpoint import store

    monkeypatch.setattr(store, "write_checkpoint", full)
    with pytest.raises(KeyError, match="the reason"), CheckpointManager(tmp_path, 2, "val/mAP") as manager:
        manager.save(new_state())
        raise KeyError("the reason")
    assert f"checkpoint {tmp_path / 'step-000000000'} could not be written: [Errno 28]" in caplog.text


def test_records_that_fail_are_told_but_the_state_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tagger.checkpoint import store

    state = new_state()
    with CheckpointManager(tmp_path, 1, "val/mAP") as manager:
        manager.save(state, scores(0.3), wait=True)
        train(state, 1)
        with monkeypatch.context() as patch:
            patch.setattr(store, "write_json", full)
            manager.save(state, scores(0.7), wait=True)
        assert [(failure.step, failure.on_disk) for failure in manager.poll()] == [(1, True)]
        assert manager.saved_step == 1 and manager.best is not None and manager.best.step == 1
        # best.json still names step 0, which is therefore still there
        assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000000000", "step-000000001"]
        train(state, 1)
        manager.save(state, scores(0.5), wait=True)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000000001", "step-000000002"]
    with CheckpointManager(tmp_path, 1, "val/mAP") as manager:
        assert manager.best is not None and manager.best.step == 1


def test_saving_is_due_by_steps_history_and_minutes(tmp_path: Path) -> None:
    state = new_state()
    rules = {"every_steps": 10, "keep_every": 25, "every_minutes": 0.5}
    with CheckpointManager(tmp_path, 1, "val/mAP", **rules) as manager:  # type: ignore[arg-type]
        assert [step for step in range(60) if manager.due(step, 0.0)] == [10, 20, 25, 30, 40, 50]
        assert not manager.due(3, 29.9) and manager.due(3, 30.0) and not manager.due(0, 30.0)
        state.step, state.seconds = 3, 31.0
        manager.save(state)
        assert not manager.due(4, 60.9) and manager.due(4, 61.0)
        assert not manager.due(4, -1e9)
    with CheckpointManager(tmp_path, 1, "val/mAP", **rules) as manager:  # type: ignore[arg-type]
        assert manager.due(4, 40.0)  # nothing loaded: a run of its own
        manager.load()
        assert not manager.due(4, 60.9) and manager.due(4, 61.0)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("ema", [True, False])
def test_stand_ins_have_the_forms_of_the_state_after_a_step(
    name: typing.Literal["adamw", "adafactor", "muon"], ema: bool
) -> None:
    state = new_state(name, ema)

    def forms(parts: dict) -> dict:
        return {
            (part, key): (tensor.shape, tensor.dtype)
            for part, tensors in parts.items()
            for key, tensor in tensors.items()
            if part != "rng" and (part != "optimizer" or tensor.ndim > 0)
        }

    expected = forms(state.stand_ins())
    train(state, 1)
    assert forms(state.snapshot_parts()[0]) == expected


def test_the_first_save_is_made_in_reserved_memory(tmp_path: Path) -> None:
    state = new_state()
    with CheckpointManager(tmp_path, 1, "val/mAP") as manager:
        manager.reserve(state)
        buffers = [b for form, buffers in manager._pool._free.items() if len(form[0]) > 1 for b in buffers]
        train(state, 1)
        manager.save(state, wait=True)
        again = [b for form, buffers in manager._pool._free.items() if len(form[0]) > 1 for b in buffers]
    assert {b.data_ptr() for b in again} == {b.data_ptr() for b in buffers}


def test_a_position_that_changes_after_saving_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    state = new_state()
    state.position = {"batch": 1}
    with CheckpointManager(tmp_path, 2, "val/mAP") as manager:
        manager.save(state)
        state.position["batch"] = 2
        loaded = manager.load()
    assert loaded is not None and loaded.state["position"] == {"batch": 1}


def test_weights_load_alone_averaged_where_kept(tmp_path: Path) -> None:
    state = new_state()
    train(state, 2)
    assert state.ema is not None
    with CheckpointManager(tmp_path, 1, "val/mAP", vocabulary_sha256="a" * 64) as manager:
        manager.save(state)
    path = next(tmp_path.glob("step-*"))
    averaged, online = load_weights(path), load_weights(path, prefer_ema=False)
    assert averaged.kind == "EMA" and online.kind == "online" and averaged.vocabulary_sha256 == "a" * 64
    assert torch.equal(averaged.tensors["head.weight"], state.ema.state_dict()["head.weight"])
    assert torch.equal(online.tensors["head.weight"], state.model.state_dict()["head.weight"])
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        load_weights(tmp_path / "model.pt")
