"""The newest good checkpoint is found, the best one is right, and nothing is deleted before its time."""

import errno
import json
import logging
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tagger.checkpoint import format as checkpoint_format
from tagger.checkpoint import store as checkpoint_store
from tagger.checkpoint import writer as checkpoint_writer
from tagger.checkpoint.format import (
    CheckpointError,
    NotFiniteError,
    encode_state,
    list_checkpoints,
    verify_checkpoint,
)
from tagger.checkpoint.retention import SavePolicy
from tagger.checkpoint.store import CheckpointStore, load_checkpoint, newest_first, read_best
from tagger.checkpoint.writer import remove_checkpoint
from tagger.files import FormatError, read_json


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((64,), value)}, "rng": {"torch": torch.zeros(8, dtype=torch.uint8)}}


def store(folder: Path, keep_last: int = 3, metric: str = "val/mAP") -> CheckpointStore:
    return CheckpointStore(folder, SavePolicy(keep_last), metric)


def commit(target: CheckpointStore, step: int, value: float | None = None) -> Path:
    return target.commit(step, tensors(float(step)), encode_state({"step": step}), value)


def weight(folder: Path, which: str = "latest") -> float:
    loaded = load_checkpoint(folder, which)
    assert loaded is not None
    return float(loaded.tensors["model"]["w"][0])


def test_stray_temporaries_go_at_the_start(tmp_path: Path) -> None:
    commit(store(tmp_path), 1)
    (tmp_path / ".tmp-step-000000002-abcd").mkdir()
    (tmp_path / ".tmp-step-000000002-abcd" / "model.safetensors").write_bytes(b"part")
    (tmp_path / ".tmp-file").write_bytes(b"")
    store(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.json", "step-000000001"]


def test_the_newest_is_the_one_written_last_not_the_highest_step(tmp_path: Path) -> None:
    target = store(tmp_path, keep_last=5)
    for step in (10, 20, 30):
        commit(target, step)
    again = store(tmp_path, keep_last=5)  # resumed from step 10, say
    commit(again, 15)
    assert weight(tmp_path) == 15.0
    assert read_json(tmp_path / "last.json", "", 1)["checkpoint"] == "step-000000015"


def test_a_second_save_of_a_step_stands_beside_the_first_until_it_is_whole(tmp_path: Path) -> None:
    target = store(tmp_path, keep_last=2)
    commit(target, 5)
    first = commit(target, 10)
    second = commit(target, 10)
    assert (first.name, second.name) == ("step-000000010", "step-000000010-2")
    assert not first.exists() and second.exists()
    assert (tmp_path / "step-000000005").exists()


def damage(path: Path, kind: str) -> None:
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    if kind == "truncated":
        data = data[:-5]
    elif kind == "flipped":
        data[random.Random(0).randrange(len(data))] ^= 4
    else:
        data[-64:] = bytes(64)
    file.write_bytes(data)


@pytest.mark.parametrize("kind", ["truncated", "flipped", "zeroed"])
@pytest.mark.parametrize("which", ["latest", "best"])
def test_a_broken_checkpoint_gives_way_to_the_newest_good_one_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, which: str
) -> None:
    target = store(tmp_path)
    for step in (1, 2, 3):
        commit(target, step, value=step / 10)
    damage(tmp_path / "step-000000003", kind)
    with caplog.at_level(logging.WARNING):
        assert weight(tmp_path, which) == 2.0
    assert "step-000000003 is broken: model.safetensors" in caplog.text or "the content of" in caplog.text
    assert "step-000000002, the newest good checkpoint" in caplog.text


def test_a_lost_newest_checkpoint_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = store(tmp_path)
    commit(target, 1)
    shutil.rmtree(commit(target, 2))
    with caplog.at_level(logging.WARNING):
        assert weight(tmp_path) == 1.0
    assert "step-000000002 is recorded as latest but cannot be used" in caplog.text


def test_a_good_checkpoint_loads_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = store(tmp_path)
    commit(target, 1, value=0.5)
    commit(target, 2, value=0.4)
    with caplog.at_level(logging.WARNING):
        assert weight(tmp_path) == 2.0 and weight(tmp_path, "best") == 1.0
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_nothing_usable_is_never_a_silent_fresh_start(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "absent", "latest") is None
    assert load_checkpoint(tmp_path, "latest") is None
    target = store(tmp_path)
    for step in (1, 2):
        damage(commit(target, step), "flipped")
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .*; bring one back .*--init-from") as caught:
        load_checkpoint(tmp_path, "latest")
    assert caught.value.exit_code == 6


def test_a_path_is_taken_at_its_word(tmp_path: Path) -> None:
    target = store(tmp_path)
    first, second = commit(target, 1), commit(target, 2)
    assert weight(tmp_path, str(first)) == weight(tmp_path, first.name) == 1.0
    damage(second, "flipped")
    with pytest.raises(CheckpointError, match="is broken"):
        load_checkpoint(tmp_path, str(second))
    with pytest.raises(CheckpointError, match=r"no checkpoint folder nowhere .*step-000000001.*use latest, best"):
        load_checkpoint(tmp_path, "nowhere")


def test_best_without_a_record_is_the_newest_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    commit(store(tmp_path), 1)
    assert weight(tmp_path, "best") == 1.0
    assert "no checkpoint in" in caplog.text and "marked best" in caplog.text


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    commit(CheckpointStore(tmp_path, SavePolicy(3), "val/mAP", vocabulary_sha256="a" * 64), 1)
    with pytest.raises(CheckpointError, match="another vocabulary"):
        CheckpointStore(tmp_path, SavePolicy(3), "val/mAP", vocabulary_sha256="b" * 64).load("latest")


def test_best_is_compared_with_the_same_metric_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = store(tmp_path, metric="val/mAP")
    commit(target, 1, value=0.9)
    other = store(tmp_path, metric="val/loss")
    assert other.best is None and "chosen by val/mAP, this run chooses by val/loss" in caplog.text
    commit(other, 2, value=30.0)
    commit(other, 3, value=40.0)
    record = read_best(tmp_path)
    assert record is not None and (record.metric, record.value, record.step) == ("val/loss", 30.0, 2)


def test_values_measured_with_another_yardstick_are_not_compared_and_the_old_best_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def measured_with(yardstick: str | None) -> CheckpointStore:
        return CheckpointStore(tmp_path, SavePolicy(keep_last=1), "val/mAP", yardstick=yardstick)

    commit(measured_with("old"), 1, value=0.9)
    caplog.clear()
    target = measured_with("new")
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "step-000000001, which stays" in record.message and "0.9000 on other held-out images" in record.message
    assert target.best is None and weight(tmp_path, "best") == 1.0  # there is no other yet
    for step, value in ((2, 0.3), (3, 0.5), (4, 0.4)):
        commit(target, step, value)
    assert target.best is not None and (target.best.step, target.best.value, target.best.yardstick) == (3, 0.5, "new")
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{step:09d}" for step in (1, 3, 4)]
    again = measured_with("new")
    commit(again, 5, 0.1)
    assert (tmp_path / "step-000000001").exists() and again.best == target.best and weight(tmp_path, "best") == 3.0
    back = measured_with("old")
    loaded = back.load("best")
    assert back.best is not None and back.best.value == 0.9 and loaded is not None and loaded.step == 1


def test_the_best_by_another_metric_stays(tmp_path: Path) -> None:
    commit(store(tmp_path, keep_last=1, metric="val/mAP"), 1, value=0.9)
    target = store(tmp_path, keep_last=1, metric="val/loss")
    for step in (2, 3, 4):
        commit(target, step, value=float(step))
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{step:09d}" for step in (1, 2, 4)]


def test_a_record_that_names_no_yardstick_is_not_believed(tmp_path: Path) -> None:
    commit(store(tmp_path), 1, value=0.9)
    record = tmp_path / "best.json"
    content = json.loads(record.read_bytes())
    del content["yardstick"]  # as programs before this one wrote it
    record.write_text(json.dumps(content))
    assert store(tmp_path).best is not None
    assert CheckpointStore(tmp_path, SavePolicy(), "val/mAP", yardstick="new").best is None


def test_a_loss_is_better_lower_and_a_score_higher(tmp_path: Path) -> None:
    for metric, expected in (("val/loss", 2), ("val/mAP", 3)):
        target = store(tmp_path / metric.replace("/", "-"), metric=metric)
        for step, value in ((1, 0.5), (2, 0.1), (3, 0.8)):
            commit(target, step, value=value)
        assert target.best is not None and target.best.step == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_no_part_of_the_state_that_is_not_finite_becomes_the_newest_or_the_best(
    tmp_path: Path, part: str, dtype: torch.dtype, bad: float
) -> None:
    target = store(tmp_path, keep_last=1)
    good = {name: {"w": torch.ones(8), "steps": torch.ones(2, dtype=dtype)} for name in ("model", "ema", "optimizer")}
    target.commit(1, good, encode_state({}), 0.5)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    broken = {**good, part: {"w": torch.ones(8), "steps": torch.tensor([1.0, bad], dtype=dtype)}}
    with pytest.raises(NotFiniteError, match=rf"steps \({part}\) is not finite at step 2: not saved"):
        target.commit(2, broken, encode_state({}), 0.9)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert target.newest_step == 1 and target.best is not None and target.best.step == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("metric", ["val/mAP", "val/loss"])
def test_a_value_that_is_not_finite_is_never_best(tmp_path: Path, value: float, metric: str) -> None:
    target = store(tmp_path, metric=metric)
    commit(target, 1, value=value)
    assert target.best is None and read_best(tmp_path) is None


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    target = store(tmp_path, keep_last=1)
    commit(target, 1)
    with pytest.raises(CheckpointError, match=r"w \(model\) is not finite at step 2"):
        target.commit(2, tensors(float("nan")), encode_state({}))
    assert weight(tmp_path) == 1.0


def test_a_checkpoint_that_reads_back_wrong_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = store(tmp_path, keep_last=1)
    commit(target, 1, value=0.5)
    real = checkpoint_format.write_tensors

    def lies(stream: object, values: dict) -> object:
        entry = real(stream, values)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(b"\x7f")
        return entry

    monkeypatch.setattr(checkpoint_writer, "write_tensors", lies)
    with pytest.raises(CheckpointError, match="is broken"):
        commit(target, 2, value=0.9)
    assert weight(tmp_path) == weight(tmp_path, "best") == 1.0


def test_a_better_checkpoint_that_a_crash_left_unrecorded_is_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = store(tmp_path)
    commit(target, 1, 0.5)

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_store, "write_json", dies)
        patch.setattr(CheckpointStore, "_prune", dies)
        with pytest.raises(KeyboardInterrupt):
            commit(target, 2, 0.9)
    record = read_best(tmp_path)
    assert record is not None and record.step == 1
    assert weight(tmp_path, "best") == 2.0
    again = store(tmp_path, keep_last=1)
    assert again.best is not None and again.best.step == 2
    commit(again, 3, 0.7)
    record = read_best(tmp_path)
    assert record is not None and record.step == 2 and weight(tmp_path, "best") == 2.0


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b'{"format_version": 1, "checkpoint": "step-000000002"}', None])
def test_a_lost_record_of_the_best_is_made_again_from_the_scores(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: bytes | None
) -> None:
    target = store(tmp_path)
    for step, value in ((1, 0.2), (2, 0.8), (3, 0.5)):
        commit(target, step, value)
    if damaged is None:
        (tmp_path / "best.json").unlink()
    else:
        (tmp_path / "best.json").write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        again = store(tmp_path, keep_last=1)
    assert again.best is not None and (again.best.step, again.best.value) == (2, 0.8)
    assert ("by its score step-000000002 is the best" in caplog.text) == (damaged is not None)
    commit(again, 4, 0.6)
    assert {path.name for path in list_checkpoints(tmp_path)} == {"step-000000002", "step-000000004"}
    record = read_best(tmp_path)
    assert record is not None and record.step == 2


def test_a_record_with_another_score_than_the_checkpoints_is_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit(store(tmp_path), 1, 0.5)
    data = (tmp_path / "best.json").read_bytes()
    (tmp_path / "best.json").write_bytes(data.replace(b"0.5", b"0.9"))
    assert store(tmp_path).best == read_best_of(tmp_path, data)
    assert "best.json says val/mAP 0.9" in caplog.text


def read_best_of(folder: Path, data: bytes) -> object:
    (folder / "best.json").write_bytes(data)
    return read_best(folder)


def test_a_record_of_a_newer_program_is_refused(tmp_path: Path) -> None:
    commit(store(tmp_path), 1, 0.5)
    (tmp_path / "best.json").write_bytes(b'{"format_version": 9}')
    with pytest.raises(FormatError, match="format_version 9, this program reads up to 1"):
        store(tmp_path)


def test_history_is_kept_beside_the_newest_and_the_best(tmp_path: Path) -> None:
    target = CheckpointStore(tmp_path, SavePolicy(keep_last=2, keep_every=10), "val/mAP")
    for step in range(1, 36):
        commit(target, step, 0.9 if step == 7 else 0.1)
    kept = [int(path.name.removeprefix("step-")) for path in list_checkpoints(tmp_path)]
    assert kept == [7, 10, 20, 30, 34, 35]


@given(
    steps=st.lists(st.integers(0, 30), max_size=30),
    keep_last=st.integers(1, 4),
    keep_every=st.none() | st.integers(1, 7),
    protected=st.sets(st.integers(0, 29)),
)
def test_what_may_go_is_neither_new_nor_history_nor_protected(
    steps: list[int], keep_last: int, keep_every: int | None, protected: set[int]
) -> None:
    """The rule in other words: by the newest checkpoint of each step alone."""
    policy = SavePolicy(keep_last, keep_every)
    named = [(str(number), step) for number, step in enumerate(steps)]
    stand: dict[int, str] = {}
    for name, step in named:
        stand.setdefault(step, name)
    kept = set(list(stand.values())[:keep_last]) | {str(number) for number in protected}
    if keep_every is not None:
        kept |= {name for step, name in stand.items() if step > 0 and step % keep_every == 0}
    expected = [name for name, _ in named if name not in kept]
    assert policy.removable(named, {str(number) for number in protected}) == expected


@pytest.mark.parametrize("rule", ["keep_last", "keep_every", "every_steps", "every_minutes"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_policy_that_keeps_nothing_is_refused(rule: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{rule}={value} is "):
        SavePolicy(**{rule: value})


class Retention(RuleBasedStateMachine):
    """Any order of saves, failures, crashes and restarts, against a list: newest, best and history are there, and load.

    So is the best of every yardstick that scores were measured with. Deletions are watched: when one happens, the
    newest checkpoint is whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(os, "fsync", lambda _: None)  # the order is held by another test
        self.patch.setattr(checkpoint_store, "remove_checkpoint", self.watched_removal)
        self.saved: list[tuple[int, float | None, str | None]] = []
        self.yardstick: str | None = None
        self.step = 0
        self.unpruned = self.unrecorded = False

    def watched_removal(self, path: Path) -> None:
        newest = newest_first(self.folder)[0][0][0]
        assert verify_checkpoint(newest).step == self.step and path != newest
        remove_checkpoint(path)

    @initialize(keep_last=st.integers(1, 3), keep_every=st.none() | st.integers(2, 4))
    def start(self, keep_last: int, keep_every: int | None) -> None:
        self.policy = SavePolicy(keep_last, keep_every)
        self.restart()

    @rule(advance=st.integers(0, 3), value=st.none() | st.sampled_from([0.1, 0.2, 0.3, float("nan")]))
    def save(self, advance: int, value: float | None) -> None:
        self.step += advance
        commit(self.store, self.step, value)
        self.saved.append((self.step, value, self.yardstick))
        self.unpruned = self.unrecorded = False

    @precondition(lambda self: self.saved)
    @rule(back=st.integers(1, 3))
    def go_back(self, back: int) -> None:
        self.step = max(0, self.step - back)
        self.restart()

    @rule()
    def restart(self) -> None:
        (self.folder / ".tmp-stray").mkdir(exist_ok=True)
        self.store = CheckpointStore(self.folder, self.policy, "val/mAP", yardstick=self.yardstick)

    @rule(yardstick=st.none() | st.sampled_from("ab"))
    def measure_otherwise(self, yardstick: str | None) -> None:
        self.yardstick = yardstick
        self.restart()
        self.unrecorded = True  # until the next save

    @rule()
    def lose_the_record_of_the_best(self) -> None:
        (self.folder / "best.json").unlink(missing_ok=True)
        self.restart()
        self.unrecorded = True  # until the next save

    @rule(value=st.sampled_from([0.1, 0.9]))
    def fail_while_writing(self, value: float) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "gone")))
            with pytest.raises(OSError, match="gone"):
                commit(self.store, self.step, value)

    @rule(advance=st.integers(0, 2), value=st.none() | st.sampled_from([0.15, 0.25]))
    def die_before_the_records(self, advance: int, value: float | None) -> None:
        """As a kill does: neither records nor deletions happen, and then the process starts again."""
        self.step += advance
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CheckpointStore, "_record", lambda *_: None)
            patch.setattr(CheckpointStore, "_prune", lambda *_: None)
            commit(self.store, self.step, value)
        self.saved.append((self.step, value, self.yardstick))
        self.restart()
        self.unpruned = self.unrecorded = True

    @rule(value=st.none() | st.sampled_from([0.12, 0.22]))
    def save_with_failing_records(self, value: float | None) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                checkpoint_store, "write_json", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
            )
            with pytest.raises(OSError, match="full"):
                commit(self.store, self.step, value)
        self.saved.append((self.step, value, self.yardstick))
        self.unpruned = self.unrecorded = True  # what the record on disk still names is kept

    @invariant()
    def newest_and_best_are_there(self) -> None:
        names = {path.name for path in list_checkpoints(self.folder)}
        if not self.saved:
            assert not names
            return
        assert weight(self.folder) == float(self.saved[-1][0])
        steps: list[int] = []
        for step, _, _ in reversed(self.saved):
            if step not in steps:
                steps.append(step)
        bests: dict[str | None, tuple[int, float]] = {}
        for step, value, yardstick in self.saved:
            if value is not None and value == value and (yardstick not in bests or value > bests[yardstick][1]):
                bests[yardstick] = (step, value)
        best = bests.get(self.yardstick)
        every = self.policy.keep_every
        history = {step for step in steps if every is not None and step > 0 and step % every == 0}
        kept = set(steps[: self.policy.keep_last]) | history | {step for step, _ in bests.values()}
        found = {verify_checkpoint(self.folder / name).step for name in names}
        assert found >= kept if self.unpruned else found == kept
        if best:
            assert self.store.best is not None and (self.store.best.step, self.store.best.value) == best
            assert self.store.best.checkpoint in names
            loaded = self.store.load("best")
            assert loaded is not None and loaded.step == best[0]
            if not self.unrecorded:
                assert read_best(self.folder) == self.store.best

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.folder)


Retention.TestCase.settings = settings(max_examples=20, stateful_step_count=14, deadline=None)
test_retention_keeps_the_newest_the_best_and_history = Retention.TestCase
