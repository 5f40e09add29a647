"""What a GPU makes of training: every part against the ceiling of the card it runs on, in one command of a few minutes.

Ceilings, attention by backend, the loss, whole steps beside timm's, aspect buckets, the optimizers, a save's stall, the
loader and an evaluation. With --cpu the same code measures small stand-ins, and what can be counted in place of timed:
saved bytes, operators, host reads, token fill. A section that fails is named, and the others go on; the JSON is written
after each.
"""

import dataclasses
import importlib.metadata
import importlib.util
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console

from scripts.figures import Figure, figures_table
from scripts.gpu_bench.bench import CPU_SCALE, GPU_SCALE, Bench, Scale, Section
from scripts.gpu_bench.evaluation import evaluation
from scripts.gpu_bench.feeding import loader
from scripts.gpu_bench.kernels import attention, ceilings
from scripts.gpu_bench.layouts import layouts
from scripts.gpu_bench.loss import asymmetric_loss
from scripts.gpu_bench.steps import train_steps
from scripts.gpu_bench.updates import checkpoint_stall, optimizers
from tagger.command import command
from tagger.errors import InputError
from tagger.files import write_json
from tagger.options import Parser, number, output_file

# Short ones first; the long ones in the order of their worth, should the time run out. The last two use what the steps
# have measured.
SECTIONS: dict[str, Section] = {
    "ceilings": ceilings,
    "loss": asymmetric_loss,
    "optimizers": optimizers,
    "attention": attention,
    "checkpoint": checkpoint_stall,
    "evaluation": evaluation,
    "steps": train_steps,
    "layouts": layouts,
    "loader": loader,
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a section measured, how long it took, and why it broke off; None where it did not."""

    figures: list[Figure]
    seconds: float
    failure: str | None


class SectionError(Exception):
    """Any error of a section, in a line."""


def run_section(section: Section, bench: Bench) -> Outcome:
    """Measure, keeping what was measured before a failure; whatever it is, the next section may still be measured."""
    figures: list[Figure] = []
    started, failure = time.perf_counter(), None
    for part in (lambda: figures.extend(section(bench)), bench.release):
        try:
            _run(part)
        except SectionError as error:  # a fault of the device comes back as memory is given back: the first one counts
            failure = failure or str(error)
    return Outcome(figures, time.perf_counter() - started, failure)


def _run(part: Callable[[], None]) -> None:
    try:
        part()
    except Exception as error:
        raise SectionError(_in_a_line(error)) from error


def _in_a_line(error: Exception) -> str:
    """The last line of its traceback (of a longer message the first line), and where it was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return f"{what} ({Path(place.filename).name}, line {place.lineno})"


def describe_machine(device: torch.device) -> dict[str, str | None]:
    """What the figures depend on."""
    timm = importlib.metadata.version("timm") if importlib.util.find_spec("timm") else None
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": card,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "timm": timm,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def measure(bench: Bench, names: Sequence[str], console: Console) -> Iterator[tuple[str, Outcome]]:
    """Run sections one after the other, with a table after each."""
    for name in names:
        outcome = run_section(SECTIONS[name], bench)
        console.print(figures_table(outcome.figures, f"{name}, {outcome.seconds:.0f} s"))
        if outcome.failure is not None:
            console.print(f"{name} broke off: {outcome.failure}", style="red", markup=False)
        yield name, outcome


def as_json(outcome: Outcome) -> dict[str, object]:
    """What is written of a section."""
    figures = [{**dataclasses.asdict(each), "reached": each.reached} for each in outcome.figures]
    return {"seconds": outcome.seconds, "failure": outcome.failure, "figures": figures}


@command()
def main(arguments: Sequence[str] | None = None, scale: Scale | None = None) -> int:
    """The command: 1 where a section broke off, whatever the goals say."""
    parser = Parser(
        description="Measure training on this machine's GPU against its own ceilings.",
        epilog="example: python -m scripts.benchmark_gpu --output gpu.json",
    )
    parser.add_argument("--cpu", action="store_true", help="small shapes on the CPU, with the counts that need no GPU")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    parser.add_argument("--minutes", type=number(), default=6.5, help="no measurement begins later (default: 6.5)")
    parser.add_argument("--output", type=output_file, metavar="FILE", help="write the figures and every round as JSON")
    options = parser.parse_args(arguments)
    if not options.cpu and not torch.cuda.is_available():
        raise InputError(f"torch {torch.__version__} finds no CUDA device; use --cpu for the stand-ins")
    device = torch.device("cpu" if options.cpu else "cuda")
    bench = Bench(device, scale or (CPU_SCALE if options.cpu else GPU_SCALE), 60 * options.minutes)
    machine = describe_machine(device)
    console = Console(width=140)
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), markup=False)
    found: dict[str, Outcome] = {}
    for name, outcome in measure(bench, options.sections, console):
        found[name] = outcome
        if options.output is not None:
            # After each, so that what ends the process leaves what was measured before.
            sections = {each: as_json(measured) for each, measured in found.items()}
            write_json(options.output, {"format_version": 1, "machine": machine, "sections": sections})
    return int(any(outcome.failure is not None for outcome in found.values()))


if __name__ == "__main__":
    sys.exit(main())
