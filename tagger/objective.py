"""What one batch asks of the network, as one module: images and their tags in, summed loss out.

Being a module of its own it is what a wrapper for several processes wraps: network, head and loss are one forward
pass. Adds nothing to the state dict of the model, which stays a module that can be saved and scored by itself. Refuses
chunks of a model that has no `forward_features` and linear `head`.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn


class TrainingObjective(nn.Module):
    """The summed loss of a batch; `model` gives logits [B, C], `criterion` sums their costs.

    With `chunk_tags` logits exist that many columns at a time (see `criterion.through_head`). Then the model's own
    `forward` is not called: its `forward_features` gives features [B, D], and its `head` is used as weight and bias.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module, chunk_tags: int | None = None) -> None:
        super().__init__()
        if chunk_tags is not None and chunk_tags < 1:
            raise ValueError(f"chunk_tags={chunk_tags} is below 1; use None or a number of tags, e.g. 4096")
        if chunk_tags is not None and not (hasattr(model, "forward_features") and hasattr(model, "head")):
            raise ValueError(f"chunk_tags={chunk_tags} needs a model with forward_features and head; use None")
        self.model, self.criterion, self.chunk_tags = model, criterion, chunk_tags

    def forward(self, images: Tensor, valid_sizes: Tensor, tag_indices: Tensor, tag_offsets: Tensor) -> Tensor:
        """Loss of uint8 images [B, 3, H, W] whose content has `valid_sizes` [B, 2], with their flat tag lists.

        A float32 scalar, summed over images; called under the autocast of the run, which ends before the loss.
        """
        if self.chunk_tags is not None:
            return self._in_chunks(images, valid_sizes, tag_indices, tag_offsets)
        logits: Tensor = self.model(images, valid_sizes)
        with torch.autocast(logits.device.type, enabled=False):
            loss: Tensor = self.criterion(logits, tag_indices, tag_offsets)
        return loss

    def _in_chunks(self, images: Tensor, valid_sizes: Tensor, tag_indices: Tensor, tag_offsets: Tensor) -> Tensor:
        device = images.device.type
        model, criterion = cast(Any, self.model), cast(Any, self.criterion)
        features = model.forward_features(images, valid_sizes)
        weight, bias = model.head.weight, model.head.bias
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            loss: Tensor = criterion.through_head(
                features, weight, bias, tag_indices, tag_offsets, chunk_tags=self.chunk_tags, dtype=dtype
            )
        return loss
