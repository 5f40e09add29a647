"""A batch of images and their tags as it travels from the loader to the device.

Tags are indices, not dense targets: 64 images of 20,000 tags are 9 KB as indices and 5 MB as float32.
"""

from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
from torch import Tensor

from tagger.tag_lists import tag_coordinates


@dataclass(frozen=True)
class Batch:
    """B images with their tags.

    images: uint8 [B, 3, H, W], RGB, letterboxed or of one aspect bucket; the content is centred.
    tag_indices: int32 [T], vocabulary indices, ascending and unique within an image.
    tag_offsets: int32 [B + 1]; image i has `tag_indices[tag_offsets[i]:tag_offsets[i + 1]]`.
    row_ids: int64 [B], rows of the metadata index.
    valid_sizes: int32 [B, 2], (height, width) of the content; top = (H - height) // 2, left = (W - width) // 2.
    mirrored: bool [B]; where true, pixels and tags were mirrored together.
    """

    images: Tensor
    tag_indices: Tensor
    tag_offsets: Tensor
    row_ids: Tensor
    valid_sizes: Tensor
    mirrored: Tensor

    @classmethod
    def empty(cls, side: int) -> "Batch":
        """No image of `side` pixels: what goes through a network leaves nothing."""
        indices, rows = torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int64)
        images, sizes = torch.zeros((0, 3, side, side), dtype=torch.uint8), torch.zeros((0, 2), dtype=torch.int32)
        return cls(images, indices, torch.zeros(1, dtype=torch.int32), rows, sizes, torch.zeros(0, dtype=torch.bool))

    def __len__(self) -> int:
        return int(self.images.shape[0])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The batch with every tensor on `device`."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)})

    def dense_targets(self, num_tags: int) -> Tensor:
        """Multi-hot float32 [B, num_tags] on the batch's device; the small form of the tags is what to move."""
        rows, columns = tag_coordinates(self.tag_indices, self.tag_offsets, len(self), num_tags)
        targets = torch.zeros((len(self), num_tags), dtype=torch.float32, device=self.tag_indices.device)
        targets[rows, columns] = 1.0
        return targets

    def with_tags(self, number_of: Tensor) -> "Batch":
        """The batch with tags numbered anew: integers [C], -1 for a tag to leave out, the others in the same order."""
        numbers = number_of[self.tag_indices.long()].to(self.tag_indices.dtype)
        kept = numbers >= 0
        before = torch.cat([torch.zeros(1, dtype=torch.int64, device=kept.device), kept.cumsum(0)])
        offsets = before[self.tag_offsets.long()].to(self.tag_offsets.dtype)
        return replace(self, tag_indices=numbers[kept], tag_offsets=offsets)

    def tag_lists(self, count: int | None = None) -> tuple[tuple[int, ...], ...]:
        """Vocabulary indices of the first `count` images (None: all), image by image; reads back from the device."""
        offsets = self.tag_offsets.tolist()[: None if count is None else count + 1]
        indices = self.tag_indices[: offsets[-1]].tolist()
        return tuple(tuple(indices[start:stop]) for start, stop in pairwise(offsets))
