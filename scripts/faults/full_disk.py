"""A disk that runs full while a run saves: a small tmpfs of our own, mounted without root in a user namespace."""

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from scripts.faults.toy_run import METRIC, Outcome, fault_of, set_step, toy_state
from tagger.checkpoint import writer
from training_utils import CheckpointManager, TrainState

_DISK = "24m"
_LONGEST_SAVE_S = 60.0


def reason_to_skip() -> str | None:
    """Why no file system of our own can be mounted here; None where one can."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return "no `unshare` on this system"
    tried = subprocess.run(
        ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /tmp"],
        capture_output=True,
        text=True,
        check=False,
    )
    return None if tried.returncode == 0 else f"user namespaces are not permitted ({tried.stderr.strip()})"


def full_disks(folder: Path, number: int) -> Outcome:
    """Let a disk of 24 MB run full at that many offsets within a checkpoint; see `_trial` for what must hold."""
    reason = reason_to_skip()
    if reason is not None:
        return Outcome("full disk", skipped=reason)
    folder.mkdir(parents=True)
    inner = f'mount -t tmpfs -o size={_DISK} tmpfs "$1" && exec "$2" -m scripts.faults.full_disk "$1" "$3"'
    root = Path(__file__).resolve().parents[2]
    words = ["unshare", "-rm", "sh", "-c", inner, "sh", str(folder), sys.executable, str(number)]
    done = subprocess.run(words, cwd=root, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the trials ended with exit code {done.returncode}; the error is above")
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def run_on(disk: Path, number: int) -> Outcome:
    """The trials themselves, on a file system of their own."""
    outcome = Outcome("full disk")
    writer.PATIENCE_S = 0.0  # a save that should succeed and does not is a violation, not one to wait for
    torch.set_num_threads(1)
    state = toy_state()
    folder = disk / "checkpoints"
    with CheckpointManager(folder, 2, METRIC) as manager:
        for step in (1, 2):
            set_step(state, step)
            manager.save(state, {METRIC: step / 1000}, wait=True)
        size = _blocks(next(folder.glob("step-*")))
        for trial in range(number):
            room = size * trial // number
            found = _trial(disk, manager, state, room)
            outcome.trials += 1
            outcome.violations += [f"{room} bytes left: {each}" for each in found]
    outcome.facts = {"bytes of a checkpoint": size, "failures told": manager.num_failures}
    return outcome


def _trial(disk: Path, manager: CheckpointManager, state: TrainState, room: int) -> list[str]:
    """Fill the disk up to `room` bytes and save; then give space back and save again."""
    wrong = []
    folder = disk / "checkpoints"
    before = _digests(folder)
    filler = disk / "filler"
    _fill(filler, room)
    first = state.step + 1
    set_step(state, first)
    manager.save(state, {METRIC: first / 1000})  # must not raise: training goes on
    deadline = time.monotonic() + _LONGEST_SAVE_S
    while not (told := manager.poll()) and time.monotonic() < deadline:
        time.sleep(0.001)
    set_step(state, first + 1)  # the next step
    if [failure.step for failure in told] != [first]:
        wrong.append(f"told after one step: {[str(failure) for failure in told]}")
    for failure in told:
        if not isinstance(failure.error, OSError) or failure.error.errno != errno.ENOSPC:
            wrong.append(f"the failure is {failure.error!r}")
    if _digests(folder) != before:
        wrong.append("what was there has changed")
    filler.unlink()
    manager.save(state, {METRIC: state.step / 1000}, wait=True)
    wrong += [f"with space again: {failure}" for failure in manager.poll()]
    for which in ("latest", "best"):
        loaded = manager.load(which)
        if loaded is None or loaded.step != state.step or fault_of(loaded) is not None:
            wrong.append(f"{which} is not step {state.step} after space returned")
    return wrong


def _fill(path: Path, room: int) -> None:
    free = os.statvfs(path.parent)
    with path.open("wb") as stream:
        stream.write(bytes(max(0, free.f_bavail * free.f_frsize - room)))


def _blocks(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of every file by its path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    logging.getLogger("tagger").setLevel(logging.CRITICAL)  # every trial is an error, told by the table
    print(json.dumps(asdict(run_on(Path(sys.argv[1]), int(sys.argv[2])))))
