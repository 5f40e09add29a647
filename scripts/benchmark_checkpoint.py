"""How long a save holds training up, against a plain copy of the same state in memory, in turn in one process.

Three cases: the writer is idle, as in most runs; it is writing the save before; the disk has stopped altogether. The
plain copy goes into memory that was touched before. Nothing is compared with a clock of another run.
"""

import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from Configuration_System import OptimizerSection
from tagger.checkpoint.format import Tensors
from tagger.checkpoint.retention import SavePolicy
from tagger.checkpoint.saver import CheckpointSaver
from tagger.checkpoint.store import CheckpointStore
from tagger.command import command
from tagger.files import write_json
from tagger.options import Parser, input_folder, output_file, whole
from training_utils import ExponentialMovingAverage, MixedPrecisionTrainer, TrainState, create_optimizer

WIDTH = 640
BYTES_A_WEIGHT = 16  # weight, average and AdamW's two, float32


class StoppableStore(CheckpointStore):
    """A store whose disk can be stopped; or one that takes everything at once and keeps nothing."""

    def __init__(self, folder: Path, writes: bool) -> None:
        super().__init__(folder, SavePolicy(1), "val/mAP")
        self.running = threading.Event()
        self.running.set()
        self._writes = writes

    def commit(self, step: int, tensors: Mapping[str, Tensors], state: bytes, value: float | None = None) -> Path:
        """As the store's own, once the disk runs."""
        self.running.wait()
        return super().commit(step, tensors, state, value) if self._writes else self.folder


def make_state(megabytes: int) -> TrainState:
    """Blocks of square matrices, AdamW after its first update, and EMA: that many MB (10^6 bytes) in all."""
    blocks = max(1, round(megabytes * 1e6 / BYTES_A_WEIGHT / (WIDTH * WIDTH + WIDTH)))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(blocks)))
    state = TrainState(
        model,
        create_optimizer(OptimizerSection(), model),
        MixedPrecisionTrainer("off", torch.device("cpu")),
        ema=ExponentialMovingAverage(model, 0.999),
    )
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return state


class PlainCopy:
    """The state copied tensor by tensor into memory that is there already."""

    def __init__(self, state: TrainState) -> None:
        tensors, _ = state.snapshot_parts()
        self._live = [tensor.detach() for part in tensors.values() for tensor in part.values()]
        self._copies = [torch.zeros_like(tensor).fill_(0) for tensor in self._live]
        self.num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in self._live)

    def seconds(self) -> float:
        """Time of one copy."""
        started = time.perf_counter()
        for copy, tensor in zip(self._copies, self._live, strict=True):
            copy.copy_(tensor)
        return time.perf_counter() - started


def save_seconds(saver: CheckpointSaver, state: TrainState) -> float:
    """Time for which one save holds training up."""
    started = time.perf_counter()
    tensors, values = state.snapshot_parts()
    saver.submit(state.step, state.seconds, tensors, values)
    return time.perf_counter() - started


def first_save(folder: Path, state: TrainState, plain: PlainCopy, *, reserve: bool) -> tuple[float, float]:
    """The first save of a process and a copy beside it, with its memory reserved before or not."""
    with CheckpointSaver(StoppableStore(folder, writes=False)) as saver:
        if reserve:
            saver.reserve_memory(state.stand_ins())
        return save_seconds(saver, state), plain.seconds()


def repeated(folder: Path, state: TrainState, plain: PlainCopy, rounds: int, case: str) -> list[tuple[float, float]]:
    """Times of (save, plain copy) in turn, in one of the three cases."""
    store = StoppableStore(folder, writes=case == "writing")
    times = []
    with CheckpointSaver(store) as saver:
        saver.reserve_memory(state.stand_ins())
        if case != "idle":
            if case == "stopped":
                store.running.clear()
            save_seconds(saver, state)
        for _ in range(rounds):
            state.step += 1
            times.append((save_seconds(saver, state), plain.seconds()))
            if case == "idle":
                saver.flush()
        store.running.set()
    return times


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints the ratios, and 1 where a median is above 1.3."""
    parser = Parser(
        description="Measure how long a save holds training up against a plain memory copy of the state.",
        epilog="example: python -m scripts.benchmark_checkpoint --megabytes 500",
    )
    parser.add_argument("--megabytes", type=whole(), default=500, help="size of the state (default: 500)")
    parser.add_argument("--rounds", type=whole(), default=11, help="pairs of each case (default: 11)")
    parser.add_argument("--folder", type=input_folder, help="where to write (default: a temporary folder)")
    parser.add_argument("--output", type=output_file, metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args(arguments)
    console = Console()
    state = make_state(options.megabytes)
    plain = PlainCopy(state)
    plain.seconds()
    pairs: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        firsts = min(options.rounds, 5)
        for reserve in (False, True):
            name = f"first save, memory {'reserved' if reserve else 'not reserved'}"
            pairs[name] = [first_save(folder / "first", state, plain, reserve=reserve) for _ in range(firsts)]
        for case in ("idle", "writing", "stopped"):
            pairs[f"writer {case}"] = repeated(folder / case, state, plain, options.rounds, case)
    ratios = {name: statistics.median(save / copy for save, copy in times) for name, times in pairs.items()}
    table = Table("case", "save ms", "copy ms", "ratio", "highest", title=f"{plain.num_bytes / 1e6:.0f} MB of state")
    for name, times in pairs.items():
        medians = [f"{1000 * statistics.median(column):.1f}" for column in zip(*times, strict=True)]
        highest = max(save / copy for save, copy in times)
        table.add_row(name, *medians, f"{ratios[name]:.2f}", f"{highest:.2f}")
    console.print(table)
    if options.output is not None:
        figures = {"num_bytes": plain.num_bytes, "ratios": ratios, "seconds_save_and_copy": pairs}
        write_json(options.output, {"format_version": 1, **figures})
    return 1 if any(ratio > 1.3 for name, ratio in ratios.items() if "not reserved" not in name) else 0


if __name__ == "__main__":
    sys.exit(main())
