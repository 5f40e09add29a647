"""What one batch asks of the network, as one module: images and their tags in, summed loss out.

Being a module of its own it is what a wrapper for several processes wraps: network, head and loss are one forward
pass. Adds nothing to the state dict of the model, which stays a module that can be saved and scored by itself. Refuses
chunks of a network that has no `forward_features` and linear `head`.
"""

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from tagger.devices import product_dtype, without_autocast
from tagger.ensemble import networks_in


class TrainingObjective(nn.Module):
    """The summed loss of a batch; `model` gives logits [B, C], `criterion` sums their costs.

    Of an ensemble it is the mean of its members' losses. With `chunk_tags` logits exist that many columns at a time
    (see `criterion.through_head`). Then the model's own `forward` is not called: its `forward_features` gives features
    [B, F], and its `head` is used as weight and bias.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module, chunk_tags: int | None = None) -> None:
        super().__init__()
        if chunk_tags is not None and chunk_tags < 1:
            raise ValueError(f"chunk_tags={chunk_tags} is below 1; use None or a number of tags, e.g. 4096")
        self._networks = networks_in(model)
        divided = all(hasattr(network, "forward_features") and hasattr(network, "head") for network in self._networks)
        if chunk_tags is not None and not divided:
            raise ValueError(f"chunk_tags={chunk_tags} needs a model with forward_features and head; use None")
        self.model, self.criterion, self.chunk_tags = model, criterion, chunk_tags

    def forward(
        self, images: Tensor, valid_sizes: Tensor, tag_indices: Tensor, tag_offsets: Tensor, own_share: float = 1.0
    ) -> Tensor:
        """Loss of uint8 images [B, 3, H, W] whose content has `valid_sizes` [B, 2], with their flat tag lists.

        With an `own_share` below 1 each image is blended with the one before it (the first with the last), and the
        tags of both count in the same shares (mixup, Zhang et al. 2018).
        A float32 scalar, summed over images; called under the autocast of the run, which ends before the loss.
        """
        if own_share < 1.0:
            images = _blend(images, own_share)
            valid_sizes = torch.maximum(valid_sizes, valid_sizes.roll(1, 0))
        losses = [
            self._loss_of(network, images, valid_sizes, tag_indices, tag_offsets, own_share)
            for network in self._networks
        ]
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def _loss_of(
        self,
        network: Any,
        images: Tensor,
        valid_sizes: Tensor,
        tag_indices: Tensor,
        tag_offsets: Tensor,
        own_share: float,
    ) -> Tensor:
        chunked = self.chunk_tags is not None
        loss = functools.partial(self._loss_of_features, network.head) if chunked else self._loss_of_logits
        outputs: Tensor = network.forward_features(images, valid_sizes) if chunked else network(images, valid_sizes)
        total = loss(outputs, tag_indices, tag_offsets)
        if own_share < 1.0:
            # A cost is linear in its target, so the blend of the targets is that of the costs. Turned back by one, row
            # i of the outputs is of the blend that holds image i as the other.
            total = own_share * total + (1.0 - own_share) * loss(outputs.roll(-1, 0), tag_indices, tag_offsets)
        return total

    def _loss_of_logits(self, logits: Tensor, tag_indices: Tensor, tag_offsets: Tensor) -> Tensor:
        with without_autocast(logits):
            loss: Tensor = self.criterion(logits, tag_indices, tag_offsets)
        return loss

    def _loss_of_features(self, head: nn.Linear, features: Tensor, tag_indices: Tensor, tag_offsets: Tensor) -> Tensor:
        dtype = product_dtype(head.weight)
        with without_autocast(features):
            loss: Tensor = cast(Any, self.criterion).through_head(
                features, head.weight, head.bias, tag_indices, tag_offsets, chunk_tags=self.chunk_tags, dtype=dtype
            )
        return loss


def _blend(images: Tensor, own_share: float) -> Tensor:
    """uint8 images, each with the one before it laid over it to the share that it does not keep."""
    own = images.to(torch.float32)
    return own.lerp(own.roll(1, 0), 1.0 - own_share).round_().to(torch.uint8)
