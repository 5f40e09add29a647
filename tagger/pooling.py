"""From tokens to one row of features an image: the mean over all of them, or over each cell of a coarse grid.

Cells keep where something lies for the head to read, which is what icons, X-rays and other pictures in one fixed layout
live on, and they have the same number at any image size. Refuses nothing: the model has checked sizes before it calls.
"""

import torch
from torch import Tensor

from tagger.by_grid import Grid, TensorsByGrid
from tagger.devices import without_autocast


class GridPooling:
    """Means of the patch tokens over `side` x `side` cells of equal size, side by side.

    A token counts in each cell that it overlaps, by the area of the overlap: so any token grid fills any cells. Cells
    divide what the network is given: with a letterbox the square with its bars, with aspect buckets the bucket.
    """

    def __init__(self, side: int) -> None:
        self._side = side
        self._weights = TensorsByGrid(self._cell_weights)

    def __call__(self, tokens: Tensor, grid: Grid, mask: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, side * side * D], cells row by row; N is rows * columns of `grid`, row by row.

        `mask`, bool [B, N], is True where a token counts. `kept`, int64 [B, N], says which tokens of the grid these
        are, where some were left out. A cell without a token that counts is the mean of all that do.
        """
        (weights,) = self._weights(grid, tokens.device, tokens.dtype)
        if kept is not None:
            weights = weights.t()[kept].transpose(1, 2)
        if kept is not None or mask is not None:
            counted = weights.new_ones(1) if mask is None else mask[:, None].to(weights.dtype)
            weights = weights * counted
            weights = torch.where(weights.sum(dim=-1, keepdim=True) > 0, weights, counted)
            weights = weights / weights.sum(dim=-1, keepdim=True)
        with without_autocast(tokens):
            cells: Tensor = weights @ tokens
        return cells.flatten(1)

    def _cell_weights(self, grid: Grid) -> tuple[Tensor]:
        """[cells, rows * columns], float64, each row of sum 1."""
        by_row, by_column = (_axis_weights(length, self._side) for length in grid)
        # What torch.kron gives, for which classic ONNX export has no operator.
        weights = by_row[:, None, :, None] * by_column[None, :, None, :]
        return (weights.reshape(self._side**2, -1),)


def _axis_weights(tokens: int, cells: int) -> Tensor:
    """[cells, tokens]: the share of each cell that each token covers, along one axis."""
    # In units of 1 / (tokens * cells) of the axis every end is a whole number.
    cell = torch.arange(cells, device="cpu")[:, None] * tokens
    token = torch.arange(tokens, device="cpu")[None] * cells
    overlap = torch.minimum(cell + tokens, token + cells) - torch.maximum(cell, token)
    return overlap.clamp(min=0).to(torch.float64) / tokens


def mean_pooling(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """[B, N, D] -> [B, D]: the mean of the tokens, of those that count in `mask`, bool [B, N]."""
    if mask is None:
        return tokens.mean(dim=1)
    weights = mask.to(tokens.dtype)[:, :, None]
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1)
