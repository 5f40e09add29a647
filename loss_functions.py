"""What training minimises: losses of tag logits against multi-hot targets or tag lists.

A tag loss is one cost per logit, summed. The cost of a logit depends on how far it errs: with ``z`` the logit pointing
to the wrong answer (``x`` where the tag is absent, ``-x`` where it is present),

    cost(z) = weight * q^gamma * -log(1 - q),    q = max(sigmoid(z + shift) - margin, 0)

Most losses are settings of the two sides (tagger/losses/costs.py has the formulas). Costs are computed in float32 at
least (float64 stays float64), also under autocast, and are finite with finite gradients for |logit| up to 1e4. The
gradient is the whole derivative of the cost, worked out beside it; for logits of 16 bits it is rounded to bfloat16.
A NaN logit makes the loss NaN. Refuses tensors whose shapes or ranges do not fit, and settings outside their range;
gradients of gradients are not provided.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from Configuration_System import LossSection
from tagger.errors import InputError
from tagger.losses.chunked import HeadCost
from tagger.losses.costs import CostRule, FocalCost, HillCost
from tagger.losses.summed import Pricing, SummedCost, Targets, compute_dtype
from tagger.registry import Registry
from tagger.tag_lists import tag_coordinates

Reduction = Literal["sum", "mean"]

# Below this a margin no longer bounds the logarithm in float32.
_SMALLEST_MARGIN = 1e-30


def _check_logits(logits: Tensor) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype} of shape {list(logits.shape)}; expected floats of shape [B, C]")


def _read_targets(shape: torch.Size, device: torch.device, targets: Tensor, tag_offsets: Tensor | None) -> Targets:
    """Check either form of targets against the logits; values are checked on a CPU only, to spare a device sync."""
    for name, tensor in (("targets", targets), ("tag_offsets", tag_offsets)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and logits on {device}; move them to one device")
    if tag_offsets is not None:
        rows, columns = tag_coordinates(targets, tag_offsets, *shape)
        return Targets(rows=rows, columns=columns)
    if targets.shape != shape:
        raise ValueError(
            f"targets have shape {list(targets.shape)} and logits {list(shape)}; expected one shape [B, C], "
            "or a flat list of tag indices together with tag_offsets"
        )
    if targets.device.type == "cpu" and targets.dtype != torch.bool and targets.numel():
        low, high = (float(value) for value in torch.aminmax(targets.detach()))
        if not (low >= 0 and high <= 1):
            raise ValueError(f"targets run from {low:g} to {high:g}; expected 0 (absent) to 1 (present)")
    return Targets(dense=targets.detach())


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
    limit: Tensor | None
    compiled = False

    def __init__(
        self,
        rule: CostRule,
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
        self.rule = rule
        self.reduction: Reduction = reduction
        self.register_buffer(
            "tag_weights", None if tag_weights is None else tag_weights.detach().clone(), persistent=False
        )
        self.register_buffer("ignored", None, persistent=False)
        self.register_buffer("limit", None, persistent=False)
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
        pricing = self._pricing(logits.shape, logits.device, targets, tag_offsets)
        with_slope = logits.requires_grad and torch.is_grad_enabled()
        total: Tensor = SummedCost.apply(logits, pricing, with_slope)  # type: ignore[no-untyped-call]
        return self._reduced(total, *logits.shape)

    def through_head(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        tag_indices: Tensor,
        tag_offsets: Tensor,
        *,
        chunk_tags: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """``forward`` of ``features [B, D] @ weight [C, D].T + bias [C]``, worked out in ``dtype``.

        At most ``chunk_tags`` columns of logits exist at a time, in the forward pass and again in the backward pass.
        """
        shape = torch.Size((features.shape[0], weight.shape[0]))
        pricing = self._pricing(shape, features.device, tag_indices, tag_offsets)
        total: Tensor = HeadCost.apply(  # type: ignore[no-untyped-call]
            features, weight, bias, pricing, chunk_tags, dtype
        )
        return self._reduced(total, *shape)

    def _pricing(self, shape: torch.Size, device: torch.device, targets: Tensor, tag_offsets: Tensor | None) -> Pricing:
        num_tags = shape[1]
        if self.tag_weights is not None and len(self.tag_weights) != num_tags:
            raise ValueError(f"tag_weights are for {len(self.tag_weights)} tags and logits have {num_tags}")
        if self.ignored_tags and self.ignored_tags[-1] >= num_tags:
            raise ValueError(f"ignored_tags holds {self.ignored_tags[-1]} and logits have {num_tags} tags")
        wanted = _read_targets(shape, device, targets, tag_offsets)
        ignored = None
        if self.ignored is not None:
            ignored = torch.zeros(num_tags, dtype=torch.bool, device=device).index_fill_(0, self.ignored, True)
        limit = self.limit if torch.is_grad_enabled() else None
        return Pricing(self.rule, wanted, num_tags, self.tag_weights, ignored, limit, self.compiled)

    def _reduced(self, total: Tensor, num_rows: int, num_tags: int) -> Tensor:
        if self.reduction == "sum":
            return total
        counted = num_rows * (num_tags - len(self.ignored_tags))
        if counted == 0:
            raise ValueError(
                f"no cost to average over: {num_rows} rows, {len(self.ignored_tags)} of {num_tags} ignored"
            )
        return total / counted

    def use_compiled(self) -> None:
        """Work out all costs in one compiled loop from here on; for where torch.compile works on the logits' device."""
        self.compiled = True

    def begin_epoch(self, epoch: int) -> None:
        """Tell a loss that changes in the course of training which epoch, from 0, comes now; the others do nothing."""

    def extra_repr(self) -> str:
        return f"{self.rule}, reduction={self.reduction!r}"


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
        super().__init__(
            CostRule(FocalCost(gamma_pos), FocalCost(gamma_neg, margin=clip)), tag_weights, ignored_tags, reduction
        )


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
        rule = CostRule(FocalCost(gamma, weight=present), FocalCost(gamma, weight=absent))
        super().__init__(rule, tag_weights, ignored_tags, reduction)


class BinaryCrossEntropy(TagLoss):
    """``-y log(p) - (1-y) log(1-p)``."""

    def __init__(
        self, tag_weights: Tensor | None = None, ignored_tags: Sequence[int] = (), reduction: Reduction = "sum"
    ) -> None:
        super().__init__(CostRule(FocalCost(0.0), FocalCost(0.0)), tag_weights, ignored_tags, reduction)


# Of Hill loss and SPLC, in the paper and its authors' code: focus and logit shift of the present tags.
_MISSING_GAMMA, _MISSING_SHIFT = 2.0, 1.0


class HillLoss(TagLoss):
    """Hill loss (Zhang et al. 2021), for images on which many tags are missing: ``(height - p) p^2`` for absent tags.

    Confident mistakes on absent tags weigh little, as they may be tags that were forgotten. Present tags have the focal
    margin loss, ``-(1-pm)^gamma log(pm)`` with ``pm = sigmoid(x - shift)``. With height 1.5, the paper's, an absent
    tag's cost is steepest by p at 0.5.
    """

    def __init__(
        self,
        height: float = 1.5,
        gamma: float = _MISSING_GAMMA,
        shift: float = _MISSING_SHIFT,
        tag_weights: Tensor | None = None,
        ignored_tags: Sequence[int] = (),
        reduction: Reduction = "sum",
    ) -> None:
        _check_gamma(gamma=gamma, shift=shift)
        if not (math.isfinite(height) and height >= 1):
            raise ValueError(f"height={height} is below 1 or not finite, which makes costs negative; 1.5 is usual")
        rule = CostRule(FocalCost(gamma, shift=shift), HillCost(height))
        super().__init__(rule, tag_weights, ignored_tags, reduction)


class SelfPacedCorrectionLoss(TagLoss):
    """SPLC (Zhang et al. 2021): absent tags that the network is sure of are taken for forgotten ones.

    Present tags have the focal margin loss (see ``HillLoss``), absent ones focal loss; an absent tag with a probability
    above ``correct_above`` costs what a present one would, without the shift, as in the authors' code. That begins with
    the second epoch that ``begin_epoch`` tells of, and holds only where a gradient is worked out: a validation loss is
    always that of the tags as they are listed.
    """

    def __init__(
        self,
        correct_above: float = 0.6,
        gamma: float = _MISSING_GAMMA,
        shift: float = _MISSING_SHIFT,
        tag_weights: Tensor | None = None,
        ignored_tags: Sequence[int] = (),
        reduction: Reduction = "sum",
    ) -> None:
        _check_gamma(gamma=gamma, shift=shift)
        if not 0 < correct_above < 1:
            raise ValueError(f"correct_above={correct_above} is not between 0 and 1; 0.6 is usual")
        rule = CostRule(FocalCost(gamma, shift=shift), FocalCost(gamma), FocalCost(gamma))
        super().__init__(rule, tag_weights, ignored_tags, reduction)
        self.correct_above = correct_above
        self.correcting = False
        # On the device and not a number, so that compiled costs need not be compiled anew when correction begins.
        self.limit = torch.tensor(math.inf)

    def begin_epoch(self, epoch: int) -> None:
        """Correct from epoch 1 on, the second."""
        if self.correcting != (epoch >= 1) and self.limit is not None:
            self.correcting = epoch >= 1
            logit = math.log(self.correct_above) - math.log1p(-self.correct_above)
            self.limit.fill_(logit if self.correcting else math.inf)


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
        self._check_ratings(logits.shape[1])
        tag_part: Tensor = self.tag_loss(logits, targets, tag_offsets)
        wanted = _read_targets(logits.shape, logits.device, targets, tag_offsets)
        return tag_part + self._rating_part(logits.index_select(1, self.rating_indices), wanted)

    def through_head(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        tag_indices: Tensor,
        tag_offsets: Tensor,
        *,
        chunk_tags: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """See ``TagLoss.through_head``; the logits of the ratings are one more chunk."""
        self._check_ratings(len(weight))
        tag_part = self.tag_loss.through_head(
            features, weight, bias, tag_indices, tag_offsets, chunk_tags=chunk_tags, dtype=dtype
        )
        rows, columns = tag_coordinates(tag_indices, tag_offsets, len(features), len(weight))
        own = (tensor.index_select(0, self.rating_indices).to(dtype) for tensor in (weight, bias))
        return tag_part + self._rating_part(F.linear(features.to(dtype), *own), Targets(rows=rows, columns=columns))

    def _check_ratings(self, num_tags: int) -> None:
        if self._last_rating >= num_tags:
            raise ValueError(f"rating_indices holds {self._last_rating} and logits have {num_tags} tags")

    def _rating_part(self, logits: Tensor, targets: Targets) -> Tensor:
        dtype = compute_dtype(logits)
        wanted = self._rating_targets(targets, len(logits), dtype)
        rated = wanted.sum(dim=1, keepdim=True)
        shares = wanted / rated.clamp(min=torch.finfo(dtype).tiny)
        total = -(shares * F.log_softmax(logits.to(dtype), dim=1)).sum()
        if self.tag_loss.reduction == "mean":
            total = total / (rated > 0).sum().clamp(min=1)
        return self.rating_weight * total

    def use_compiled(self) -> None:
        """See ``TagLoss``."""
        self.tag_loss.use_compiled()

    def begin_epoch(self, epoch: int) -> None:
        """See ``TagLoss``."""
        self.tag_loss.begin_epoch(epoch)

    def _rating_targets(self, targets: Targets, num_rows: int, dtype: torch.dtype) -> Tensor:
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


@LOSSES.register("hill")
def _hill(
    section: LossSection,  # noqa: ARG001 - it has no setting of its own
    tag_weights: Tensor | None,
    ignored_tags: Sequence[int],
    reduction: Reduction,
) -> TagLoss:
    return HillLoss(tag_weights=tag_weights, ignored_tags=ignored_tags, reduction=reduction)


@LOSSES.register("splc")
def _splc(
    section: LossSection, tag_weights: Tensor | None, ignored_tags: Sequence[int], reduction: Reduction
) -> TagLoss:
    return SelfPacedCorrectionLoss(
        section.correct_above, tag_weights=tag_weights, ignored_tags=ignored_tags, reduction=reduction
    )


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
    ``focal`` takes its one gamma from ``gamma_neg``; only ``asymmetric_focal`` has a ``clip``; ``hill`` and ``splc``
    have the gamma and shift of their paper. With ``rating_weight`` null the ratings are tags like any other; with a
    number they are a softmax group of their own.
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
