"""What a recipe says of the loss reaches the loop: chunks of tags, and correction from the second epoch on."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import start_up
import train_direct
from loss_functions import SelfPacedCorrectionLoss
from tagger.data.windows import Window
from tests.integration.test_train_direct import final_state, losses_of, run

SHORT = ("model.stem=patch", "optimizer.name=adamw", "training.num_epochs=2")


def test_a_run_in_chunks_of_tags_is_the_run_at_once(images: Path, tmp_path: Path) -> None:
    once = losses_of(run(images, tmp_path, "once", *SHORT))
    chunked = losses_of(run(images, tmp_path, "chunked", *SHORT, "loss.chunk_tags=3"))
    assert chunked.keys() == once.keys()
    assert list(chunked.values()) == pytest.approx(list(once.values()), rel=1e-3)


def test_correction_begins_with_the_second_epoch_also_after_a_resume(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, seen = train_direct.train_step, []

    def watched(parts: start_up.Parts, window: Window) -> tuple[Tensor, Tensor, Tensor]:
        result = inner(parts, window)
        loss = parts.criterion
        assert isinstance(loss, SelfPacedCorrectionLoss)
        seen.append((window.epoch, loss.correcting))
        return result

    monkeypatch.setattr(train_direct, "train_step", watched)
    words = (*SHORT, "loss.name=splc", "loss.correct_above=0.1", "checkpoint.every_steps=1", "checkpoint.keep_last=100")
    straight, resumed = run(images, tmp_path, "straight", *words), tmp_path / "resumed"
    assert set(seen) == {(0, False), (1, True)}
    steps = sorted((straight / "checkpoints").glob("step-*"))
    for path in steps[:-2]:
        shutil.copytree(path, resumed / "checkpoints" / path.name)
    for name in ("config.yaml", "vocabulary.json", "metrics.jsonl"):
        shutil.copy(straight / name, resumed / name)
    seen.clear()
    run(images, tmp_path, "resumed", *words, "--resume", "latest")
    assert set(seen) == {(1, True)}
    ours, theirs = final_state(resumed), final_state(straight)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
