"""What training minimises: losses of tag logits against multi-hot targets or tag lists.

A tag loss is one cost per logit, summed. The cost of a logit depends on how far it errs: with ``z`` the logit pointing
to the wrong answer (``x`` where the tag is absent, ``-x`` where it is present),

    cost(z) = weight * q^gamma * -log(1 - q),    q = max(sigmoid(z) - margin, 0)

Asymmetric loss, focal loss and binary cross-entropy are settings of the two sides. Costs are computed in float32 at
least (float64 stays float64), also under autocast, and are finite with finite gradients for |logit| up to 1e4. The
gradient is the whole derivative of the cost, worked out beside it. A NaN logit makes the loss NaN. Refuses tensors
whose shapes or ranges do not fit, and settings outside their range; gradients of gradients are not provided.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from Configuration_System import LossSection
from tagger.errors import InputError
from tagger.registry import Registry
from tagger.tag_lists import tag_coordinates

Reduction = Literal["sum", "mean"]

# On a CPU the costs are worked out in blocks that stay in its cache: 256 x 20,000 logits took 27 ms on two cores so,
# 78 ms in one piece.
_CPU_BLOCK = 1 << 18
# Below this a margin no longer bounds the logarithm in float32.
_SMALLEST_MARGIN = 1e-30


@dataclass(frozen=True)
class _Side:
    """The cost of the present tags, or of the absent ones."""

    gamma: float
    margin: float = 0.0
    weight: float = 1.0


def _power(base: Tensor, exponent: float) -> Tensor:
    # torch.pow is fast for exponents to 3 only; 4 is the usual one of the asymmetric loss.
    return base.square().square_() if exponent == 4 else base.pow(exponent)


def _cost_without_margin(z: Tensor, gamma: float, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """``p^gamma * -log(1-p)`` with ``p = sigmoid(z)``; its derivative ``p^gamma * (gamma * (1-p) * -log(1-p) + p)``."""
    p = torch.sigmoid(z)
    log_term = F.logsigmoid(-z).neg_()
    if gamma == 0:
        return log_term, p if with_slope else None
    focus = _power(p, gamma)
    if not with_slope:
        return log_term.mul_(focus), None
    slope = torch.sigmoid(-z).mul_(log_term).mul_(gamma).add_(p).mul_(focus)
    return log_term.mul_(focus), slope


def _cost_with_margin(z: Tensor, gamma: float, margin: float, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """``q^gamma * -log(1-q)`` and its derivative ``p(1-p) * q^gamma * (gamma * -log(1-q) / q + 1 / (1-q))``.

    ``sigmoid(z) - margin`` loses its digits where q is small, so with ``z0`` the logit of the margin
    ``q = (1-margin) * p * (1 - exp(z0-z))``, ``1-q = sigmoid(-z) + margin`` and ``-log(1-q) = log1p(q / (1-q))``.
    """
    zero_cost_logit = math.log(margin) - math.log1p(-margin)
    # The part of z0 that float32 cannot hold is taken off separately, so that z - z0 is right to the last digit.
    high = float(np.float32(zero_cost_logit))
    p, not_p = torch.sigmoid(z), torch.sigmoid(-z)
    q = (z - high).sub_(zero_cost_logit - high).clamp_(min=0).neg_().expm1_().mul_(p).mul_(margin - 1)
    not_q = not_p + margin
    log_term = (q / not_q).log1p_()
    if gamma == 0:
        return log_term, (p.mul_(not_p).div_(not_q).mul_(q > 0) if with_slope else None)
    focus = _power(q, gamma)
    if not with_slope:
        return log_term.mul_(focus), None
    # log_term is 0 where q is, and the ratio is 1 to within rounding where q is next to nothing.
    ratio = log_term / q.clamp_(min=torch.finfo(q.dtype).tiny)
    slope = ratio.mul_(gamma).add_(not_q.reciprocal_()).mul_(not_p).mul_(p).mul_(focus)
    return log_term.mul_(focus), slope


def _costs(logits: Tensor, sign: int, side: _Side, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Cost of every logit and its derivative by the logit, in the logits' shape; ``sign`` is -1 for present tags."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    cost = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    slope = torch.empty_like(cost) if with_slope else None
    flat_logits, flat_cost = logits.reshape(-1), cost.view(-1)
    block = _CPU_BLOCK if logits.device.type == "cpu" else max(flat_logits.numel(), 1)
    for start in range(0, flat_logits.numel(), block):
        part = slice(start, start + block)
        z = flat_logits[part].to(dtype)
        z = -z if sign < 0 else z
        if side.margin > 0:
            part_cost, part_slope = _cost_with_margin(z, side.gamma, side.margin, with_slope)
        else:
            part_cost, part_slope = _cost_without_margin(z, side.gamma, with_slope)
        torch.mul(part_cost, side.weight, out=flat_cost[part])
        if slope is not None and part_slope is not None:
            torch.mul(part_slope, sign * side.weight, out=slope.view(-1)[part])
    return cost, slope


@dataclass(frozen=True)
class _Targets:
    """Which tags are present: ``dense`` [B, C] of 0..1, or ``rows`` and ``columns`` of those that are."""

    dense: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None


class _SummedCost(torch.autograd.Function):
    """Sum of all costs. The gradient is worked out with the value, and is the only tensor of [B, C] kept."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: _Targets,
        present: _Side,
        absent: _Side,
        tag_weights: Tensor | None,
        ignored: Tensor | None,
        with_slope: bool,
    ) -> Tensor:
        cost, slope = _costs(logits, 1, absent, with_slope)
        if targets.rows is not None and targets.columns is not None:
            # Few tags are present: theirs overwrite what stands there. A tag listed twice writes the same number twice.
            where = (targets.rows, targets.columns)
            present_cost, present_slope = _costs(logits[where], -1, present, with_slope)
            cost.index_put_(where, present_cost)
            if slope is not None and present_slope is not None:
                slope.index_put_(where, present_slope)
        elif targets.dense is not None:
            y = targets.dense.to(cost.dtype)
            present_cost, present_slope = _costs(logits, -1, present, with_slope)
            cost.mul_(1 - y).addcmul_(y, present_cost)
            if slope is not None and present_slope is not None:
                slope.mul_(1 - y).addcmul_(y, present_slope)
        for table in (cost, slope):
            if table is not None and tag_weights is not None:
                table.mul_(tag_weights.to(table.dtype))
            if table is not None and ignored is not None:
                table.index_fill_(1, ignored, 0)
        if slope is not None:
            ctx.save_for_backward(slope)
            ctx.logits_dtype = logits.dtype
        return cost.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return ((slope * gradient).to(ctx.logits_dtype), None, None, None, None, None, None)


def _check_logits(logits: Tensor) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype} of shape {list(logits.shape)}; expected floats of shape [B, C]")


def _read_targets(logits: Tensor, targets: Tensor, tag_offsets: Tensor | None) -> _Targets:
    """Check either form of targets against the logits; values are checked on a CPU only, to spare a device sync."""
    for name, tensor in (("targets", targets), ("tag_offsets", tag_offsets)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"{name} is on {tensor.device} and logits on {logits.device}; move them to one device")
    if tag_offsets is not None:
        rows, columns = tag_coordinates(targets, tag_offsets, logits.shape[0], logits.shape[1])
        return _Targets(rows=rows, columns=columns)
    if targets.shape != logits.shape:
        raise ValueError(
            f"targets have shape {list(targets.shape)} and logits {list(logits.shape)}; expected one shape [B, C], "
            "or a flat list of tag indices together with tag_offsets"
        )
    if targets.device.type == "cpu" and targets.dtype != torch.bool and targets.numel():
        low, high = (float(value) for value in torch.aminmax(targets.detach()))
        if not (low >= 0 and high <= 1):
            raise ValueError(f"targets run from {low:g} to {high:g}; expected 0 (absent) to 1 (present)")
    return _Targets(dense=targets.detach())


class TagLoss(nn.Module):
    """A cost per logit, summed over rows and tags; the base of the tag losses, which choose its two sides.

    Called as ``loss(logits [B, C], targets [B, C])``, targets bool, integer or float 0..1 (between 0 and 1 the costs of
    both sides are mixed), or as ``loss(logits, tag_indices, tag_offsets)`` with flat integer lists, which needs no
    [B, C] targets. Returns a scalar of float32, or of float64 for float64 logits; no gradient reaches the targets.

    ``tag_weights`` [C] multiplies each tag's cost. ``ignored_tags`` contribute neither value nor gradient. With
    ``reduction`` ``sum`` all B * C costs are added up, ``mean`` divides by how many are not ignored. Nothing enters the
    state dict.
    """

    tag_weights: Tensor | None
    ignored: Tensor | None

    def __init__(
        self,
        present: _Side,
        absent: _Side,
        tag_weights: Tensor | None,
        ignored_tags: Sequence[int],
        reduction: Reduction,
    ) -> None:
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction={reduction!r} is not known; use 'sum' or 'mean'")
        if tag_weights is not None:
            if tag_weights.ndim != 1 or not tag_weights.is_floating_point():
                found = f"{tag_weights.dtype} of shape {list(tag_weights.shape)}"
                raise ValueError(f"tag_weights are {found}; expected floats of shape [C]")
            if not bool((torch.isfinite(tag_weights) & (tag_weights >= 0)).all()):
                raise ValueError("tag_weights hold a negative or non-finite number; expected 0 or above")
        self.present, self.absent = present, absent
        self.reduction: Reduction = reduction
        self.register_buffer(
            "tag_weights", None if tag_weights is None else tag_weights.detach().clone(), persistent=False
        )
        self.register_buffer("ignored", None, persistent=False)
        self.ignored_tags: tuple[int, ...] = ()
        self._ignore(ignored_tags)

    def _ignore(self, tags: Sequence[int]) -> None:
        self.ignored_tags = tuple(sorted({*self.ignored_tags, *(int(tag) for tag in tags)}))
        if self.ignored_tags and self.ignored_tags[0] < 0:
            raise ValueError(f"ignored_tags holds {self.ignored_tags[0]}; expected tag indices from 0")
        device = None if self.ignored is None else self.ignored.device
        self.ignored = torch.tensor(self.ignored_tags, dtype=torch.int64, device=device) if self.ignored_tags else None

    def ignoring(self, tags: Sequence[int]) -> "TagLoss":
        """A copy that leaves these tags out as well."""
        other = copy.deepcopy(self)
        other._ignore(tags)
        return other

    def forward(self, logits: Tensor, targets: Tensor, tag_offsets: Tensor | None = None) -> Tensor:
        """The loss of a batch; see the class for both forms of targets."""
        _check_logits(logits)
        num_rows, num_tags = logits.shape
        if self.tag_weights is not None and len(self.tag_weights) != num_tags:
            raise ValueError(f"tag_weights are for {len(self.tag_weights)} tags and logits have {num_tags}")
        if self.ignored_tags and self.ignored_tags[-1] >= num_tags:
            raise ValueError(f"ignored_tags holds {self.ignored_tags[-1]} and logits have {num_tags} tags")
        wanted = _read_targets(logits, targets, tag_offsets)
        with_slope = logits.requires_grad and torch.is_grad_enabled()
        total: Tensor = _SummedCost.apply(  # type: ignore[no-untyped-call]
            logits, wanted, self.present, self.absent, self.tag_weights, self.ignored, with_slope
        )
        if self.reduction == "sum":
            return total
        counted = num_rows * (num_tags - len(self.ignored_tags))
        if counted == 0:
            raise ValueError(
                f"no cost to average over: {num_rows} rows, {len(self.ignored_tags)} of {num_tags} ignored"
            )
        return total / counted

    def extra_repr(self) -> str:
        return f"present={self.present}, absent={self.absent}, reduction={self.reduction!r}"


def _check_gamma(**gammas: float) -> None:
    for name, gamma in gammas.items():
        if not (math.isfinite(gamma) and gamma >= 0):
            raise ValueError(f"{name}={gamma} is below 0 or not finite; use 0 or a positive number")


class AsymmetricFocalLoss(TagLoss):
    """Asymmetric loss (Ridnik et al. 2021, equations 4 to 7).

    ``-y (1-p)^gamma_pos log(p) - (1-y) pm^gamma_neg log(1-pm)`` with ``pm = max(p - clip, 0)``: the margin ``clip``
    (0..1) acts inside the logarithm too. The gradient also flows through the focal weights ``(1-p)^gamma_pos`` and
    ``pm^gamma_neg``; the authors' code detaches them by default, which makes theirs another gradient.
    """

    def __init__(
        self,
        gamma_neg: float = 4.0,
        gamma_pos: float = 0.0,
        clip: float = 0.05,
        tag_weights: Tensor | None = None,
        ignored_tags: Sequence[int] = (),
        reduction: Reduction = "sum",
    ) -> None:
        _check_gamma(gamma_neg=gamma_neg, gamma_pos=gamma_pos)
        if not (clip == 0 or _SMALLEST_MARGIN <= clip < 1):
            raise ValueError(f"clip={clip} is not 0 or {_SMALLEST_MARGIN:g}..1; 0 turns the margin off, 0.05 is usual")
        super().__init__(_Side(gamma_pos), _Side(gamma_neg, margin=clip), tag_weights, ignored_tags, reduction)


class FocalLoss(TagLoss):
    """Focal loss (Lin et al. 2017, equations 4 and 5): ``-(1-pt)^gamma log(pt)``, ``pt`` the probability of the truth.

    With ``alpha`` (0..1) present tags weigh ``alpha`` and absent ones ``1 - alpha``.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float | None = None,
        tag_weights: Tensor | None = None,
        ignored_tags: Sequence[int] = (),
        reduction: Reduction = "sum",
    ) -> None:
        _check_gamma(gamma=gamma)
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} is not between 0 and 1; use a share, or None for no weighting")
        present, absent = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
        super().__init__(
            _Side(gamma, weight=present), _Side(gamma, weight=absent), tag_weights, ignored_tags, reduction
        )


class BinaryCrossEntropy(TagLoss):
    """``-y log(p) - (1-y) log(1-p)``."""

    def __init__(
        self, tag_weights: Tensor | None = None, ignored_tags: Sequence[int] = (), reduction: Reduction = "sum"
    ) -> None:
        super().__init__(_Side(0.0), _Side(0.0), tag_weights, ignored_tags, reduction)


class MultiTaskLoss(nn.Module):
    """A tag loss over the other columns, plus ``rating_weight`` times cross-entropy over the rating columns.

    The ratings, one column each, exclude each other: softmax over them. A row without a rating is left out of that
    part; a row that lists several shares its weight among them. ``sum`` adds up over rows; ``mean`` averages the tag
    part over its costs and the rating part over the rated rows. Called like a ``TagLoss``.
    """

    rating_indices: Tensor

    def __init__(self, tag_loss: TagLoss, rating_indices: Sequence[int], rating_weight: float) -> None:
        super().__init__()
        ratings = tuple(int(index) for index in rating_indices)
        if len(ratings) < 2 or len(set(ratings)) != len(ratings) or min(ratings) < 0:
            raise ValueError(f"rating_indices={list(ratings)} is not two or more different tag indices")
        if shared := sorted(set(ratings) & set(tag_loss.ignored_tags)):
            raise ValueError(f"tags {shared} are both ratings and ignored; take them out of one of the two")
        if not (math.isfinite(rating_weight) and rating_weight >= 0):
            raise ValueError(f"rating_weight={rating_weight} is below 0 or not finite; use 0 or a positive number")
        self.tag_loss = tag_loss.ignoring(ratings)
        self.rating_weight = rating_weight
        self._last_rating = max(ratings)
        self.register_buffer("rating_indices", torch.tensor(ratings, dtype=torch.int64), persistent=False)

    def forward(self, logits: Tensor, targets: Tensor, tag_offsets: Tensor | None = None) -> Tensor:
        """The loss of a batch; see ``TagLoss`` for both forms of targets."""
        _check_logits(logits)
        if self._last_rating >= logits.shape[1]:
            raise ValueError(f"rating_indices holds {self._last_rating} and logits have {logits.shape[1]} tags")
        tag_part: Tensor = self.tag_loss(logits, targets, tag_offsets)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        wanted = self._rating_targets(_read_targets(logits, targets, tag_offsets), logits.shape[0], dtype)
        rated = wanted.sum(dim=1, keepdim=True)
        shares = wanted / rated.clamp(min=torch.finfo(dtype).tiny)
        log_probabilities = F.log_softmax(logits.index_select(1, self.rating_indices).to(dtype), dim=1)
        rating_part = -(shares * log_probabilities).sum()
        if self.tag_loss.reduction == "mean":
            rating_part = rating_part / (rated > 0).sum().clamp(min=1)
        return tag_part + self.rating_weight * rating_part

    def _rating_targets(self, targets: _Targets, num_rows: int, dtype: torch.dtype) -> Tensor:
        """[B, ratings], 1 where the row lists the rating."""
        if targets.dense is not None:
            return targets.dense.index_select(1, self.rating_indices).to(dtype)
        assert targets.rows is not None and targets.columns is not None
        listed = (targets.columns[:, None] == self.rating_indices).to(dtype)
        wanted = torch.zeros(num_rows, len(self.rating_indices), dtype=dtype, device=listed.device)
        return wanted.index_put_((targets.rows,), listed, accumulate=True).clamp_(max=1)


LossFactory: TypeAlias = Callable[[LossSection, Tensor | None, Sequence[int], Reduction], TagLoss]
LOSSES: Registry[LossFactory] = Registry("loss")


@LOSSES.register("asymmetric_focal")
def _asymmetric_focal(
    section: LossSection, tag_weights: Tensor | None, ignored_tags: Sequence[int], reduction: Reduction
) -> TagLoss:
    return AsymmetricFocalLoss(section.gamma_neg, section.gamma_pos, section.clip, tag_weights, ignored_tags, reduction)


@LOSSES.register("focal")
def _focal(
    section: LossSection, tag_weights: Tensor | None, ignored_tags: Sequence[int], reduction: Reduction
) -> TagLoss:
    if section.gamma_pos not in (0, section.gamma_neg):
        raise InputError(
            f"loss.gamma_pos={section.gamma_pos} with loss.name=focal, which has one gamma, loss.gamma_neg="
            f"{section.gamma_neg}; set loss.gamma_pos to 0, or use loss.name=asymmetric_focal"
        )
    return FocalLoss(section.gamma_neg, None, tag_weights, ignored_tags, reduction)


@LOSSES.register("binary_cross_entropy")
def _binary_cross_entropy(
    section: LossSection,  # noqa: ARG001 - it has no setting of its own
    tag_weights: Tensor | None,
    ignored_tags: Sequence[int],
    reduction: Reduction,
) -> TagLoss:
    return BinaryCrossEntropy(tag_weights, ignored_tags, reduction)


def tag_weights_from_counts(tag_counts: Tensor, power: float) -> Tensor:
    """``count^-power`` scaled to mean 1, [C] float32; a tag that was never counted weighs as if counted once."""
    weights = tag_counts.detach().to(torch.float64).clamp(min=1).pow(-power)
    return (weights / weights.mean()).to(torch.float32)


def create_loss(
    section: LossSection,
    *,
    rating_indices: Sequence[int] = (),
    tag_counts: Tensor | None = None,
    ignored_tags: Sequence[int] = (),
    reduction: Reduction = "sum",
) -> TagLoss | MultiTaskLoss:
    """The loss that a recipe names, with tag names resolved to indices by the caller.

    ``tag_counts`` [C] is how many training images have each tag; needed when ``loss.tag_weight_power`` is above 0.
    ``focal`` takes its one gamma from ``gamma_neg``; only ``asymmetric_focal`` has a ``clip``. With ``rating_weight``
    null the ratings are tags like any other; with a number they are a softmax group of their own.
    """
    tag_weights = None
    if section.tag_weight_power > 0:
        if tag_counts is None:
            raise InputError(f"loss.tag_weight_power={section.tag_weight_power} needs the tag counts; pass tag_counts")
        tag_weights = tag_weights_from_counts(tag_counts, section.tag_weight_power)
    tag_loss = LOSSES.get(section.name)(section, tag_weights, ignored_tags, reduction)
    if section.rating_weight is None:
        return tag_loss
    if len(rating_indices) < 2:
        raise InputError(
            f"loss.rating_weight={section.rating_weight} needs two or more rating tags and the vocabulary has "
            f"{len(rating_indices)}; set loss.rating_weight=null, or vocabulary.ratings=tags on data with ratings"
        )
    return MultiTaskLoss(tag_loss, rating_indices, section.rating_weight)
