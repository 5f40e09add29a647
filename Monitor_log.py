"""What a run reports: numbers, pictures and distributions to every sink, and progress to the console.

Nothing here stops a run: a sink that fails (a full disk, an unreachable service) loses values, which are counted and
reported, and is tried again with the next ones. When something is logged is the caller's decision, a function of the
step alone.
"""

import io
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from Configuration_System import MonitorSection
from tagger.cadence import due
from tagger.contact_sheet import draw_sheet, make_card
from tagger.errors import SinkError
from tagger.metrics.curves import TagCurve
from tagger.metrics.levels import Levels
from tagger.report.mistakes import ConfidentMistakes, Kind, mistake_card
from tagger.run_folder import RunFolder
from tagger.sinks import JsonlSink, PictureSink, Sink, TensorBoardSink
from tagger.system_stats import SystemStats
from tagger.wandb_sink import WandbSink

logger = logging.getLogger(__name__)

# On a narrower console than this the bar shows these figures alone: cut off, none of them could be read.
WIDE_COLUMNS = 110
MISTAKES: tuple[tuple[Kind, str], ...] = (("extra", "predicted, not tagged"), ("missed", "tagged, not predicted"))
NARROW_FIGURES = ("train/loss", "train/images_per_second")


class ThreadSafeMetricsTracker:
    """Values that any thread adds and the next log line takes: means of what is added, sums of what is counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._added: dict[str, tuple[float, int]] = {}
        self._counted: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        """One more value to average, e.g. the seconds that a checkpoint took."""
        with self._lock:
            total, number = self._added.get(name, (0.0, 0))
            self._added[name] = (total + value, number + 1)

    def count(self, name: str, amount: float = 1.0) -> None:
        """Something to sum up, e.g. images that could not be read."""
        with self._lock:
            self._counted[name] = self._counted.get(name, 0.0) + amount

    def drain(self) -> dict[str, float]:
        """The means and sums since the last call, by name; a name without a value is absent."""
        with self._lock:
            added, self._added = self._added, {}
            counted, self._counted = self._counted, {}
        return {**{name: total / number for name, (total, number) in added.items()}, **counted}


class TaggedImages(Protocol):
    """Images with what a model made of them and what is true."""

    @property
    def images(self) -> Sequence[torch.Tensor]:
        """uint8 [3, H, W] each; sizes may differ."""

    @property
    def logits(self) -> torch.Tensor:
        """[N, C]."""

    @property
    def tags(self) -> Sequence[Sequence[int]]:
        """For each image the indices of the tags that it has."""


class TrainingMonitor:
    """Fans out what a run reports. Used from the training thread; other threads add to `tracker`.

    `resume_step` is the step that the run continues from: what the files hold past it is removed. None starts anew.
    `settings` is the resolved configuration by dotted key, for the services that show it. `dropped` counts, by sink,
    the entries that were lost. `silent`: reports nothing anywhere, for a rank beside the one that reports. Use as a
    context manager, or call `close`.
    """

    def __init__(
        self,
        section: MonitorSection,
        folder: RunFolder,
        *,
        total_steps: int,
        resume_step: int | None = None,
        settings: Mapping[str, object] | None = None,
        console: Console | None = None,
        silent: bool = False,
    ) -> None:
        self.tracker = ThreadSafeMetricsTracker()
        self.dropped: dict[str, int] = {}
        self._section = section
        self._stats = SystemStats(folder.path)
        self._step_with_figures: int | None = None
        self._closed = False
        self._sinks: list[Sink] = []
        if silent:
            section, console = replace(section, tensorboard=False, wandb=False), Console(file=io.StringIO())
        else:
            self._open("metrics.jsonl", lambda: JsonlSink(folder.metrics_path, resume_step))
        if section.tensorboard:
            self._open("TensorBoard", lambda: TensorBoardSink(folder.tensorboard_dir, resume_step))
        if section.wandb:
            self._open(
                "Weights & Biases",
                lambda: WandbSink(
                    folder.path,
                    project=section.wandb_project,
                    run_name=folder.name,
                    mode=section.wandb_mode,
                    settings=settings or {},
                    resume_step=resume_step,
                ),
            )
        self._progress = _ConsoleProgress(console or Console(), total_steps, resume_step or 0)

    @property
    def shows_pictures(self) -> bool:
        """Whether anything takes pictures and curves, so that they are worth making."""
        return any(isinstance(sink, PictureSink) for sink in self._sinks)

    def advance(self, step: int) -> None:
        """Move the progress bar to `step` completed steps; cheap enough for every step."""
        self._progress.advance(step)

    def log(self, scalars: Mapping[str, float], step: int, epoch: int) -> None:
        """Record scalars by name, as `train/loss`; at steps that are due the machine's figures join the first line.

        `epoch` counts from 0, as everywhere but on the console.
        """
        values = {name: float(value) for name, value in scalars.items()}
        if due(step, self._section.log_every_steps) and step != self._step_with_figures:
            self._step_with_figures = step
            values |= {**self.tracker.drain(), **self._stats.read()}
        now = time.time()
        for sink in self._sinks:
            with self._losses_counted(sink):
                sink.write_scalars(values, step, epoch, now)
        self._progress.show(values, step, epoch)

    def log_predictions(
        self, name: str, samples: TaggedImages, tag_names: Sequence[str], threshold: float, step: int
    ) -> None:
        """Show up to `monitor.sample_images` images on one picture, with their tags of probability >= `threshold`."""
        sinks = [sink for sink in self._sinks if isinstance(sink, PictureSink)]
        number = min(self._section.sample_images, len(samples.images))
        if not sinks or number == 0:
            return
        pixels = [image.permute(1, 2, 0).cpu().numpy() for image in samples.images[:number]]
        scores = samples.logits[:number].float().sigmoid().cpu().numpy()
        cards = [
            make_card(pixels[i], "", tag_names, scores[i], threshold=threshold, truth=samples.tags[i])
            for i in range(number)
        ]
        picture = draw_sheet(cards, name, f"step {step}, tags at or above {threshold:.2f}", scale=1.5)
        now = time.time()
        for sink in sinks:
            with self._losses_counted(sink):
                sink.write_picture(name, picture, step, now)

    def log_mistakes(self, name: str, mistakes: ConfidentMistakes, tag_names: Sequence[str], step: int) -> None:
        """Show the images on which a model is most sure and wrong, on a picture for each kind of mistake."""
        sinks = [sink for sink in self._sinks if isinstance(sink, PictureSink)]
        for kind, title in MISTAKES if sinks else ():
            cards = [mistake_card(mistake, tag_names) for mistake in mistakes.strongest(kind)]
            if not cards:
                continue
            picture = draw_sheet(cards, title, f"step {step}; the first tag is the mistake", scale=1.5)
            now = time.time()
            for sink in sinks:
                with self._losses_counted(sink):
                    sink.write_picture(f"{name}/{kind}", picture, step, now)

    def log_curves(self, name: str, curves: Mapping[str, TagCurve], step: int) -> None:
        """Show precision-recall curves by what they are of; one without positives is left out."""
        levels = {label: Levels.of(curve) for label, curve in curves.items() if curve.num_positives}
        now = time.time()
        for sink in self._sinks:
            if isinstance(sink, PictureSink) and levels:
                with self._losses_counted(sink):
                    sink.write_curves(name, levels, step, now)

    def log_histogram(self, name: str, values: NDArray[np.floating] | torch.Tensor, step: int) -> None:
        """Show how values are distributed, e.g. the average precision of the tags; what is not finite is left out."""
        array = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values, dtype=np.float64)
        finite = array[np.isfinite(array)]
        if not finite.size:
            return
        now = time.time()
        for sink in self._sinks:
            if isinstance(sink, PictureSink):
                with self._losses_counted(sink):
                    sink.write_histogram(name, finite, step, now)

    def close(self) -> None:
        """Close every sink and say what was lost; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._progress.close()
        for sink in self._sinks:
            with self._losses_counted(sink):
                sink.close()
        for name, number in self.dropped.items():
            logger.warning("%s lacks %d entries that it could not take", name, number)

    def __enter__(self) -> "TrainingMonitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, name: str, make: Callable[[], Sink]) -> None:
        try:
            self._sinks.append(make())
        except (SinkError, OSError) as error:
            logger.warning("%s is off for this run: %s", name, error)

    @contextmanager
    def _losses_counted(self, sink: Sink) -> Iterator[None]:
        try:
            yield
        except (SinkError, OSError) as error:
            if sink.name not in self.dropped:
                logger.warning("%s does not take values (%s); training goes on and counts them", sink.name, error)
            self.dropped[sink.name] = self.dropped.get(sink.name, 0) + 1


class _ConsoleProgress:
    """A bar on a terminal; elsewhere one plain line for each log event. A console that goes away is left alone."""

    def __init__(self, console: Console, total_steps: int, first_step: int) -> None:
        self._console = console
        self._total_steps = total_steps
        self._first_step = first_step
        self._began = time.monotonic()
        self._gone = False
        self._bar: Progress | None = None
        if console.is_terminal:
            # Where the words may not wrap, rich narrows the bar alone.
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[figures]}"),
                TextColumn("left"),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
                console=console,
                refresh_per_second=4,
                expand=True,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=first_step, epoch=1, figures="")
            self._attempt(self._bar.start)

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, values: Mapping[str, float], step: int, epoch: int) -> None:
        figures = _training_figures(values)
        others = [f"{name} {value:.4f}" for name, value in values.items() if name.startswith(("val/", "val_online/"))]
        if self._bar is not None and figures:
            shown = figures if self._console.width >= WIDE_COLUMNS else _training_figures(values, NARROW_FIGURES)
            self._bar.update(self._task, completed=step, epoch=epoch + 1, figures="  ".join(shown))
        if self._bar is not None and not others:
            return
        left = [f"left {_clock_text(self._seconds_left(step))}"] if self._bar is None and figures else []
        parts = [f"step {step}/{self._total_steps}", f"epoch {epoch + 1}"]
        line = "  ".join(parts + (figures if self._bar is None else []) + others + left)
        self._attempt(lambda: self._console.out(line, highlight=False))

    def close(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            self._attempt(bar.stop)

    def _seconds_left(self, step: int) -> float:
        """At the mean speed of this process; 0 when nothing was done yet."""
        done = step - self._first_step
        return (time.monotonic() - self._began) / done * (self._total_steps - step) if done > 0 else 0.0

    def _attempt(self, write: Callable[[], None]) -> None:
        if self._gone:
            return
        try:
            write()
        except (OSError, ValueError, SystemExit) as error:
            # rich answers a closed pipe with SystemExit; a run goes on without anybody who looks.
            self._gone = True
            logger.info("the console is gone (%s); progress is in metrics.jsonl", type(error).__name__)


def _training_figures(values: Mapping[str, float], names: Collection[str] | None = None) -> list[str]:
    """What people watch, in the order in which they read it; of `names` alone where they are given."""
    formats: tuple[tuple[str, Callable[[float], str]], ...] = (
        ("train/loss", lambda value: f"loss {value:.4f}"),
        ("train/learning_rate", lambda value: f"lr {value:.2e}"),
        ("train/images_per_second", lambda value: f"{value:,.0f} images/s"),
        ("train/data_wait_fraction", lambda value: f"waiting {value:.0%}"),
    )
    return [form(values[name]) for name, form in formats if name in values and (names is None or name in names)]


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
