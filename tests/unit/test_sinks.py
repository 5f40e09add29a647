"""What lies in `metrics.jsonl` and in event files, as their own readers see it."""

import errno
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from evaluation_metrics import MetricComputer
from tagger import sinks
from tagger.cadence import due
from tagger.metrics.levels import NUM_LEVELS, Levels
from tagger.sinks import JsonlSink, TensorBoardSink


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def written(path: Path, steps: range, resume_step: int | None = None) -> None:
    sink = JsonlSink(path, resume_step)
    for step in steps:
        sink.write_scalars({"train/loss": 1.0 / step}, step, 0, 100.0 + step)
    sink.close()


def read_events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def scalar_points(folder: Path, name: str) -> dict[int, float]:
    return {point.step: point.value for point in read_events(folder).Scalars(name)}


def test_a_line_has_step_epoch_time_and_the_scalars(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write_scalars({"train/loss": 0.5, "val/mAP": math.nan, "train/grad_norm": math.inf}, 20, 3, 1234.5)
    sink.close()
    expected = {"step": 20, "epoch": 3, "time": 1234.5, "train/loss": 0.5, "val/mAP": None, "train/grad_norm": None}
    assert lines_of(tmp_path / "metrics.jsonl") == [expected]


def test_resume_drops_lines_past_the_step_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 8))
    written(path, range(5, 7), resume_step=4)
    assert [line["step"] for line in lines_of(path)] == [1, 2, 3, 4, 5, 6]


def test_a_fresh_start_drops_every_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 8))
    written(path, range(1, 3))
    assert [line["step"] for line in lines_of(path)] == [1, 2]


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 400), resume_step=st.integers(0, 9))
def test_a_file_torn_anywhere_keeps_its_whole_lines(tmp_path_factory, cut: int, resume_step: int) -> None:
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    written(path, range(1, 9))
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    complete = [json.loads(line)["step"] for line in whole[:cut].split(b"\n")[:-1]]
    if whole[: cut + 1].endswith(b"}\n"):
        complete = [json.loads(line)["step"] for line in whole[: cut + 1].splitlines()]  # only the line feed is lost
    written(path, range(100, 101), resume_step=resume_step)
    assert [line["step"] for line in lines_of(path)] == [*(s for s in complete if s <= resume_step), 100]


class FullDisk:
    """A stream that takes `room` more bytes and then answers as a full disk does."""

    def __init__(self, stream, room: int) -> None:
        self.stream, self.room = stream, room

    def write(self, data) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        number = self.stream.write(data[: self.room])
        self.room -= number
        return number

    def truncate(self, size: int) -> int:
        return self.stream.truncate(size)

    def close(self) -> None:
        self.stream.close()


@pytest.mark.parametrize("room", [0, 1, 30])
def test_a_full_disk_leaves_whole_lines_and_later_ones_are_taken(tmp_path: Path, room: int) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write_scalars({"train/loss": 1.0}, 1, 0, 0.0)
    sink._file._stream = full = FullDisk(sink._file._stream, room)
    with pytest.raises(OSError, match="No space"):
        sink.write_scalars({"train/loss": 2.0}, 2, 0, 0.0)
    assert [line["step"] for line in lines_of(path)] == [1]
    full.room = 10_000
    sink.write_scalars({"train/loss": 3.0}, 3, 0, 0.0)
    sink.close()
    assert [line["step"] for line in lines_of(path)] == [1, 3]


def test_tensorboard_reads_scalars_pictures_and_histograms(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write_scalars({"train/loss": 0.25, "val/mAP": math.nan}, 20, 1, 1000.0)
    sink.write_picture("val/samples", Image.new("RGB", (12, 7), (200, 10, 30)), 20, 1000.0)
    values = np.array([0.0, 0.25, 0.25, 1.0])
    sink.write_histogram("val/average_precision", values, 20, 1000.0)
    sink.close()
    events = read_events(tmp_path)
    assert scalar_points(tmp_path, "train/loss") == {20: 0.25}
    assert math.isnan(scalar_points(tmp_path, "val/mAP")[20])
    (picture,) = events.Images("val/samples")
    assert (picture.width, picture.height) == (12, 7)
    (histogram,) = events.Histograms("val/average_precision")
    found = histogram.histogram_value
    assert (found.min, found.max, found.num, found.sum) == (0.0, 1.0, 4.0, 1.5)
    assert sum(found.bucket) == 4


def test_tensorboard_reads_curves(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    truth = generator.random((400, 1)) < 0.3
    logits = torch.from_numpy(generator.normal(size=truth.shape) + 2 * truth).float()
    computer = MetricComputer(1)
    computer.update(logits, torch.from_numpy(truth).float())
    (curve,) = computer.curves()
    sink = TensorBoardSink(tmp_path)
    sink.write_curves("val/precision_recall", {"cat/dog": Levels.of(curve)}, 20, 1000.0)
    sink.close()
    accumulator = read_events(tmp_path)
    (name,) = accumulator.PluginTagToContent("pr_curves")
    assert name == "val/precision_recall/cat/dog"
    (event,) = accumulator.Tensors(name)
    found = make_ndarray(event.tensor_proto)
    assert found.shape == (6, NUM_LEVELS) and event.step == 20
    scores = torch.from_numpy(logits.half().double().sigmoid().numpy()).numpy()
    for level, (hits, wrong, right_others, missed, precision, recall) in zip(
        Levels.of(curve).probability, found.T, strict=True
    ):
        taken = scores >= level
        assert (hits, wrong) == ((taken & truth).sum(), (taken & ~truth).sum())
        assert (right_others, missed) == ((~taken & ~truth).sum(), (~taken & truth).sum())
        assert np.isclose(precision, hits / max(hits + wrong, 1)) and np.isclose(recall, hits / truth.sum())


def test_tensorboard_is_purged_past_the_resumed_step(tmp_path: Path) -> None:
    for steps, value, resume_step in ((range(10, 160, 10), 1.0, None), (range(110, 130, 10), 2.0, 100)):
        sink = TensorBoardSink(tmp_path, resume_step)
        for step in steps:
            sink.write_scalars({"train/loss": value}, step, 0, float(step))
        if resume_step is None:
            sink.write_scalars({"val/mAP": 0.5}, 150, 0, 150.0)
        sink.close()
    expected = {**dict.fromkeys(range(10, 110, 10), 1.0), 110: 2.0, 120: 2.0}
    assert scalar_points(tmp_path, "train/loss") == expected
    assert "val/mAP" not in read_events(tmp_path).Tags()["scalars"]


def test_a_torn_event_file_keeps_its_whole_records(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step in (1, 2, 3):
        sink.write_scalars({"train/loss": float(step)}, step, 0, 0.0)
    sink.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    TensorBoardSink(tmp_path, resume_step=3).close()
    assert scalar_points(tmp_path, "train/loss") == {1: 1.0, 2: 2.0}


def test_event_files_sort_by_start_when_the_clock_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for now in (2_000_000_000.0, 1_000_000_000.0, 1_000_000_000.0):
        monkeypatch.setattr(sinks.time, "time", lambda now=now: now)
        before = set(tmp_path.iterdir())
        TensorBoardSink(tmp_path, resume_step=0).close()
        names += [path.name for path in set(tmp_path.iterdir()) - before]
    assert names == sorted(names) and len(names) == 3


@given(every=st.integers(1, 50), start=st.integers(0, 200), length=st.integers(0, 200))
def test_what_is_due_depends_on_the_step_alone(every: int, start: int, length: int) -> None:
    straight = [step for step in range(start + length + 1) if due(step, every)]
    resumed = [step for step in range(start + 1) if due(step, every)]
    resumed += [step for step in range(start + 1, start + length + 1) if due(step, every)]
    assert straight == resumed and all(step and step % every == 0 for step in straight)
