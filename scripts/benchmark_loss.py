"""What the loss costs, beside the usual formula in plain PyTorch in the same run: ratios against stated goals.

The asymmetric loss (4, 0, 0.05), forward and backward, on bfloat16 logits and lists of tags: ours compiled, as on a run
with training.compile, and uncompiled; the usual one with sigmoid, log and pow on dense float32 targets under autograd.
Measured in turns; CPU time, which other work on the cores moves least. Also what autograd keeps for each logit, and
head and loss in chunks of tags against both at once.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

from loss_functions import AsymmetricFocalLoss
from tagger.command import command
from tagger.compilation import missing_compiler
from tagger.errors import InputError
from tagger.options import Parser, whole

ROWS, TAGS, TAGS_PER_IMAGE = 256, 20_000, 36
WIDTH, CHUNK = 384, 4096
GAMMA, CLIP = 4.0, 0.05
LEAST_SPEED, MOST_BYTES = 5.0, 2.0


@dataclass(frozen=True)
class Data:
    """Logits [B, C] as of a trained tagger, bfloat16; the tags as lists and as a dense float32 table."""

    logits: Tensor
    indices: Tensor
    offsets: Tensor
    dense: Tensor


def make_data(rows: int, num_tags: int) -> Data:
    """Most logits far below 0, a few tags an image present."""
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(rows, num_tags, generator=generator) < TAGS_PER_IMAGE / num_tags
    logits = torch.randn(rows, num_tags, generator=generator) * 2 - 4 + 4 * present
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), present.sum(dim=1).cumsum(0)])
    return Data(logits.bfloat16(), present.nonzero()[:, 1].int(), offsets.int(), present.float())


def usual_loss(logits: Tensor, dense: Tensor) -> Tensor:
    """The asymmetric loss as it is usually written, every step a tensor of [B, C] float32."""
    p = torch.sigmoid(logits.float())
    shifted = (1 - p + CLIP).clamp(max=1)
    log_term = dense * torch.log(p.clamp(min=1e-8)) + (1 - dense) * torch.log(shifted.clamp(min=1e-8))
    focus = torch.pow(1 - p * dense - shifted * (1 - dense), GAMMA * (1 - dense))
    return -(log_term * focus).sum()


def kept_bytes(loss: Callable[[Tensor], Tensor], logits: Tensor) -> float:
    """Bytes a logit that autograd keeps for the backward pass, beside the logits themselves."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(logits.detach().requires_grad_())
    kept.pop(logits.untyped_storage().data_ptr(), None)
    return sum(kept.values()) / logits.numel()


def cpu_times(calls: dict[str, Callable[[], None]], turns: int) -> dict[str, float]:
    """Median CPU seconds of each, measured in turns after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            started = time.process_time()
            call()
            if turn:
                times[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_losses(data: Data, turns: int) -> list[tuple[str, float, float]]:
    """(what, CPU seconds forward and backward, bytes kept for a logit); the usual formula first."""
    compiled, plain = AsymmetricFocalLoss(GAMMA, 0, CLIP), AsymmetricFocalLoss(GAMMA, 0, CLIP)
    compiled.use_compiled()
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "usual formula, dense targets, autograd": lambda logits: usual_loss(logits, data.dense),
        "ours, compiled": lambda logits: compiled(logits, data.indices, data.offsets),
        "ours, uncompiled": lambda logits: plain(logits, data.indices, data.offsets),
    }

    def both_ways(loss: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        return lambda: torch.autograd.backward(loss(data.logits.detach().requires_grad_()))

    times = cpu_times({name: both_ways(loss) for name, loss in losses.items()}, turns)
    return [(name, times[name], kept_bytes(loss, data.logits)) for name, loss in losses.items()]


def measure_chunks(data: Data, turns: int) -> tuple[float, float]:
    """CPU seconds of head and loss at once and in chunks of tags, forward and backward, uncompiled."""
    generator = torch.Generator().manual_seed(1)
    rows, num_tags = data.logits.shape
    features = torch.randn(rows, WIDTH, generator=generator).requires_grad_()
    weight = (torch.randn(num_tags, WIDTH, generator=generator) * 0.02).requires_grad_()
    bias = torch.full((num_tags,), -4.0).requires_grad_()
    loss = AsymmetricFocalLoss(GAMMA, 0, CLIP)

    def at_once() -> None:
        torch.autograd.backward(loss(linear(features, weight, bias), data.indices, data.offsets))

    def in_chunks() -> None:
        torch.autograd.backward(
            loss.through_head(features, weight, bias, data.indices, data.offsets, chunk_tags=CHUNK, dtype=torch.float32)
        )

    times = cpu_times({"at once": at_once, "in chunks": in_chunks}, turns)
    return times["at once"], times["in chunks"]


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures; exits with 1 where a goal is missed."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=whole(), default=ROWS, help="images (default: %(default)s)")
    parser.add_argument("--tags", type=whole(), default=TAGS, help="tags (default: %(default)s)")
    parser.add_argument("--turns", type=whole(), default=9, help="measurements of each (default: %(default)s)")
    options = parser.parse_args(arguments)
    missing = missing_compiler(torch.device("cpu"))
    if missing is not None:
        raise InputError(f"the compiled loss cannot be measured: {missing}")
    torch.set_num_threads(1)
    data = make_data(options.images, options.tags)
    figures = measure_losses(data, options.turns)
    at_once, in_chunks = measure_chunks(data, max(1, options.turns // 3))
    usual_time, usual_bytes = figures[0][1:]
    title = f"{options.images:,} images x {options.tags:,} tags, forward and backward, one thread"
    table = Table("what", "CPU ms", "against the usual", "bytes kept a logit", title=title)
    for name, seconds, kept in figures:
        table.add_row(name, f"{seconds * 1e3:.0f}", f"{usual_time / seconds:.1f}x", f"{kept:.1f}")
    table.add_section()
    table.add_row("goal, compiled", "", f">= {LEAST_SPEED:g}x", f"<= {MOST_BYTES:g} (usual: {usual_bytes:.0f})")
    table.add_section()
    table.add_row(f"float32 head of {WIDTH} features and loss at once", f"{at_once * 1e3:.0f}", "", "")
    table.add_row(
        f"the same in chunks of {CHUNK} tags", f"{in_chunks * 1e3:.0f}", f"{in_chunks / at_once:.2f} of it", ""
    )
    Console(width=120).print(table)
    _, seconds, kept = figures[1]
    return 0 if usual_time / seconds >= LEAST_SPEED and kept <= MOST_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
