"""From tokens to one row of features an image: the mean over all of them, or over each cell of a coarse grid.

Cells keep where something lies for the head to read, which is what icons, X-rays and other pictures in one fixed layout
live on; they have the same number at any image size (adaptive average pooling as in "Spatial Pyramid Pooling", He et
al. 2014). Refuses nothing: the model has checked sizes before it calls.
"""

import torch
from torch import Tensor


class GridPooling:
    """Means of the patch tokens over `side` x `side` cells, side by side; keeps the weights of each token grid.

    A token belongs to every cell that it overlaps, in proportion to the overlap: so any token grid fills any cells,
    and one larger grid weighs the parts of an image as a smaller one does.
    """

    def __init__(self, side: int) -> None:
        self._side = side
        self._kept: dict[tuple[tuple[int, int], torch.device, torch.dtype], Tensor] = {}

    def __call__(
        self, tokens: Tensor, grid: tuple[int, int], mask: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """[B, N, D] -> [B, side * side * D], cells row by row; N is rows * columns of `grid`, row by row.

        `mask`, bool [B, N], is True where a token counts; a cell without such a token is 0. `kept`, int64 [B, N], says
        which tokens of the grid these are, where some were left out.
        """
        weights = self._weights(grid, tokens)
        if kept is not None:
            weights = weights.t()[kept].transpose(1, 2)
        if mask is not None:
            weights = weights * mask[:, None].to(weights.dtype)
        if kept is not None or mask is not None:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-6)
        with torch.autocast(tokens.device.type, enabled=False):
            cells: Tensor = weights @ tokens
        return cells.flatten(1)

    def _weights(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """[cells, rows * columns], each row of sum 1."""
        key = (grid, like.device, like.dtype)
        if key in self._kept:
            return self._kept[key]
        # Kept across calls, so it must be an ordinary tensor even when first needed under inference mode.
        with torch.inference_mode(False), torch.no_grad():
            by_row, by_column = (_axis_weights(length, self._side) for length in grid)
            weights = torch.kron(by_row, by_column).to(like.dtype).to(like.device)
        if not torch.compiler.is_compiling():  # a traced tensor must not outlive its trace
            self._kept[key] = weights
        return weights


def _axis_weights(tokens: int, cells: int) -> Tensor:
    """[cells, tokens]: the share of each cell that each token covers, along one axis of length 1."""
    ends = torch.arange(1, cells + 1, dtype=torch.float64, device="cpu")[:, None] / cells
    places = torch.arange(1, tokens + 1, dtype=torch.float64, device="cpu")[None] / tokens
    overlap = torch.minimum(ends, places) - torch.maximum(ends - 1 / cells, places - 1 / tokens)
    return overlap.clamp(min=0.0) * cells


def mean_pooling(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """[B, N, D] -> [B, D]: the mean of the tokens, of those that count in `mask`, bool [B, N]."""
    if mask is None:
        return tokens.mean(dim=1)
    weights = mask.to(tokens.dtype)[:, :, None]
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1)
