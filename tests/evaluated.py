"""Images with their tags and a model's logits, as an evaluation hands them out."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from tagger.batch import Batch


def make_batch(tag_lists: Sequence[Sequence[int]], first_row: int = 0, side: int = 16, mirrored: bool = False) -> Batch:
    count = len(tag_lists)
    generator = torch.Generator().manual_seed(first_row)
    return Batch(
        images=torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator),
        tag_indices=torch.tensor([tag for tags in tag_lists for tag in tags], dtype=torch.int32),
        tag_offsets=torch.tensor([0, *itertools.accumulate(map(len, tag_lists))], dtype=torch.int32),
        row_ids=torch.arange(first_row, first_row + count),
        valid_sizes=torch.tensor([[side, side]] * count, dtype=torch.int32),
        mirrored=torch.full((count,), mirrored),
    )


def make_case(
    num_images: int, num_tags: int, seed: int = 0, share: float = 0.2
) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits [N, C] that know something, and the tags of each image."""
    generator = np.random.default_rng(seed)
    shares = share * generator.random(num_tags) ** 2
    truth = generator.random((num_images, num_tags)) < shares
    logits = generator.normal(size=truth.shape) + 2.5 * truth - 2
    return torch.from_numpy(logits).float(), [np.flatnonzero(row).tolist() for row in truth]
