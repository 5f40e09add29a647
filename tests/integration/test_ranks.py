"""Two processes train one run: what they learn, save and say is what one process does with the same images."""

import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tagger.checkpoint.format import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals to send to a process"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo"),
]
# An epoch of 39 images is a window of 24 and a short one of 8; the rest is left out.
SETTINGS = (
    "data.image_size=32",
    "data.val_fraction=0.2",
    "data.calib_fraction=0.1",
    "data.num_threads=2",
    "vocabulary.min_frequency=1",
    "model.preset=vit_tiny",
    "model.patch_size=8",
    "model.embed_dim=16",
    "model.depth=2",
    "model.num_heads=2",
    "augment.rotation={probability: 0.5, strength: 10}",
    "training.device=cpu",
    "training.num_epochs=2",
    "training.accumulation_steps=3",
    "training.early_stopping_patience=null",
    "validation.batch_size=3",
    "validation.online_weights=true",
    "monitor.log_every_steps=1",
    "monitor.tensorboard=false",
)
PHASES = "training.phases=[{image_size: 16, share: 0.4}, {image_size: 32}]"
MEMBERS = ("model.num_members=2", "training.num_epochs=1")
# Everything that draws random numbers or keeps statistics of its own.
NOISY = ("model.stem=conv", "model.dropout=0.2", "model.drop_path=0.2", "optimizer.name=muon", "training.num_epochs=1")


def words(images: Path, runs: Path, name: str, batch_size: int, *more: str) -> list[str]:
    places = [f"data.roots=[{images}]", f"data.index_dir={images.parent / 'index'}", f"run.output_dir={runs}"]
    own = [f"run.name={name}", f"training.batch_size={batch_size}", *more]
    return ["--config", str(ROOT / "configs" / "unified_config.yaml"), *SETTINGS, *places, *own]


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def run_pair(folder: Path, jobs: Sequence[Mapping[str, Any]]) -> tuple[list[list[int]], list[str]]:
    """Two ranks do jobs one after the other; each rank's exit codes, and what it wrote to the console."""
    file = folder / "jobs.json"
    file.write_text(json.dumps([{"port": free_port(), **job} for job in jobs]), encoding="utf-8")
    codes = [folder / f"codes-{rank}.json" for rank in range(2)]
    for path in codes:
        path.write_text("[]", encoding="utf-8")
    command = [sys.executable, "-m", "tests.ranked_runs"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), "2", str(file), str(codes[rank])], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads(path.read_text(encoding="utf-8")) for path in codes], said


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def newest(run: Path) -> Path:
    return checkpoints(run)[-1]


def scores(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k.startswith(("val", "train/loss", "step"))} for line in lines]


def assert_same_training(found: Path, expected: Path) -> None:
    one, other = read_checkpoint(newest(found)), read_checkpoint(newest(expected))
    assert one.step == other.step
    for name in ("epoch", "position", "samples_seen"):
        assert one.state[name] == other.state[name], name
    for part in ("model", "ema", "optimizer"):
        assert one.tensors[part].keys() == other.tensors[part].keys()
        for name, tensor in other.tensors[part].items():
            torch.testing.assert_close(one.tensors[part][name], tensor, rtol=0, atol=1e-6, msg=f"{part} {name}")
    pairs = list(zip(scores(found), scores(expected), strict=True))
    assert any("val/mAP" in line for line, _ in pairs)
    for line, like in pairs:
        assert line == pytest.approx(like, abs=1e-6), line["step"]
        assert line.get("val/mAP") == like.get("val/mAP")


@dataclass(frozen=True)
class Done:
    """What the runs of this file left: their folders, the exit codes of both ranks, and what they said."""

    runs: Path
    codes: Mapping[str, tuple[int | None, ...]]
    said: Sequence[str]


@pytest.fixture(scope="module")
def done(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Every run of this file, made by one pair of processes, whose start takes longer than most of the runs."""
    runs = tmp_path_factory.mktemp("runs")

    def job(name: str, batch_size: int, *more: str, **what: Any) -> dict[str, Any]:
        return {"words": words(images, runs, name, batch_size, *more), **what}

    resume, fsdp = ("--resume", "latest"), "training.parallel=fsdp"
    jobs = {
        "one": job("one", 8, alone=True),
        "one-phases": job("one-phases", 8, PHASES, alone=True),
        "one-members": job("one-members", 8, *MEMBERS, alone=True),
        "ddp": job("ddp", 4),
        "fsdp": job("fsdp", 4, fsdp),
        "phases": job("phases", 4, PHASES),
        "members": job("members", 4, *MEMBERS),
        "straight": job("straight", 4, *NOISY),
        "stopped": job("stopped", 4, *NOISY, event="sigterm", of_rank=0, at_step=1),
        "stopped, resumed": job("stopped", 4, *NOISY, *resume),
        "mixed": job("mixed", 4, event="sigterm", of_rank=1, at_step=1),
        "mixed, one rank": job("mixed", 8, *resume, alone=True, event="sigterm", of_rank=0, at_step=2),
        "mixed, sharded": job("mixed", 4, *resume, fsdp),
        # A rank that waits for the other's scores is asked to stop; then one that scores.
        "unscored-ddp": job("unscored-ddp", 4, event="sigterm once scored", of_rank=1),
        "unscored-fsdp": job("unscored-fsdp", 4, fsdp, event="sigterm while scoring", of_rank=1),
        "refused": job("refused", 4, event="refusal", of_rank=1),
        "memory": job("memory", 4, event="memory", of_rank=1, at_step=2),
        "memory, again": job("memory", 4),
        "killed": job("killed", 4, event="sigkill", of_rank=1, at_step=2),
    }
    codes, said = run_pair(runs, list(jobs.values()))
    assert len(codes[0]) == len(jobs), said
    return Done(runs, dict(zip(jobs, itertools.zip_longest(*codes), strict=True)), said)


@pytest.fixture(scope="module")
def runs(done: Done) -> Path:
    return done.runs


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_ranks_train_as_one_does(done: Done, runs: Path, name: str) -> None:
    assert done.codes[name] == (0, 0), done.said
    assert_same_training(runs / name, runs / "one")
    results = json.loads((runs / name / "results.json").read_text(encoding="utf-8"))
    alone = json.loads((runs / "one" / "results.json").read_text(encoding="utf-8"))
    assert results["status"] == "completed"
    assert results["best"]["value"] == alone["best"]["value"]
    assert {path.name for path in (runs / name).iterdir()} == {path.name for path in (runs / "one").iterdir()}
    model, expected = (load_file(runs / each / "model" / "model.safetensors") for each in (name, "one"))
    assert model.keys() == expected.keys()
    assert all(model[key].shape == tensor.shape for key, tensor in expected.items())


@pytest.mark.parametrize("name", ["phases", "members"])
def test_phases_and_members_are_those_of_one_rank(runs: Path, name: str) -> None:
    assert_same_training(runs / name, runs / f"one-{name}")


def test_a_resume_with_the_same_ranks_is_exact(done: Done, runs: Path) -> None:
    assert done.codes["stopped"] == (143, 143), done.said
    straight, stopped = (read_checkpoint(newest(runs / name)) for name in ("straight", "stopped"))
    assert straight.step == stopped.step > 1
    assert any("running_mean" in name for name in straight.tensors["model"])
    for part, tensors in straight.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(stopped.tensors[part][name], tensor), f"{part} {name}"


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_leaves_a_validation_to_the_next_start(done: Done, runs: Path, mode: str) -> None:
    assert done.codes[f"unscored-{mode}"] == (143, 143), done.said
    saved = read_checkpoint(newest(runs / f"unscored-{mode}"))
    assert (saved.step, saved.state["extra"]["owed_validation"]) == (2, 0)  # type: ignore[index,call-overload]
    results = json.loads((runs / f"unscored-{mode}" / "results.json").read_text(encoding="utf-8"))
    assert (results["status"], results["error"]) == ("stopped", "SIGTERM")


def test_a_run_goes_on_with_any_number_of_ranks(done: Done, runs: Path) -> None:
    starts = [codes for name, codes in done.codes.items() if name.startswith("mixed")]
    assert starts == [(143, 143), (143, 0), (0, 0)], done.said
    assert [read_checkpoint(path).step for path in checkpoints(runs / "mixed")] == [2, 3, 4]
    assert_same_training(runs / "mixed", runs / "one")


def test_a_rank_that_fails_ends_all_with_its_reason(done: Done, runs: Path) -> None:
    assert done.codes["refused"] == (2, 2), done.said
    assert not (runs / "refused").exists()
    assert "rank 1: error: this machine lacks the images" in done.said[1]
    assert done.codes["memory"] == (5, 5), done.said
    results = json.loads((runs / "memory" / "results.json").read_text(encoding="utf-8"))
    assert (results["status"], results["exit_code"]) == ("failed", 5)
    assert results["error"].startswith("rank 1: out of memory")
    assert "of step 2: go on from it with --resume latest" in results["error"]
    assert read_checkpoint(newest(runs / "memory")).step == 2


def test_a_folder_that_rank_0_refuses_ends_all(done: Done) -> None:
    assert done.codes["memory, again"] == (2, 2), done.said
    assert "memory already exists" in done.said[0]


def test_a_rank_that_is_killed_ends_the_others(done: Done, runs: Path) -> None:
    assert done.codes["killed"] == (1, None), done.said
    assert "another rank ended without a word" in done.said[0]
    assert read_checkpoint(newest(runs / "killed")).step == 2
