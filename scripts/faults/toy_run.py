"""A run whose state at every step is known in advance, and the check of what such a run has left on disk."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor, nn

from Configuration_System import OptimizerSection
from tagger.checkpoint.format import CheckpointError, LoadedCheckpoint, list_checkpoints, read_checkpoint
from tagger.checkpoint.retention import SavePolicy
from tagger.checkpoint.store import CheckpointStore, find_best, newest_first
from tagger.checkpoint.writer import list_temporaries
from training_utils import (
    CheckpointManager,
    ExponentialMovingAverage,
    MixedPrecisionTrainer,
    TrainState,
    create_optimizer,
)

METRIC = "val/mAP"
KEEP_EVERY = 40
_ACKNOWLEDGED = Struct("<cqd")  # b"A", the newest step known to be on disk, and the best score there
_LONGEST_WAIT_S = 120.0


@dataclass
class Outcome:
    """Trials of one kind: how many, what was wrong, and facts for people."""

    name: str
    trials: int = 0
    violations: list[str] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)
    skipped: str | None = None


def toy_state(width: int = 128) -> TrainState:
    """A model of `width`^2 weights with AdamW and EMA: about 16 bytes a weight in all."""
    model = nn.Linear(width, width)
    state = TrainState(
        model,
        create_optimizer(OptimizerSection(), model),
        MixedPrecisionTrainer("off", torch.device("cpu")),
        ema=ExponentialMovingAverage(model, 0.9),
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()  # makes its state
    return state


def set_step(state: TrainState, step: int) -> None:
    """Become the known state of a step: every number of every tensor is the step's own."""
    state.step, state.samples_seen, state.position = step, 7 * step, {"batch": step}
    tensors, _ = state.snapshot_parts()
    with torch.no_grad():
        for part in ("model", "ema", "optimizer"):
            for tensor in tensors[part].values():
                tensor.fill_(step)


def score_of(step: int) -> float:
    """A score without a trend, so that some steps are the best so far and most are not."""
    return math.sin(step * 12.9898) * 0.5 + 0.5


def fault_of(loaded: LoadedCheckpoint) -> str | None:
    """What a loaded checkpoint holds that is not the state of its step."""
    step = loaded.step
    for part in ("model", "ema", "optimizer"):
        for name, tensor in loaded.tensors[part].items():
            if not bool((tensor == step).all()):
                return f"{part} {name} is not that of step {step}"
    found = (loaded.state["step"], loaded.state["samples_seen"], loaded.state["position"])
    return None if found == (step, 7 * step, {"batch": step}) else f"state.json is {found} at step {step}"


def audit(folder: Path, acknowledged: tuple[int, float] | None, keep_every: int | None = KEEP_EVERY) -> list[str]:
    """Violations in a folder after a kill: unloadable, behind what was acknowledged, more than one stray."""
    wrong = []
    steps = set()
    for path in list_checkpoints(folder):
        try:
            loaded = read_checkpoint(path)
        except CheckpointError as error:
            wrong.append(f"unloadable: {error}")
            continue
        steps.add(loaded.step)
        fault = fault_of(loaded)
        if fault is not None:
            wrong.append(f"{path.name}: {fault}")
    candidates, _ = newest_first(folder)
    best = find_best(folder, candidates)
    if acknowledged is not None:
        step, best_score = acknowledged
        newest = candidates[0][1].step if candidates else 0  # a child that has saved nothing says 0
        if newest < step:
            wrong.append(f"the newest checkpoint is of step {newest}, acknowledged was {step}")
        if not math.isnan(best_score) and (best is None or best.value < best_score):
            wrong.append(f"the best checkpoint is {best}, acknowledged was {best_score}")
        history = set() if keep_every is None else set(range(keep_every, step + 1, keep_every))
        if not history <= steps:
            wrong.append(f"history lacks the steps {sorted(history - steps)}")
    if best is not None and (folder / best.checkpoint) not in list_checkpoints(folder):
        wrong.append(f"best.json names {best.checkpoint}, which is not there")
    stray = list_temporaries(folder)
    if len(stray) > 1:
        wrong.append(f"{len(stray)} stray temporaries: {', '.join(path.name for path in stray)}")
    return wrong


def audit_next_start(folder: Path) -> list[str]:
    """Violations of the start that follows: a temporary that is still there."""
    CheckpointStore(folder, SavePolicy(), METRIC)
    return [f"{path.name} survives a start" for path in list_temporaries(folder)]


def save_until_killed(
    folder: Path,
    connection: Connection,
    *,
    keep_last: int = 2,
    wait: bool = False,
    most_saves: int | None = None,
    score: Callable[[int], float] = score_of,
    prepare: Callable[[], None] | None = None,
) -> None:
    """The child: goes on from the newest checkpoint, saves at every step and tells what is known to be on disk.

    With `wait` each save is waited for. `prepare` is called before the manager is made, which cleans the folder. No
    more saves of `keep_every` are under way than the manager holds, as in a run whose disk keeps up with them, so that
    all of them must be found.
    """
    torch.set_num_threads(1)
    state = toy_state()
    if prepare is not None:
        prepare()
    manager = CheckpointManager(folder, keep_last, METRIC, keep_every=KEEP_EVERY)
    loaded = manager.load()
    step = told = first = 0 if loaded is None else loaded.step
    connection.send_bytes(_ACKNOWLEDGED.pack(b"A", step, math.nan))
    saves = 0
    while most_saves is None or saves < most_saves:
        step, saves = step + 1, saves + 1
        set_step(state, step)
        while step % KEEP_EVERY == 0 and (manager.saved_step or first) < step - KEEP_EVERY and not manager.num_failures:
            time.sleep(0.001)
        manager.save(state, {METRIC: score(step)}, wait=wait)
        saved, best = manager.saved_step, manager.best
        if saved is not None and saved > told:
            told = saved
            connection.send_bytes(_ACKNOWLEDGED.pack(b"A", saved, math.nan if best is None else best.value))
        for failure in manager.poll():
            raise RuntimeError(str(failure))
    manager.close()


def receive(connection: Connection) -> tuple[int, float] | str | None:
    """The next message of the child: an acknowledgement or a name; None when it is gone.

    A message that a kill has cut short counts as not sent. Raises TimeoutError after two minutes of silence.
    """
    if not connection.poll(_LONGEST_WAIT_S):
        raise TimeoutError(f"the child has said nothing for {_LONGEST_WAIT_S:.0f} s")
    try:
        message = connection.recv_bytes()
    except (EOFError, OSError):
        return None
    if message[:1] != b"A":
        return message[1:].decode()
    _, step, best = _ACKNOWLEDGED.unpack(message)
    return step, best


def send_name(connection: Connection, name: str) -> None:
    """The child's other kind of message."""
    connection.send_bytes(b"N" + name.encode())


def same_tensors(first: LoadedCheckpoint, second: LoadedCheckpoint) -> str | None:
    """Name of the first tensor that differs in any bit."""
    for part in sorted(first.tensors.keys() | second.tensors.keys()):
        one, other = first.tensors.get(part, {}), second.tensors.get(part, {})
        for name in sorted(one.keys() | other.keys()):
            if name not in one or name not in other or not _equal(one[name], other[name]):
                return f"{part} {name}"
    return None


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
