"""The asymmetric loss, forward and backward: against the bytes it must move and the formula as usually written."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator

from torch import Tensor

from loss_functions import AsymmetricFocalLoss
from scripts.benchmark_loss import LEAST_SPEED, MOST_BYTES, ROWS, TAGS, make_data, usual_loss
from scripts.figures import Figure, figure
from scripts.gpu_bench.bench import Bench, ratios, saved_bytes
from tagger.compilation import missing_compiler

# 16-bit logits are read once and their gradient is written once.
_FLOOR_BYTES = 4
# Enough logits in turn that none is still in a cache when it comes again.
_ROTATED_BYTES = 256 << 20


class LossCase:
    """A batch of one size on the device, with bfloat16 logits taken in turn."""

    def __init__(self, bench: Bench, size: int) -> None:
        data = make_data(size, bench.scale.loss_tags)
        self.num_logits = data.logits.numel()
        self._indices, self._offsets = data.indices.to(bench.device), data.offsets.to(bench.device)
        self._dense = data.dense.to(bench.device)
        copies = math.ceil(_ROTATED_BYTES / (2 * self.num_logits)) if bench.on_gpu else 1
        self._logits = itertools.cycle(
            [data.logits.to(bench.device, copy=True).requires_grad_() for _ in range(copies)]
        )
        self._criterion = AsymmetricFocalLoss().to(bench.device)
        if compiles(bench):
            self._criterion.use_compiled()

    def ours(self) -> Tensor:
        """Forward from tag indices."""
        loss: Tensor = self._criterion(self._next(), self._indices, self._offsets)
        return loss

    def usual(self) -> Tensor:
        """Forward from dense targets."""
        return usual_loss(self._next(), self._dense)

    def _next(self) -> Tensor:
        logits = next(self._logits)
        logits.grad = None
        return logits


def asymmetric_loss(bench: Bench) -> Iterator[Figure]:
    """Time against the byte floor and the usual form; what autograd keeps for each logit."""
    for size in bench.scale.loss_batches:
        case = LossCase(bench, size)
        works: dict[str, Callable[[], object]] = {
            "ours": functools.partial(backward_of, case.ours),
            "usual": functools.partial(backward_of, case.usual),
            "copy": bench.copy,
        }
        times = bench.kernels_in_turn(works)
        name = f"{'compiled ' if compiles(bench) else ''}asymmetric loss {size} x {bench.scale.loss_tags:,}"
        # At 256 rows on a GPU, launching takes as long as the bytes: the goal is for the large batch.
        most = 1.5 if bench.on_gpu and size >= 1024 else None
        floors = ratios(times["ours"], bench.copy_seconds(times, _FLOOR_BYTES * case.num_logits))
        yield figure(f"{name}: time / byte floor", floors, most, lower_is_better=True)
        least = LEAST_SPEED if case.num_logits >= ROWS * TAGS else None
        yield figure(f"{name}: usual / ours", ratios(times["usual"], times["ours"]), least)
        for form, forward, most in (("ours", case.ours, MOST_BYTES), ("usual", case.usual, None)):
            kept = saved_bytes(forward) / case.num_logits
            yield Figure(f"{name}: {form}, saved a logit", kept, goal=most, lower_is_better=True, unit="bytes")


def compiles(bench: Bench) -> bool:
    """Whether the loss is measured compiled, as a run with compiled blocks has it."""
    return bench.scale.compiled and missing_compiler(bench.device) is None


def backward_of(forward: Callable[[], Tensor]) -> None:
    """A loss and its gradients."""
    forward().backward()  # type: ignore[no-untyped-call]
