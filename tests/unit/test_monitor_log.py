"""The monitor's promises: numbers arrive everywhere, and nothing that happens to them stops the run."""

import errno
import io
import json
import logging
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from Configuration_System import MonitorSection
from evaluation_metrics import MetricComputer
from Monitor_log import ThreadSafeMetricsTracker, TrainingMonitor
from tagger.errors import SinkError
from tagger.report.collect import create_mistakes, telling_curves
from tagger.run_folder import RunFolder
from tagger.wandb_sink import WandbSink
from tests.evaluated import make_batch, make_case

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class FewSamples:
    images: tuple[torch.Tensor, ...]
    logits: torch.Tensor
    tags: tuple[tuple[int, ...], ...]


@pytest.fixture
def folder(tmp_path: Path):
    with RunFolder.open(tmp_path / "run", resume=False) as opened:
        yield opened


def open_monitor(folder: RunFolder, console: Console | None = None, **settings) -> TrainingMonitor:
    resume_step = settings.pop("resume_step", None)
    section = MonitorSection(log_every_steps=10, **settings)
    console = console or Console(file=io.StringIO())
    return TrainingMonitor(section, folder, total_steps=100, resume_step=resume_step, console=console)


def lines_of(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.metrics_path.read_text(encoding="utf-8").splitlines()]


def events_of(folder: RunFolder) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder.tensorboard_dir))
    accumulator.Reload()
    return accumulator


def test_scalars_reach_the_lines_and_tensorboard(folder: RunFolder) -> None:
    with open_monitor(folder) as monitor:
        monitor.log({"train/loss": torch.tensor(0.5), "train/learning_rate": np.float64(1e-3)}, 10, 0)
        monitor.log({"val/mAP": 0.75}, 10, 0)
    first, second = lines_of(folder)
    assert (first["step"], first["epoch"], first["train/loss"], first["train/learning_rate"]) == (10, 0, 0.5, 1e-3)
    assert second["val/mAP"] == 0.75
    events = events_of(folder)
    assert events.Scalars("train/loss")[0].value == 0.5
    assert events.Scalars("val/mAP")[0].step == 10


def test_system_figures_join_the_first_line_of_a_step_that_is_due(folder: RunFolder) -> None:
    with open_monitor(folder) as monitor:
        for step in (10, 10, 13):
            monitor.log({"val/mAP": 0.5}, step, 0)
    with_figures = [any(name.startswith("system/") for name in line) for line in lines_of(folder)]
    assert with_figures == [True, False, False]
    figures = {name: value for name, value in lines_of(folder)[0].items() if name.startswith("system/")}
    assert {"system/cpu_percent", "system/ram_gb", "system/disk_free_gb"} <= figures.keys()
    assert 0 < figures["system/ram_gb"] < 1000 and 0 <= figures["system/cpu_percent"] <= 100


def test_values_of_other_threads_join_the_next_line_that_is_due(folder: RunFolder) -> None:
    with open_monitor(folder) as monitor:
        threads = [
            threading.Thread(target=monitor.tracker.add, args=("checkpoint/write_seconds", value)) for value in (1, 3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monitor.log({"train/loss": 1.0}, 10, 0)
        monitor.log({"train/loss": 1.0}, 20, 0)
    first, second = lines_of(folder)
    assert first["checkpoint/write_seconds"] == 2.0
    assert "checkpoint/write_seconds" not in second


def test_the_tracker_loses_nothing_between_threads() -> None:
    tracker, drained = ThreadSafeMetricsTracker(), []

    def work() -> None:
        for _ in range(5000):
            tracker.count("images", 1)
            tracker.add("seconds", 2.0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        drained.append(tracker.drain())
    drained.append(tracker.drain())
    assert sum(values.get("images", 0) for values in drained) == 20_000
    assert {values["seconds"] for values in drained if "seconds" in values} == {2.0}
    assert tracker.drain() == {}


def test_samples_and_histogram_reach_tensorboard(folder: RunFolder) -> None:
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    samples = FewSamples(tuple(images), torch.randn(12, 3), ((0,), (1, 2), ()) * 4)
    with open_monitor(folder, sample_images=4) as monitor:
        monitor.log_predictions("val/samples", samples, ("cat", "dog", "tree"), 0.5, 30)
        monitor.log_histogram("val/average_precision", torch.tensor([0.1, torch.nan, 0.9]), 30)
        monitor.log_histogram("val/empty", np.array([np.nan]), 30)
    events = events_of(folder)
    (picture,) = events.Images("val/samples")
    assert picture.step == 30 and picture.width > picture.height > 100
    assert events.Histograms("val/average_precision")[0].histogram_value.num == 2
    assert events.Tags()["histograms"] == ["val/average_precision"]


def test_mistakes_and_curves_reach_tensorboard(folder: RunFolder) -> None:
    logits, tag_lists = make_case(40, 4, share=0.6)
    tagged = next(row for row, tags in enumerate(tag_lists) if tags)
    logits[tagged] = torch.where(torch.isin(torch.arange(4), torch.tensor(tag_lists[tagged])), -5.0, 5.0)
    batch = make_batch(tag_lists)
    mistakes = create_mistakes(3, np.full(4, 10), 40, 0.5)
    assert mistakes is not None and create_mistakes(0, np.full(4, 10), 40, 0.5) is None
    mistakes.add(batch, logits)
    computer = MetricComputer(4)
    computer.update(logits, batch.tag_indices, batch.tag_offsets)
    names = ("cat", "dog", "tree", "never")
    with open_monitor(folder) as monitor:
        assert monitor.shows_pictures
        monitor.log_mistakes("val/mistakes", mistakes, names, 30)
        monitor.log_curves("val/precision_recall", telling_curves(computer, names, np.array([5, 9, 7, 1])), 30)
    events = events_of(folder)
    assert set(events.Tags()["images"]) == {"val/mistakes/extra", "val/mistakes/missed"}
    present = {names[tag] for tags in tag_lists for tag in tags}
    expected = {f"val/precision_recall/{name}" for name in (*present, "all decisions")}
    assert set(events.PluginTagToContent("pr_curves")) == expected


def test_no_mistake_and_no_positive_log_nothing(folder: RunFolder) -> None:
    mistakes = create_mistakes(3, np.full(2, 10), 40, 0.5)
    assert mistakes is not None
    batch = make_batch([[], []])
    mistakes.add(batch, torch.full((2, 2), -9.0))
    computer = MetricComputer(2)
    computer.update(torch.full((2, 2), -9.0), batch.tag_indices, batch.tag_offsets)
    with open_monitor(folder) as monitor:
        monitor.log_mistakes("val/mistakes", mistakes, ("cat", "dog"), 30)
        monitor.log_curves("val/precision_recall", telling_curves(computer, ("cat", "dog"), np.array([2, 1])), 30)
    events = events_of(folder)
    assert not events.Tags()["images"] and not events.Tags()["tensors"]


def test_no_sample_is_drawn_where_nothing_shows_it(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("Monitor_log.draw_sheet", lambda *_: pytest.fail("drawn"))
    samples = FewSamples((torch.zeros(3, 8, 8, dtype=torch.uint8),), torch.zeros(1, 2), ((0,),))
    with open_monitor(folder, tensorboard=False) as monitor:
        assert not monitor.shows_pictures
        monitor.log_predictions("val/samples", samples, ("cat", "dog"), 0.5, 30)


def test_a_full_disk_costs_lines_but_not_the_run(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    class Full:
        def write(self, _data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def truncate(self, _size: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

    monitor = open_monitor(folder, tensorboard=False)
    monitor.log({"train/loss": 1.0}, 1, 0)
    file = monitor._sinks[0]._file
    stream, file._stream = file._stream, Full()
    with caplog.at_level(logging.WARNING):
        for step in (2, 3, 4):
            monitor.log({"train/loss": 1.0}, step, 0)
        file._stream = stream
        monitor.log({"train/loss": 1.0}, 5, 0)
        monitor.close()
    assert [line["step"] for line in lines_of(folder)] == [1, 5]
    assert monitor.dropped == {"metrics.jsonl": 3}
    assert [record.message.startswith("metrics.jsonl") for record in caplog.records] == [True, True]


def test_wandb_that_fails_never_stops_the_run(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def fail(*_: object, **__: object) -> None:
        raise SinkError("CommError: unreachable")

    monkeypatch.setattr(WandbSink, "__init__", fail)
    with caplog.at_level(logging.WARNING), open_monitor(folder, wandb=True) as monitor:
        monitor.log({"train/loss": 1.0}, 1, 0)
    assert len(lines_of(folder)) == 1
    assert "Weights & Biases is off for this run: CommError: unreachable" in caplog.text


def test_wandb_is_not_imported_unless_it_is_on() -> None:
    code = "import sys, Monitor_log; sys.exit('wandb' in sys.modules or 'tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_resumed_run_has_each_step_once(folder: RunFolder) -> None:
    for steps, resume_step in ((range(10, 60, 10), None), (range(30, 70, 10), 20)):
        with open_monitor(folder, resume_step=resume_step) as monitor:
            for step in steps:
                monitor.log({"train/loss": float(step)}, step, 0)
    assert [line["step"] for line in lines_of(folder)] == [10, 20, 30, 40, 50, 60]
    assert [point.step for point in events_of(folder).Scalars("train/loss")] == [10, 20, 30, 40, 50, 60]


def test_without_a_terminal_each_log_event_is_one_plain_line(folder: RunFolder) -> None:
    text = io.StringIO()
    scalars = {
        "train/loss": 3.25,
        "train/learning_rate": 1e-3,
        "train/images_per_second": 1234.4,
        "train/data_wait_fraction": 0.02,
    }
    with open_monitor(folder, Console(file=text)) as monitor:
        for step in range(1, 11):
            monitor.advance(step)
        monitor.log(scalars, 10, 0)
        monitor.log({"val/mAP": 0.5}, 10, 0)
    first, second = text.getvalue().splitlines()
    assert first.startswith("step 10/100  epoch 1  loss 3.2500  lr 1.00e-03  1,234 images/s  waiting 2%  left ")
    assert second == "step 10/100  epoch 1  val/mAP 0.5000"


def test_a_terminal_shows_a_bar_with_the_figures(folder: RunFolder) -> None:
    text = io.StringIO()
    with open_monitor(folder, Console(file=text, force_terminal=True, width=120)) as monitor:
        monitor.log({"train/loss": 3.25, "train/data_wait_fraction": 0.5}, 10, 0)
        monitor.log({"val/mAP": 0.5}, 10, 0)
        monitor.advance(11)
    shown = text.getvalue()
    assert "loss 3.2500" in shown and "waiting 50%" in shown and "val/mAP 0.5000" in shown and "11/100" in shown


@pytest.mark.parametrize("columns", [80, 110, 160])
def test_what_people_watch_is_whole_on_the_bar(folder: RunFolder, columns: int) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=columns, color_system=None)
    monitor = TrainingMonitor(MonitorSection(tensorboard=False), folder, total_steps=1_310_720, console=console)
    figures = {"loss": 123.4567, "learning_rate": 1e-3, "images_per_second": 12345.0, "data_wait_fraction": 0.25}
    with monitor:
        monitor.log({f"train/{name}": value for name, value in figures.items()}, 1_310_000, 129)
    shown = [line for line in text.getvalue().replace("\x1b", "\n").splitlines() if "epoch" in line][-1]
    wide = ["lr 1.00e-03", "waiting 25%"] if columns >= 110 else []
    for part in ("epoch 130", "1310000/1310720", "loss 123.4567", "12,345 images/s", *wide):
        assert part in shown
    assert re.search(r"left (\d+:\d\d:\d\d|-:--:--)", shown)
    assert "…" not in shown and "━" in shown


def test_a_console_that_goes_away_does_not_stop_the_run(folder: RunFolder) -> None:
    class Gone(io.StringIO):
        def write(self, _text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    with open_monitor(folder, Console(file=Gone())) as monitor:
        for step in (10, 20):
            monitor.log({"train/loss": 1.0}, step, 0)
    assert len(lines_of(folder)) == 2
