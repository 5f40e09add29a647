"""What a Weights & Biases that never answers costs the training thread: a share of a small model's step, in one run."""

import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from tagger.command import command
from tagger.errors import SinkError
from tagger.options import Parser, whole
from tagger.wandb_sink import WandbSink

# Stands in for the package: it begins and never comes back.
_STUCK = "import time\nSettings = dict\ndef init(**_):\n    time.sleep(10**6)\n"
_LIMIT = 0.01


def measure(entries: int, every: int) -> tuple[float, float, int]:
    """(median seconds of a step, median seconds of reporting one, entries refused), taken by turns."""
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8)))
    images = torch.randn(256, 512)
    steps, reports, refused = [], [], 0
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "wandb.py").write_text(_STUCK, encoding="utf-8")
        sys.path.insert(0, scratch)  # where the sink's process looks too
        try:
            sink = WandbSink(
                Path(scratch), project="benchmark", run_name="stuck", mode="offline", settings={}, close_s=0.1
            )
        finally:
            sys.path.remove(scratch)
        scalars = {f"train/value{number}": 0.5 for number in range(20)}

        def report(step: int) -> None:
            nonlocal refused
            try:
                sink.write_scalars(scalars, step, 0, 0.0)
            except SinkError:
                refused += 1

        for step in range(entries):
            if step % every == 0:
                steps.append(_seconds(lambda: model(images).square().mean().backward()))
            reports.append(_seconds(functools.partial(report, step)))
        try:
            sink.close()
        except SinkError:
            refused += 1
    return statistics.median(steps), statistics.median(reports), refused


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 1 where reporting every step costs more than a hundredth of it."""
    parser = Parser(description=__doc__, epilog="example: python -m scripts.benchmark_logging")
    parser.add_argument("--entries", type=whole(), default=5000, help="reports to make (default: %(default)s)")
    options = parser.parse_args(arguments)
    step_s, report_s, refused = measure(options.entries, 50)
    share = report_s / step_s
    Console().print(
        f"a report to a stuck client takes {1e6 * report_s:.0f} us, {share:.2%} of a step of {1e3 * step_s:.1f} ms; "
        f"{refused} of {options.entries} refused by the full queue"
    )
    return int(share > _LIMIT)


if __name__ == "__main__":
    sys.exit(main())
