"""What follows a backward pass: optimizer, clip and average against the bytes they must move, and a save's stall."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from Configuration_System import OptimizerSection
from model_architecture import create_model
from scripts.benchmark_checkpoint import PlainCopy, StoppableStore, save_seconds
from scripts.figures import Figure, figure
from scripts.gpu_bench.bench import Bench, ratios
from scripts.gpu_bench.steps import CLIP, DECAY
from tagger.checkpoint.room import tensor_bytes
from tagger.checkpoint.saver import CheckpointSaver
from training_utils import OPTIMIZERS, ExponentialMovingAverage, MixedPrecisionTrainer, TrainState, create_optimizer

# float32: the norm reads gradients (4); AdamW reads weight, gradient and two moments and writes all but the gradient
# (28); the average reads weight and average and writes the average (12).
_FLOOR_BYTES = 44


def make_state(bench: Bench, optimizer: str) -> TrainState:
    """A model on the device after its first update, with gradients in place."""
    model = create_model(bench.scale.update_model, bench.scale.num_tags, 224).to(bench.device)
    state = TrainState(
        model,
        create_optimizer(OptimizerSection(name=optimizer), model),  # type: ignore[arg-type]
        MixedPrecisionTrainer("auto", bench.device),
        ema=ExponentialMovingAverage(model, DECAY),
    )
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    update(state)
    return state


def update(state: TrainState) -> None:
    """All that the training loop does between two backward passes."""
    assert state.ema is not None
    state.precision.step(state.optimizer, tuple(state.model.parameters()), CLIP)
    state.ema.update()


def optimizers(bench: Bench) -> Iterator[Figure]:
    """Every optimizer with clip and average: time against AdamW's byte floor."""
    for name in OPTIMIZERS.names():
        bench.check_time()
        state = make_state(bench, name)
        millions = sum(parameter.numel() for parameter in state.model.parameters()) / 1e6
        works: dict[str, Callable[[], object]] = {"update": lambda state=state: update(state)}  # type: ignore[misc]
        times = bench.kernels_in_turn({**works, "copy": bench.copy})
        floors = ratios(times["update"], bench.copy_seconds(times, _FLOOR_BYTES * millions * 1e6))
        # Muon's products are no matter of bytes, and fewer moments need fewer of them.
        goal = 1.3 if name == "adamw" and bench.on_gpu else None
        title = f"{name} + clip + EMA, {millions:.0f} M parameters"
        yield figure(f"{title}: time / AdamW's byte floor", floors, goal, lower_is_better=True)
        kept = sum(t.numel() * t.element_size() for s in state.optimizer.state.values() for t in s.values())
        yield Figure(f"{name}: optimizer state a parameter", kept / millions / 1e6, unit="bytes")
        del state, works
        bench.release()


def checkpoint_stall(bench: Bench) -> Iterator[Figure]:
    """How long a save of a whole state holds training up while the writer is idle."""
    bench.check_time()
    state = make_state(bench, "adamw")
    # What a copy from device to host takes is no measure of a save that does not wait for it.
    plain = None if bench.on_gpu else PlainCopy(state)
    stalls, copies = [], []
    with (
        tempfile.TemporaryDirectory() as scratch,
        CheckpointSaver(StoppableStore(Path(scratch), writes=False)) as saver,
    ):
        saver.reserve_memory(state.stand_ins())
        for _ in range(bench.scale.rounds + 1):
            bench.check_time()
            state.step += 1
            bench.now()
            stalls.append(save_seconds(saver, state))
            if plain is not None:
                copies.append(plain.seconds())
            saver.flush()
    name = f"save, {tensor_bytes(state.snapshot_parts()[0]) / 1e9:.2g} GB of state"
    goal = 5.0 if bench.on_gpu else None
    yield figure(f"{name}: stall", [1000 * s for s in stalls[1:]], goal, lower_is_better=True, unit="ms")
    if plain is not None:
        yield figure(f"{name}: stall / plain copy", ratios(stalls[1:], copies[1:]))
