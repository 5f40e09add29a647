"""A run with everything on, stopped after each of its updates in turn and resumed, is bitwise the run never stopped."""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from PIL import Image
from torch import Tensor

import start_up
import train_direct
from Configuration_System import load_config
from scripts.verify_resume import StopAt, first_difference
from tagger.checkpoint.format import LoadedCheckpoint
from tagger.checkpoint.store import load_checkpoint
from tagger.data.windows import Window
from tagger.run_folder import RunFolder

if hasattr(os, "fork"):
    from tests.loader_nursery import nursery

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="hundreds of processes, each forked")

ROOT = Path(__file__).resolve().parents[2]
NUM_EPOCHS = 3
SETTINGS = (
    "data.image_size=32",
    "data.val_fraction=0.2",
    "vocabulary.min_frequency=1",
    "model.preset=vit_tiny",
    "model.patch_size=8",
    "model.embed_dim=16",
    "model.depth=2",
    "model.num_heads=2",
    "model.stem=conv",
    "model.dropout=0.2",
    "model.drop_path=0.2",
    "optimizer.name=muon",
    "orientation.mirror_probability=0.5",
    "orientation.map_path=null",
    "orientation.mode=balanced",
    "training.device=cpu",
    "training.batch_size=4",
    f"training.num_epochs={NUM_EPOCHS}",
    "training.ema_decay=0.9",
    "training.early_stopping_patience=2",
    "monitor.log_every_steps=2",
    "monitor.tensorboard=false",
    "checkpoint.keep_last=1",
)
# The second begins inside the second epoch, and its augmentation is the recipe's.
PHASES = (
    "training.phases=[{image_size: 16, share: 0.45, batch_size: 3, learning_rate_factor: 0.5, patch_dropout: 0.25, "
    "augment: {brightness: {probability: 0.5, strength: 0.3}}}, {image_size: 32}]"
)


@dataclass(frozen=True)
class Done:
    """What is compared: the last checkpoint, the rows of every update, and the lines of the metrics without times."""

    checkpoint: LoadedCheckpoint
    rows: dict[int, list[int]]
    metrics: list[dict[str, float]]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("matrix") / "images"
    root.mkdir()
    generator = np.random.default_rng(0)
    for number in range(24):
        pixels = generator.integers(0, 256, (24 + number % 5, 24 + number % 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"img{number:02}.png")
        tags = ["circle", "square", "arrow", "text"][number % 4 :][:2]
        (root / f"img{number:02}.json").write_text(json.dumps({"filename": f"img{number:02}.png", "tags": tags}))
    return root


def words_of(images: Path, runs: Path, accumulation: int, processes: int) -> list[str]:
    augment = load_config(ROOT / "configs" / "unified_config.yaml", environment={}).augment
    every = [f"augment.{name}={{probability: 0.7, strength: {strength_of(name)}}}" for name in vars(augment)]
    return [
        *SETTINGS,
        *every,
        f"data.roots=[{images}]",
        f"data.index_dir={images.parent / 'index'}",
        f"data.num_processes={processes}",
        f"data.num_threads={max(processes, 1)}",
        f"training.accumulation_steps={accumulation}",
        f"run.output_dir={runs}",
    ]


def strength_of(name: str) -> float:
    return {"rotation": 10.0}.get(name, 0.2)


def train_to(words: list[str], name: str, stops: list[int]) -> Done:
    """Train to each of `stops` updates in turn, every time from what the run left on disk."""
    rows: dict[int, list[int]] = {}
    inner = train_direct.train_step

    def recording(parts: start_up.Parts, window: Window) -> tuple[Tensor, Tensor, Tensor]:
        rows[parts.state.step] = [int(row) for batch in window.batches for row in batch.row_ids]
        return inner(parts, window)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_direct, "train_step", recording)
        for number, stop_at in enumerate(stops):
            resume = "latest" if number else "none"
            config = load_config(
                ROOT / "configs" / "unified_config.yaml",
                [*words, f"run.name={name}", f"checkpoint.resume={resume}"],
                environment={},
            )
            # What is left of the run before must not be what makes the next one right.
            torch.manual_seed(number)
            with StopAt(stop_at) as stop, RunFolder.open(config.run.folder, resume=number > 0) as folder:
                parts = stop.parts = start_up.build(config, folder, stop)
                try:
                    with parts.monitor, parts.manager:
                        train_direct.train(parts)
                finally:
                    parts.feed.close()
                    parts.validation_loader.close()
                assert parts.state.step == min(stop_at, parts.total_steps)
    checkpoint = load_checkpoint(config.run.folder / "checkpoints", "latest")
    assert checkpoint is not None
    return Done(checkpoint, rows, metrics_of(config.run.folder / "metrics.jsonl"))


def metrics_of(path: Path) -> list[dict[str, float]]:
    lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    times = ("time", "system/", "train/images_per_second", "train/data_wait_fraction", "train/checkpoint_lag_seconds")
    return [{name: value for name, value in line.items() if not name.startswith(times)} for line in lines]


def assert_equal(resumed: Done, straight: Done, stops: list[int]) -> None:
    assert first_difference(straight.checkpoint, resumed.checkpoint, (straight.rows, resumed.rows)) is None, stops
    assert resumed.metrics == straight.metrics, stops


def straight_run(words: list[str], num_steps: int) -> Done:
    straight = train_to(words, "straight", [10**6])
    assert straight.checkpoint.step == num_steps
    assert {line["step"] for line in straight.metrics} >= set(range(2, straight.checkpoint.step + 1, 2))
    assert straight.checkpoint.tensors.keys() == {"model", "optimizer", "ema", "rng"}
    return straight


def num_updates(accumulation: int) -> int:
    """Of a run without phases."""
    return NUM_EPOCHS * (5 if accumulation == 1 else 2)


def every_stop_changes_nothing(words: list[str], num_steps: int) -> int:
    """Each stop alone, and a run that is stopped at all of them; returns how often a run was started."""
    straight = straight_run(words, num_steps)
    each = range(1, num_steps)
    for step in each:
        assert_equal(train_to(words, f"stop-{step}", [step, 10**6]), straight, [step])
    everywhere = [*each, 10**6]
    assert_equal(train_to(words, "everywhere", everywhere), straight, everywhere)
    return 1 + 2 * len(each) + len(everywhere)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=needs_fork)])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_stop_at_any_step_changes_nothing(
    images: Path, tmp_path: Path, accumulation: int, processes: int, caplog: pytest.LogCaptureFixture
) -> None:
    words = words_of(images, tmp_path, accumulation, processes)
    with nursery() if processes else contextlib.nullcontext() as started:
        num_starts = every_stop_changes_nothing(words, num_updates(accumulation))
    # Two for training in every leg, and two for validation in those that come to the end of an epoch.
    assert started is None or started.num_started > 2 * num_starts
    assert "starting it again" not in caplog.text


@pytest.mark.slow
def test_a_stop_in_any_phase_changes_nothing(images: Path, tmp_path: Path) -> None:
    """Six updates of the first phase, the last two of them in the second epoch, and four of the second."""
    every_stop_changes_nothing([*words_of(images, tmp_path, 2, 0), PHASES], 10)
    lines = metrics_of(tmp_path / "everywhere" / "metrics.jsonl")
    sizes = {line["step"]: line["train/image_size"] for line in lines if "train/image_size" in line}
    assert sizes == {2: 16, 4: 16, 6: 16, 8: 32, 10: 32}


@pytest.mark.slow
def test_processes_started_from_nothing_change_nothing_either(images: Path, tmp_path: Path) -> None:
    """Loader processes as a run starts them, in a second: equal to a run that never stopped and has threads."""
    straight = straight_run(words_of(images, tmp_path / "threads", 3, 0), num_updates(3))
    resumed = train_to(words_of(images, tmp_path / "processes", 3, 2), "resumed", [3, 10**6])
    assert resumed.rows == straight.rows and resumed.metrics == straight.metrics
    for part, tensors in straight.checkpoint.tensors.items():
        assert all(torch.equal(tensor, resumed.checkpoint.tensors[part][name]) for name, tensor in tensors.items())
