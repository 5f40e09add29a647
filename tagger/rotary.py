"""Rotary positions in two dimensions: queries and keys turn by where their patch lies, so that attention sees offsets.

Nothing is learned and nothing is saved. Refuses nothing: the model has checked that four divides the width of a head.
"""

import math
from typing import TypeAlias

import torch
from torch import Tensor

from tagger.by_grid import Grid, TensorsByGrid

# Cosines and sines, [tokens, head_dim / 2] or, where images keep different tokens, [B, 1, tokens, head_dim / 2].
Rotation: TypeAlias = tuple[Tensor, Tensor]

_SLOWEST_PERIOD = 100.0


def rotate(vectors: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys [B, heads, N, head_dim] turned by their tokens' angles; `i` pairs with `i + head_dim / 2`."""
    cosine, sine = rotation
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def rotation_of(rotation: Rotation, kept: Tensor, num_prefix_tokens: int) -> Rotation:
    """The table's rows for the prefix and the patch tokens `kept` [B, K] of each image: [B, 1, prefix + K, ...]."""
    prefix = torch.arange(num_prefix_tokens, device=kept.device).expand(kept.shape[0], -1)
    rows = torch.cat([prefix, kept + num_prefix_tokens], dim=1)
    cosine, sine = rotation
    return cosine[rows][:, None], sine[rows][:, None]


class RotaryTable:
    """The angles of every token of a grid, worked out once for each grid and kept.

    Half of a head's angles follow the row and half the column, with periods from 1 to 100 in geometric steps, after
    DINOv3 (Simeoni et al. 2025): a coordinate runs from -1 to 1 over the image, so the same picture has the same angles
    at any size, and weights of another image size need no change. Deviation: on a grid that is not square both axes
    share one unit (that of the square of equal area), so that a step of one patch is the same turn along either.
    """

    def __init__(self, head_dim: int, num_prefix_tokens: int) -> None:
        self._head_dim = head_dim
        self._num_prefix_tokens = num_prefix_tokens
        self._tables = TensorsByGrid(self._table)

    def __call__(self, grid: Grid, like: Tensor) -> Rotation:
        """Cosines and sines [prefix + rows * columns, head_dim / 2]; class and register tokens stay unturned.

        On the device of `like`, float64 where it is, else float32 (16 bits would blur neighbours).
        """
        cosine, sine = self._tables(grid, like.device, torch.promote_types(like.dtype, torch.float32))
        return cosine, sine

    def _table(self, grid: Grid) -> Rotation:
        angles = self._angles(grid)
        return angles.cos(), angles.sin()

    def _angles(self, grid: Grid) -> Tensor:
        rows, columns = grid
        unit = math.sqrt(rows * columns) / 2
        count = self._head_dim // 4
        steps = torch.arange(count, dtype=torch.float64, device="cpu") / count
        frequencies = 2 * math.pi * _SLOWEST_PERIOD**-steps

        def along(length: int) -> Tensor:
            places = torch.arange(length, dtype=torch.float64, device="cpu") + 0.5 - length / 2
            return (places / unit)[:, None] * frequencies

        by_row = along(rows)[:, None, :].expand(rows, columns, count)
        by_column = along(columns)[None, :, :].expand(rows, columns, count)
        angles = torch.cat([by_row, by_column], dim=-1).reshape(rows * columns, 2 * count)
        return torch.cat([angles.new_zeros(self._num_prefix_tokens, 2 * count), angles])
