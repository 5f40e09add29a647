"""A real training run, killed and resumed until its end, against the same run left alone."""

import contextlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil

from scripts.benchmark_training import make_images
from scripts.faults.toy_run import Outcome, same_tensors
from tagger.checkpoint.format import CheckpointError, list_checkpoints, verify_checkpoint
from tagger.checkpoint.store import load_checkpoint, newest_first
from tagger.checkpoint.writer import list_temporaries

ROOT = Path(__file__).resolve().parents[2]
_LONGEST_WAIT_S = 180.0
_CHILDREN_GONE_S = 10.0
_SETTINGS = (
    "vocabulary.min_frequency=1",
    "data.image_size=32",
    "data.val_fraction=0.2",
    "data.num_threads=2",
    "data.num_processes=1",
    "model.preset=vit_tiny",
    "model.patch_size=8",
    "model.embed_dim=64",
    "model.depth=2",
    "model.num_heads=2",
    "model.dropout=0.1",
    "training.device=cpu",
    "training.batch_size=8",
    "checkpoint.every_steps=1",
    "checkpoint.keep_every=25",
    "monitor.tensorboard=false",
    "monitor.sample_images=0",
)
_STEPS_AN_EPOCH = 8


def killed_runs(folder: Path, number: int, seed: int = 0) -> Outcome:
    """Kill a run that often, each time after some progress, resume to its end and compare with an unkilled run."""
    outcome = Outcome("kill -9 of train_direct.py")
    if number == 0:
        return outcome
    folder.mkdir(parents=True)
    make_images(folder / "images", 80)
    epochs = max(3, 2 * number)
    draw = random.Random(seed)
    checkpoints = folder / "runs" / "killed" / "checkpoints"
    children = 0
    for _ in range(number):
        before = _newest_step(checkpoints)
        outcome.trials += 1
        if before >= epochs * _STEPS_AN_EPOCH:
            outcome.violations.append("the run had ended before it could be killed again")
            break
        process = _start(folder, "killed", epochs)
        if not _wait_for_step(process, checkpoints, before + draw.randint(1, 8)):
            outcome.violations.append(f"no progress after step {before}; see {folder}/killed.log")
        else:
            time.sleep(draw.uniform(0.0, 0.2))
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        children += len(family)
        process.kill()
        process.wait()
        outcome.violations += _faults_after(checkpoints, family, before)
    killed, straight = _start(folder, "killed", epochs), _start(folder, "straight", epochs)
    for name, process in (("killed", killed), ("straight", straight)):
        code = process.wait(_LONGEST_WAIT_S)
        if code != 0:
            outcome.violations.append(f"{name} ended with exit code {code}; see {folder}/{name}.log")
    if not outcome.violations:
        outcome.violations += _differences(folder)
        outcome.violations += [f"{path.name} is left" for path in list_temporaries(checkpoints)]
    outcome.facts = {"steps": epochs * _STEPS_AN_EPOCH, "children seen": children}
    return outcome


def _start(folder: Path, name: str, epochs: int) -> "subprocess.Popen[bytes]":
    words = [
        *("--config", str(ROOT / "configs" / "unified_config.yaml"), "--resume", "auto"),
        f"data.roots=[{folder}/images]",
        f"data.index_dir={folder}/index-{name}",
        f"run.output_dir={folder}/runs",
        f"run.name={name}",
        f"training.num_epochs={epochs}",
        *_SETTINGS,
    ]
    log = (folder / f"{name}.log").open("ab")
    with log:
        return subprocess.Popen([sys.executable, "train_direct.py", *words], cwd=ROOT, stdout=log, stderr=log)


def _newest_step(checkpoints: Path) -> int:
    candidates, _ = newest_first(checkpoints)
    return candidates[0][1].step if candidates else 0


def _wait_for_step(process: "subprocess.Popen[bytes]", checkpoints: Path, step: int) -> bool:
    deadline = time.monotonic() + _LONGEST_WAIT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(CheckpointError, OSError):  # one may be deleted while it is read
            if _newest_step(checkpoints) >= step:
                return True
        time.sleep(0.02)
    return False


def _faults_after(checkpoints: Path, family: list[psutil.Process], before: int) -> list[str]:
    wrong = []
    _, alive = psutil.wait_procs(family, timeout=_CHILDREN_GONE_S)
    wrong += [f"a child lives on: {process}" for process in alive]
    for process in alive:
        process.kill()
    for path in list_checkpoints(checkpoints):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            wrong.append(f"unloadable: {error}")
    if _newest_step(checkpoints) < before:
        wrong.append(f"the newest checkpoint is of step {_newest_step(checkpoints)}, before it was {before}")
    stray = list_temporaries(checkpoints)
    if len(stray) > 1:
        wrong.append(f"{len(stray)} stray temporaries")
    return wrong


def _differences(folder: Path) -> list[str]:
    """What the killed run ended with that is not bitwise the straight one's."""
    killed, straight = (
        load_checkpoint(folder / "runs" / name / "checkpoints", "latest") for name in ("killed", "straight")
    )
    if killed is None or straight is None:
        return ["a run has no checkpoint"]
    if killed.step != straight.step:
        return [f"the killed run ended at step {killed.step}, the straight one at {straight.step}"]
    difference = same_tensors(killed, straight)
    scores = [
        json.loads((folder / "runs" / name / "results.json").read_text(encoding="utf-8"))
        for name in ("killed", "straight")
    ]
    wrong = [] if difference is None else [f"{difference} is not bitwise that of the run left alone"]
    for key in ("status", "final", "best", "steps"):
        if scores[0][key] != scores[1][key]:
            wrong.append(f"results.json: {key} is {scores[0][key]}, of the run left alone {scores[1][key]}")
    return wrong
