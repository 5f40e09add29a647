"""Whether a run can lose work: real kills, damaged files and full disks, and what is left after each.

What must hold: no checkpoint is unloadable, the newest is never behind what was acknowledged, at most one temporary is
left and the next start removes it, damage is always noticed and the checkpoint before used, a full disk stops nothing.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scripts.faults.full_disk import full_disks
from scripts.faults.kills import kills_at_points, random_kills
from scripts.faults.mutations import mutations
from scripts.faults.real_run import killed_runs
from scripts.faults.toy_run import Outcome
from tagger.command import command
from tagger.files import write_json
from tagger.options import Parser, input_folder, output_file, whole

QUICK = {"kills": 10, "points": 0, "train": 0, "mutations": 60, "offsets": 5}
_SHOWN = 10


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command: a table, and 1 where anything did not hold."""
    parser = Parser(
        description="Kill, damage and fill up what a run saves, and check what is left. Takes some minutes.",
        epilog="example: nice -n 19 python -m scripts.crash_test --kills 200; a 0 leaves a part out",
    )
    numbers: dict[str, tuple[int, str]] = {
        "kills": (200, "kills of a saving process at random moments"),
        "points": (5, "kills at each file operation of the writer"),
        "train": (10, "kills of a real training run"),
        "mutations": (500, "damaged checkpoints"),
        "offsets": (20, "places within a checkpoint at which a disk is full"),
    }
    for name, (number, meaning) in numbers.items():
        parser.add_argument(f"--{name}", type=whole(0), metavar="N", help=f"{meaning} (default: {number})")
    parser.add_argument("--quick", action="store_true", help=f"a sample: {QUICK}")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the random moments and places (default: 0)")
    parser.add_argument(
        "--folder", type=input_folder, help="where to write (default: a temporary folder, removed afterwards)"
    )
    parser.add_argument("--output", type=output_file, metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args(arguments)
    chosen = {
        name: given if (given := vars(options)[name]) is not None else QUICK[name] if options.quick else default
        for name, (default, _) in numbers.items()
    }
    console = Console()
    with tempfile.TemporaryDirectory(prefix="crash-test-", dir=options.folder) as scratch:
        folder = Path(scratch)
        parts: dict[str, Callable[[int], Outcome]] = {
            "kills": lambda number: random_kills(folder / "kills", number, options.seed),
            "points": lambda number: kills_at_points(folder / "points", number),
            "train": lambda number: killed_runs(folder / "train", number, options.seed),
            "mutations": lambda number: mutations(folder / "mutations", number, options.seed),
            "offsets": lambda number: full_disks(folder / "disk", number),
        }
        outcomes = []
        for name, part in parts.items():
            if chosen[name] > 0:
                console.print(f"{name}: {chosen[name]} ...")
                started = time.perf_counter()
                outcome = part(chosen[name])
                outcome.facts["seconds"] = round(time.perf_counter() - started, 1)
                outcomes.append(outcome)
    return report(console, outcomes, options.output)


def report(console: Console, outcomes: Sequence[Outcome], output: Path | None) -> int:
    """Print the table and what did not hold; returns the exit code."""
    table = Table("what", "trials", "violations", "facts", title="crash test")
    for outcome in outcomes:
        facts = ", ".join(f"{key} {value}" for key, value in outcome.facts.items())
        table.add_row(outcome.name, str(outcome.trials), str(len(outcome.violations)), facts)
    console.print(table)
    for outcome in outcomes:
        if outcome.skipped is not None:
            console.print(f"SKIPPED: {outcome.name}: {outcome.skipped}", style="bold yellow", markup=False)
        for violation in outcome.violations[:_SHOWN]:
            console.print(f"VIOLATION: {outcome.name}: {violation}", style="bold red", markup=False)
    if output is not None:
        write_json(output, {"format_version": 1, "parts": [vars(outcome) for outcome in outcomes]})
    return 1 if any(outcome.violations for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
