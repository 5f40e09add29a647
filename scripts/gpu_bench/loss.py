"""The asymmetric loss, forward and backward: against the bytes it must move and the formula as usually written."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from loss_functions import AsymmetricFocalLoss
from scripts.benchmark_training import random_batches
from scripts.figures import Figure, figure
from scripts.gpu_bench.bench import Bench, ratios, saved_bytes
from tagger.compilation import missing_compiler

# 16-bit logits are read once and their gradient is written once.
_FLOOR_BYTES = 4
# Enough logits in turn that none is still in a cache when it comes again.
_ROTATED_BYTES = 256 << 20


def plain_asymmetric(logits: Tensor, targets: Tensor, gamma_neg: float, gamma_pos: float, clip: float) -> Tensor:
    """The loss as its paper writes it, left to autograd: dense float targets, one operation after the other."""
    present = torch.sigmoid(logits.float())
    absent = (1 - present + clip).clamp(max=1)
    log_likelihood = targets * torch.log(present.clamp(min=1e-8)) + (1 - targets) * torch.log(absent.clamp(min=1e-8))
    truth = present * targets + absent * (1 - targets)
    gamma = gamma_pos * targets + gamma_neg * (1 - targets)
    return -(torch.pow(1 - truth, gamma) * log_likelihood).sum()


class LossCase:
    """A batch of one size, with bfloat16 logits taken in turn."""

    def __init__(self, bench: Bench, size: int) -> None:
        self.num_tags = bench.scale.loss_tags
        self.batch = random_batches(1, size, 16, self.num_tags)[0].to(bench.device)
        self.dense = self.batch.dense_targets(self.num_tags)
        copies = math.ceil(_ROTATED_BYTES / (2 * self.dense.numel())) if bench.on_gpu else 1
        self._logits = itertools.cycle(
            torch.randn(self.dense.shape, device=bench.device).to(torch.bfloat16).requires_grad_()
            for _ in range(copies)
        )
        self._criterion = AsymmetricFocalLoss().to(bench.device)
        if compiles(bench):
            self._criterion.use_compiled()

    def ours(self) -> Tensor:
        """Forward from tag indices."""
        loss: Tensor = self._criterion(self._next(), self.batch.tag_indices, self.batch.tag_offsets)
        return loss

    def plain(self) -> Tensor:
        """Forward from dense targets, as usually written."""
        return plain_asymmetric(self._next(), self.dense, 4.0, 0.0, 0.05)

    def _next(self) -> Tensor:
        logits = next(self._logits)
        logits.grad = None
        return logits


def asymmetric_loss(bench: Bench) -> Iterator[Figure]:
    """Time against the byte floor and the plain form; what autograd keeps for each logit."""
    for size in bench.scale.loss_batches:
        case = LossCase(bench, size)
        works: dict[str, Callable[[], object]] = {
            "ours": functools.partial(backward_of, case.ours),
            "plain": functools.partial(backward_of, case.plain),
            "copy": bench.copy,
        }
        times = bench.kernels_in_turn(works)
        name = f"{'compiled ' if compiles(bench) else ''}asymmetric loss {size} x {case.num_tags:,}"
        # At 256 rows on a GPU, launching takes as long as the bytes: the goal is for the large batch.
        goal = 1.5 if bench.on_gpu and size >= 1024 else None
        least = 5.0 if case.dense.numel() >= 256 * 20_000 else None
        floors = ratios(times["ours"], bench.copy_seconds(times, _FLOOR_BYTES * case.dense.numel()))
        yield figure(f"{name}: time / byte floor", floors, goal, lower_is_better=True)
        yield figure(f"{name}: plain / ours", ratios(times["plain"], times["ours"]), least)
        for form, forward, goal in (("ours", case.ours, 2.0), ("plain", case.plain, None)):
            kept = saved_bytes(forward) / case.dense.numel()
            yield Figure(f"{name}: {form}, saved a logit", kept, goal=goal, lower_is_better=True, unit="bytes")


def compiles(bench: Bench) -> bool:
    """Whether the loss is measured compiled, as a run with compiled blocks has it."""
    return bench.scale.compiled and missing_compiler(bench.device) is None


def backward_of(forward: Callable[[], Tensor]) -> None:
    """A loss and its gradients."""
    forward().backward()  # type: ignore[no-untyped-call]
