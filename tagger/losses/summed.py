"""The costs of a batch added up, with the gradient worked out in the same pass.

Absent tags are many, present ones few: one pass over the logits prices each as absent, leaving out the listed ones,
and those are then priced by themselves. What autograd keeps is one slope a logit: 2 bytes for logits of 16 bits
(bfloat16 also beside float16, in which slopes of 1e-8 would vanish), the logits' own dtype otherwise.

The pass is PyTorch. Compiled by Inductor it is one loop over the logits (Triton on CUDA, C++ on a CPU), which reads
each once and keeps nothing but the slope; a kernel written by hand would do the same, and need a second formula to be
kept equal to this one. Uncompiled it runs in blocks of rows. Gradients of gradients are not provided.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tagger.losses.costs import CostRule

# Uncompiled, on a CPU the blocks stay in its cache (78 ms in one piece, 27 ms so, 256 x 20,000 logits on two cores);
# elsewhere they bound the memory of what is between logit and cost.
_CPU_BLOCK, _DEVICE_BLOCK = 1 << 18, 1 << 25


@dataclass(frozen=True, eq=False)
class Targets:
    """Which tags are present: `dense` [B, C] of 0..1, or `rows` and `columns` (int64) of those that are."""

    dense: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None


def price_rows(
    logits: Tensor,
    skipped: Tensor | None,
    dense: Tensor | None,
    tag_weights: Tensor | None,
    limit: Tensor | None,
    rule: CostRule,
    with_slope: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sum of the costs of `logits` [B, C], and their slopes [B, C]; 0 where `skipped` (bool, [B, C] or [1, C]).

    Every tag is absent, or present to the share that `dense` [B, C] says.
    """
    x = logits.to(compute_dtype(logits))
    # Uncompiled, logits that cost nothing take one pass, where blanking costs and slopes takes two; in a compiled loop
    # that is the faster way.
    blank_logits = dense is None and not torch.compiler.is_compiling()
    if skipped is not None and blank_logits:
        x = torch.where(skipped, -math.inf, x)
    cost, slope = rule.of_absent(x, limit, with_slope)
    if dense is not None:
        y = dense.to(x.dtype)
        present_cost, present_slope = rule.of_present(x, with_slope)
        cost = cost * (1 - y) + present_cost * y
        slope = None if slope is None or present_slope is None else slope * (1 - y) + present_slope * y
    if tag_weights is not None:
        weights = tag_weights.to(x.dtype)
        cost, slope = cost.mul_(weights), None if slope is None else slope.mul_(weights)
    if skipped is not None and not blank_logits:
        cost = torch.where(skipped, 0, cost)
        slope = None if slope is None else torch.where(skipped, 0, slope)
    # Inductor joins both results in one loop where it can sum as it goes: all at once in C++, row by row in Triton.
    total = cost.sum() if x.device.type == "cpu" else cost.sum(dim=1).sum()
    return total, None if slope is None else slope.to(slope_dtype(logits))


def compute_dtype(logits: Tensor) -> torch.dtype:
    """In which costs are worked out: float32, or float64 for float64 logits."""
    return torch.promote_types(logits.dtype, torch.float32)


def slope_dtype(logits: Tensor) -> torch.dtype:
    """In which slopes are kept."""
    return torch.bfloat16 if logits.dtype.itemsize <= 2 else logits.dtype


def _price_blocks(
    logits: Tensor,
    skipped: Tensor | None,
    dense: Tensor | None,
    tag_weights: Tensor | None,
    limit: Tensor | None,
    rule: CostRule,
    with_slope: bool,
) -> tuple[Tensor, Tensor | None]:
    block = _CPU_BLOCK if logits.device.type == "cpu" else _DEVICE_BLOCK
    step = max(1, block // max(logits.shape[1], 1))
    totals, slopes = [], torch.empty_like(logits, dtype=slope_dtype(logits)) if with_slope else None
    for first in range(0, logits.shape[0], step):
        rows = slice(first, first + step)
        left_out = skipped[rows] if skipped is not None and skipped.shape[0] > 1 else skipped
        mixed = None if dense is None else dense[rows]
        total, slope = price_rows(logits[rows], left_out, mixed, tag_weights, limit, rule, with_slope)
        totals.append(total)
        if slopes is not None and slope is not None:
            slopes[rows] = slope
    if not totals:
        return torch.zeros((), dtype=compute_dtype(logits), device=logits.device), slopes
    return torch.stack(totals).sum(), slopes


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return torch.compile(price_rows, fullgraph=True)


def _price_compiled(
    logits: Tensor,
    skipped: Tensor | None,
    dense: Tensor | None,
    tag_weights: Tensor | None,
    limit: Tensor | None,
    rule: CostRule,
    with_slope: bool,
) -> tuple[Tensor, Tensor | None]:
    price = _compiled()
    for table in (logits, skipped, dense):
        if table is not None and len(table) > 1:
            # Batches differ in their rows (aspect buckets, the last one): one compilation for all.
            torch._dynamo.maybe_mark_dynamic(table, 0)
    return price(logits, skipped, dense, tag_weights, limit, rule, with_slope)


@dataclass(frozen=True, eq=False)
class Pricing:
    """How the logits [B, C] of one batch are priced, all at once or some columns at a time.

    `tag_weights` [C] multiply; `ignored` (bool [C]) tags have neither cost nor slope; `limit` is `CostRule`'s.
    """

    rule: CostRule
    targets: Targets
    num_tags: int
    tag_weights: Tensor | None = None
    ignored: Tensor | None = None
    limit: Tensor | None = None
    compiled: bool = False

    def of(self, logits: Tensor, first: int = 0, *, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        """Sum of the costs of `logits` [B, n], those of the tags from `first` on, and their slopes [B, n]."""
        columns = slice(first, first + logits.shape[1])
        weights = None if self.tag_weights is None else self.tag_weights[columns]
        ignored = None if self.ignored is None else self.ignored[None, columns]
        logits = logits.detach()
        price = _price_compiled if self.compiled and logits.numel() else _price_blocks
        if self.targets.dense is not None:
            dense = self.targets.dense[:, columns]
            return price(logits, ignored, dense, weights, self.limit, self.rule, with_slope)
        rows, own, listed = self._listed(columns)
        marks = torch.zeros(logits.shape, dtype=torch.uint8, device=logits.device)
        marks.index_put_((rows, own), listed.to(torch.uint8), accumulate=True)
        skipped = marks.view(torch.bool) if ignored is None else marks.view(torch.bool) | ignored
        total, slopes = price(logits, skipped, None, weights, self.limit, self.rule, with_slope)
        cost, slope = self.rule.of_present(logits[rows, own].to(compute_dtype(logits)), with_slope)
        if weights is not None:
            shares = weights[own].to(cost.dtype)
            cost, slope = cost * shares, None if slope is None else slope * shares
        if slopes is not None and slope is not None:
            # Added to the 0 that the pass has left there, so that what is not listed here changes nothing.
            slopes.index_put_((rows, own), torch.where(listed, slope, 0).to(slopes.dtype), accumulate=True)
        return total + torch.where(listed, cost, 0).sum(), slopes

    def _listed(self, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column within `columns` and a mark for every tag of the lists: False where it is not to be counted.

        That is where it is listed a second time, ignored, or of other columns; how many remain only the device knows.
        """
        rows, tags, counted = self._unique
        counted = counted & (tags >= columns.start)
        if columns.stop < self.num_tags:
            counted = counted & (tags < columns.stop)
        # An index beyond the last tag stays where it is and fails as out of bounds.
        return rows, torch.where(counted, tags - columns.start, 0), counted

    @functools.cached_property
    def _unique(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.targets.rows is not None and self.targets.columns is not None
        width = self.num_tags + 1
        keys, _ = (self.targets.rows * width + self.targets.columns).sort()
        rows, tags = keys // width, keys % width
        counted = torch.ones_like(keys, dtype=torch.bool)
        counted[1:] = keys[1:] != keys[:-1]
        return rows, tags, counted if self.ignored is None else counted & ~self.ignored[tags]


class SummedCost(torch.autograd.Function):
    """Sum of the costs of logits [B, C]. The gradient is worked out with the value and is all that is kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, pricing: Pricing, with_slope: bool) -> Tensor:
        total, slopes = pricing.of(logits, with_slope=with_slope)
        if slopes is not None:
            ctx.save_for_backward(slopes)
            ctx.logits_dtype = logits.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (slopes * gradient).to(ctx.logits_dtype), None, None
