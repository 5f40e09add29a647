"""The norm of a gradient, and what to divide it by where it exceeds a limit. Nothing waits for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from tagger.sharding import whole


@torch.no_grad()
def norm_and_divisor(
    gradients: Sequence[Tensor], limit: float | None, loss_scale: Tensor, num_members: int = 1
) -> tuple[Tensor, Tensor]:
    """The norm, float32, and what the gradients are to be divided by: the loss scale, and more above `limit`.

    Of an ensemble (one member's gradients after the other's, as many of each, of the mean of the members' losses) each
    member is held to the limit by itself, as if it were alone; the norm is their mean. Then gradients change in place.
    """
    if num_members == 1:
        norm = whole(get_total_norm(gradients)).float() / loss_scale
        return norm, loss_scale if limit is None else loss_scale * _excess(norm, limit)
    size = len(gradients) // num_members
    members = [gradients[start : start + size] for start in range(0, len(gradients), size)]
    norms = [whole(get_total_norm(member)).float() * num_members / loss_scale for member in members]
    if limit is not None:
        for member, norm in zip(members, norms, strict=True):
            torch._foreach_div_(list(member), _excess(norm, limit))
    return torch.stack(norms).mean(), loss_scale


def _excess(norm: Tensor, limit: float) -> Tensor:
    return ((norm + 1e-6) / limit).clamp(min=1.0)
