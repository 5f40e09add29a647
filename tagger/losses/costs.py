"""What one logit costs, and the derivative of that, each worked out beside the other.

A cost is a function of ``z``, the logit pointing to the wrong answer: ``x`` where the tag is absent, ``-x`` where it is
present. It takes float32 or float64 of any shape, is finite for |z| up to 1e4, 0 at minus infinity, and NaN where z is.
The formulas serve eager PyTorch, which is fastest in place, and Inductor, which sees through that. Refuses nothing: the
losses check their settings.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Cost(Protocol):
    """A cost by z. Frozen and hashable, so that a compiled sum is made for its numbers."""

    def __call__(self, z: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        """Cost of each z and its derivative by z (None without `with_slope`), both in the shape and dtype of z."""
        ...


def _power(base: Tensor, exponent: float) -> Tensor:
    # torch.pow is fast for exponents to 3 only; the asymmetric loss uses 4 and 7.
    if exponent != int(exponent) or not 1 <= exponent <= 16:
        return base.pow(exponent)
    left, square, product = int(exponent), base, None
    while left:
        if left & 1:
            product = square if product is None else product * square
        left >>= 1
        square = square * square if left else square
    assert product is not None
    return product


def _rise(distance: Tensor) -> Tensor:
    """``1 - exp(-distance)`` for distances from 0, right to the last digits where it is small; may overwrite them."""
    if torch.compiler.is_compiling():
        # Inductor's C++ for expm1 is exp - 1.
        half = torch.tanh(distance * 0.5)
        return 2 * half / (1 + half)
    return distance.neg_().expm1_().neg_()


def _sigmoids(z: Tensor) -> tuple[Tensor, Tensor]:
    """``sigmoid(z)`` and ``sigmoid(-z)``, each right to its own last digits."""
    if torch.compiler.is_compiling():
        # One exponential for both; in eager PyTorch two fast kernels are less work than these six.
        small = torch.exp(-z.abs())
        share, above = 1 / (1 + small), z > 0
        return torch.where(above, 1, small) * share, torch.where(above, small, 1) * share
    return torch.sigmoid(z), torch.sigmoid(-z)


@dataclass(frozen=True)
class FocalCost:
    """``weight * q^gamma * -log(1-q)`` with ``q = max(sigmoid(z + shift) - margin, 0)``; margin 0 or 1e-30..1."""

    gamma: float
    margin: float = 0.0
    weight: float = 1.0
    shift: float = 0.0

    def __call__(self, z: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        z = z + self.shift if self.shift else z
        cost, slope = self._with_margin(z, with_slope) if self.margin else self._without_margin(z, with_slope)
        if self.weight != 1:
            cost, slope = cost.mul_(self.weight), None if slope is None else slope.mul_(self.weight)
        return cost, slope

    def _without_margin(self, z: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        """The derivative is ``p^gamma * (gamma * (1-p) * -log(1-p) + p)``."""
        p = torch.sigmoid(z)
        log_term = F.logsigmoid(-z).neg_()
        if self.gamma == 0:
            return log_term, p if with_slope else None
        focus = _power(p, self.gamma)
        if not with_slope:
            return log_term.mul_(focus), None
        slope = torch.sigmoid(-z).mul_(log_term).mul_(self.gamma).add_(p).mul_(focus)
        return log_term.mul_(focus), slope

    def _with_margin(self, z: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        """The derivative is ``p(1-p) * q^gamma * (gamma * -log(1-q) / q + 1 / (1-q))``.

        ``sigmoid(z) - margin`` loses its digits where q is small, so with ``z0`` the logit of the margin
        ``q = (1-margin) * p * (1 - exp(z0-z))``, ``1-q = sigmoid(-z) + margin`` and ``-log(1-q) = log1p(q / (1-q))``.
        """
        zero_cost_logit = math.log(self.margin) - math.log1p(-self.margin)
        # The part of z0 that float32 cannot hold is taken off separately, so that z - z0 is right to the last digit.
        high = float(np.float32(zero_cost_logit))
        p, not_p = _sigmoids(z)
        q = _rise((z - high).sub_(zero_cost_logit - high).clamp_(min=0)).mul_(p).mul_(1 - self.margin)
        inverse = (not_p + self.margin).reciprocal_()
        log_term = (q * inverse).log1p_()
        if self.gamma == 0:
            return log_term, (p.mul_(not_p).mul_(inverse).mul_(q > 0) if with_slope else None)
        focus = _power(q, self.gamma)
        if not with_slope:
            return log_term.mul_(focus), None
        # log_term is 0 where q is, and the ratio is 1 to within rounding where q is next to nothing.
        ratio = log_term / q.clamp(min=torch.finfo(q.dtype).tiny)
        slope = ratio.mul_(self.gamma).add_(inverse).mul_(not_p).mul_(p).mul_(focus)
        return log_term.mul_(focus), slope


@dataclass(frozen=True)
class HillCost:
    """``(height - p) * p^2`` with ``p = sigmoid(z)``: its slope is a hill, low again where z is large."""

    height: float

    def __call__(self, z: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        p, not_p = _sigmoids(z)
        square = p * p
        cost = (not_p + (self.height - 1)) * square
        return cost, (not_p * square * (3 * not_p + (2 * self.height - 3)) if with_slope else None)


@dataclass(frozen=True)
class CostRule:
    """The cost of the present tags, of the absent ones, and of absent ones whose logit is above a batch's limit.

    With `corrected` an absent tag above the limit costs what a present one would: `corrected` of ``-x``.
    """

    present: Cost
    absent: Cost
    corrected: Cost | None = None

    def of_present(self, logits: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        """Cost of each logit as that of a present tag, and its derivative by the logit."""
        cost, slope = self.present(-logits, with_slope)
        return cost, None if slope is None else slope.neg_()

    def of_absent(self, logits: Tensor, limit: Tensor | None, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        """Cost of each logit as that of an absent tag, and its derivative by the logit; `limit` is a scalar."""
        cost, slope = self.absent(logits, with_slope)
        if self.corrected is None or limit is None:
            return cost, slope
        other_cost, other_slope = self.corrected(-logits, with_slope)
        above = logits > limit
        cost = torch.where(above, other_cost, cost)
        if slope is None or other_slope is None:
            return cost, None
        return cost, torch.where(above, -other_slope, slope)
