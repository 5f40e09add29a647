"""Whether a run of your own configuration, stopped and resumed, becomes bitwise the run that was never stopped.

Trains N steps straight, then again with stops at random steps, each leg in a process of its own, and compares the order
of images and every tensor and number of the final state. Writes nothing outside a temporary folder.
"""

import multiprocessing
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import start_up
import train_direct
from Configuration_System import check_paths, load_config
from tagger.checkpoint.format import LoadedCheckpoint
from tagger.checkpoint.store import load_checkpoint
from tagger.command import command, held_back
from tagger.data.windows import Window
from tagger.errors import InputError
from tagger.files import read_json, write_json
from tagger.logs import log_to_console
from tagger.options import Parser, whole
from tagger.run_folder import RunFolder
from tagger.stop import SIGNALS, StopRequest

FORMAT_VERSION = 1
# Differ between two runs of the same steps, and say nothing about what was learnt.
_TIMES = {"seconds", "waited_s"}


@dataclass(frozen=True)
class Leg:
    """One process's part of a run: from where the folder stands to `stop_at` updates; rows go to `ledger`."""

    config: Path
    overrides: tuple[str, ...]
    stop_at: int
    ledger: Path


class StopAt(StopRequest):
    """Asks a loop to stop once its state has made a number of updates."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step
        self.parts: start_up.Parts | None = None

    @property
    def requested(self) -> bool:
        """True at the step, or when a signal asked."""
        return super().requested or (self.parts is not None and self.parts.state.step >= self._step)


def train_leg(leg: Leg) -> None:
    """Run one leg in this process and write the rows of each of its updates to its ledger."""
    log_to_console()
    config = load_config(leg.config, leg.overrides)
    rows: dict[int, list[int]] = {}
    inner = train_direct.train_step

    def recording(parts: start_up.Parts, window: Window) -> tuple[Tensor, Tensor, Tensor]:
        rows[parts.state.step] = [int(row) for batch in window.batches for row in batch.row_ids]
        return inner(parts, window)

    train_direct.train_step = recording
    resuming = config.checkpoint.resume != "none"
    with StopAt(leg.stop_at) as stop, RunFolder.open(config.run.folder, resume=resuming) as folder:
        stop.parts = start_up.build(config, folder, stop)
        with stop.parts.monitor, stop.parts.manager:
            train_direct.train(stop.parts)
        done = stop.parts.state.step
    write_json(
        leg.ledger, {"format_version": FORMAT_VERSION, "rows": {str(k): v for k, v in rows.items()}, "done": done}
    )


def run_legs(
    config: Path, overrides: Sequence[str], folder: Path, name: str, stops: Sequence[int]
) -> dict[int, list[int]]:
    """Train to each of `stops` in turn, a fresh process each; returns the rows of every update."""
    context = multiprocessing.get_context("spawn")
    ledger: dict[int, list[int]] = {}
    for number, stop_at in enumerate(stops):
        words = (
            *overrides,
            f"run.output_dir={folder}",
            f"run.name={name}",
            f"checkpoint.resume={'latest' if number else 'none'}",
            "monitor.wandb=false",
        )
        leg = Leg(config, words, stop_at, folder / f"{name}-{number}.json")
        process = context.Process(target=train_leg, args=(leg,))
        with held_back(*SIGNALS):  # a terminal's Ctrl-C is for this process, which then ends the leg
            process.start()
        try:
            process.join()
        finally:
            process.kill()
            process.join()
        if process.exitcode:
            raise InputError(f"the leg to step {stop_at} ended with exit code {process.exitcode}; see above")
        content = read_json(leg.ledger, "ledger", FORMAT_VERSION)
        ledger |= {int(step): rows for step, rows in content["rows"].items()}
        if content["done"] < stop_at:
            raise InputError(f"the run ends at step {content['done']}, before step {stop_at}; ask for fewer --steps")
    return ledger


def first_difference(
    straight: LoadedCheckpoint, resumed: LoadedCheckpoint, rows: tuple[dict[int, list[int]], dict[int, list[int]]]
) -> tuple[str, str] | None:
    """(part, detail) of what differs first, causes before effects; None where nothing does."""
    for step in sorted(rows[0].keys() | rows[1].keys()):
        if rows[0].get(step) != rows[1].get(step):
            return "order of images", f"at update {step + 1}"
    for part in ("rng", "model", "optimizer", "ema"):
        ours, theirs = straight.tensors.get(part, {}), resumed.tensors.get(part, {})
        for name in sorted(ours.keys() | theirs.keys()):
            if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name]):
                return part, name
    return _first_value(straight.state, resumed.state, "state")


def _first_value(ours: object, theirs: object, place: str) -> tuple[str, str] | None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            if key in _TIMES:
                continue
            found = _first_value(ours.get(key), theirs.get(key), f"{place}.{key}")
            if found is not None:
                return found
        return None
    return None if ours == theirs else ("counters", f"{place}: {ours} straight, {theirs} resumed")


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command: exit 0 where everything is equal, 1 where something differs, 2 for bad input."""
    parser = Parser(
        description="Check that your configuration resumes exactly: same images, weights and counters, bit for bit.",
        epilog="example: python -m scripts.verify_resume --config configs/demo.yaml --steps 20 --stops 2",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="a recipe, e.g. configs/demo.yaml")
    parser.add_argument("--steps", type=whole(2), default=30, help="updates of the straight run (default: %(default)s)")
    parser.add_argument(
        "--stops", type=whole(), default=2, help="how often the other run is stopped (default: %(default)s)"
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="draws the steps of the stops (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, over those of the file")
    options = parser.parse_intermixed_args(arguments)
    if options.stops >= options.steps:
        parser.error(f"--stops {options.stops} is not below --steps {options.steps}")
    stops = sorted(random.Random(options.seed).sample(range(1, options.steps), options.stops))
    console = Console()
    check_paths(load_config(options.config, options.overrides))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        args = (options.config, options.overrides, folder)
        rows = run_legs(*args, "straight", [options.steps]), run_legs(*args, "resumed", [*stops, options.steps])
        states = [load_checkpoint(folder / name / "checkpoints", "latest") for name in ("straight", "resumed")]
        straight, resumed = (state for state in states if state is not None)
        difference = first_difference(straight, resumed, rows)
    table = Table("run", "stopped at", "updates", title="the same steps, straight and resumed")
    table.add_row("straight", "-", str(options.steps))
    table.add_row("resumed", ", ".join(map(str, stops)), str(options.steps))
    console.print(table)
    if difference is not None:
        console.print(f"differs: {difference[0]} first ({difference[1]})")
        return 1
    tensors = sum(len(part) for part in straight.tensors.values())
    console.print(f"equal: images of {options.steps} updates, {tensors} tensors bit for bit, and every counter")
    return 0


if __name__ == "__main__":
    sys.exit(main())
