"""What one batch asks of the network, as one module: images and their tags in, summed loss out.

Being a module of its own it is what a wrapper for several processes wraps: network, head and loss are one forward
pass. Adds nothing to the state dict of the model, which stays a module that can be saved and scored by itself.
"""

import torch
from torch import Tensor, nn


class TrainingObjective(nn.Module):
    """The summed loss of a batch; `model` gives logits [B, C], `criterion` sums their costs."""

    def __init__(self, model: nn.Module, criterion: nn.Module, chunk_tags: int | None = None) -> None:
        super().__init__()
        if chunk_tags is not None:
            raise ValueError(f"chunk_tags={chunk_tags} is not supported yet; use None")
        self.model, self.criterion = model, criterion

    def forward(self, images: Tensor, valid_sizes: Tensor, tag_indices: Tensor, tag_offsets: Tensor) -> Tensor:
        """Loss of uint8 images [B, 3, H, W] whose content has `valid_sizes` [B, 2], with their flat tag lists.

        A float32 scalar, summed over images; called under the autocast of the run, which ends before the loss.
        """
        logits: Tensor = self.model(images, valid_sizes)
        with torch.autocast(logits.device.type, enabled=False):
            loss: Tensor = self.criterion(logits, tag_indices, tag_offsets)
        return loss
