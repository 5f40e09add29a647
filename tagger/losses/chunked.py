"""Head and loss together, some tags at a time: logits [B, C] never exist as a whole.

The forward pass keeps features and head alone; the backward pass makes each chunk's logits again, since slopes worked
out beforehand would know nothing of the loss scale, without which float16 gradients vanish. Costs one more matrix
product of the head. Gradients of gradients are not provided.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tagger.losses.summed import Pricing, compute_dtype


class HeadCost(torch.autograd.Function):
    """Sum of the costs of ``features [B, D] @ weight [C, D].T + bias [C]``; products are in `dtype`, as autocast's."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        pricing: Pricing,
        chunk_tags: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(features, weight, bias)
        ctx.pricing, ctx.chunk_tags, ctx.dtype = pricing, chunk_tags, dtype
        total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=features.device)
        with torch.autocast(features.device.type, enabled=False):
            x = features.to(dtype)
            for first in range(0, len(weight), chunk_tags):
                logits, _ = _logits(x, weight, bias, first, chunk_tags)
                total += pricing.of(logits, first, with_slope=False)[0]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, bias = ctx.saved_tensors
        wanted_x, wanted_w, wanted_b = ctx.needs_input_grad[:3]
        with torch.autocast(features.device.type, enabled=False):
            x = features.to(ctx.dtype)
            # Added up in float32, as within one product.
            grad_x = torch.zeros(x.shape, dtype=compute_dtype(x), device=x.device) if wanted_x else None
            grad_w = torch.empty_like(weight) if wanted_w else None
            grad_b = torch.empty_like(bias) if wanted_b else None
            for first in range(0, len(weight), ctx.chunk_tags):
                tags = slice(first, first + ctx.chunk_tags)
                logits, part = _logits(x, weight, bias, first, ctx.chunk_tags)
                slopes = ctx.pricing.of(logits, first, with_slope=True)[1]
                slopes = (slopes * gradient).to(ctx.dtype)
                if grad_x is not None:
                    grad_x += slopes @ part
                if grad_w is not None:
                    grad_w[tags] = slopes.T @ x
                if grad_b is not None:
                    grad_b[tags] = slopes.sum(dim=0)
        return None if grad_x is None else grad_x.to(features.dtype), grad_w, grad_b, None, None, None


def _logits(x: Tensor, weight: Tensor, bias: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Logits of a chunk of tags, and the chunk's weights in their dtype."""
    part = weight[first : first + count].to(x.dtype)
    return F.linear(x, part, bias[first : first + count].to(x.dtype)), part
