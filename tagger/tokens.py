"""From pixels to tokens: the stems of a Vision Transformer, its position embeddings and which tokens hold padding.

Refuses nothing: the model has checked sizes before it calls.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tagger.by_grid import Grid, TensorsByGrid
from tagger.devices import product_dtype, without_autocast

# The middle of a byte: (x - 128) / 128 is exact in every float type down to 8 bits of precision.
_BYTE_MIDDLE = 128.0


class PatchStem(nn.Module):
    """Patches of `patch_size` pixels a side -> tokens: a strided convolution written as one matrix product.

    Takes normalised pixels, or bytes together with their normalisation, which then goes into weight and bias: no image
    in floating point is ever made, and 16-bit products see the pixels without rounding.
    """

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(3 * patch_size * patch_size, embed_dim)

    def forward(self, pixels: Tensor, normalisation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[B, 3, H, W] -> [B, H/P * W/P, D], row by row.

        `pixels` are normalised, or uint8 with `normalisation`: scale and shift of a byte, [3, 1, 1] each.
        """
        side = self.patch_size
        rows, columns = pixels.shape[2] // side, pixels.shape[3] // side
        patches = pixels.reshape(-1, 3, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(-1, rows * columns, 3 * side * side)
        if normalisation is None:
            tokens: Tensor = self.proj(patches)
            return tokens
        centred = patches.to(product_dtype(self.proj.weight)).sub_(_BYTE_MIDDLE).mul_(1 / _BYTE_MIDDLE)
        return F.linear(centred, *self._folded(*normalisation))

    def _folded(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias for (byte - 128) / 128; with plain products, which autocast leaves in float32."""
        by_channel = self.proj.weight.reshape(self.proj.out_features, 3, -1)
        weight = (by_channel * (scale * _BYTE_MIDDLE).reshape(3, 1)).flatten(1)
        bias = self.proj.bias + (by_channel.sum(2) * (shift + scale * _BYTE_MIDDLE).reshape(3)).sum(1)
        return weight, bias


class ResidualStage(nn.Module):
    """Two 3x3 convolutions with batch norm, the first of stride 2, beside a strided 1x1 (He et al. 2016)."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(narrow, wide, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)
        self.skip = nn.Conv2d(narrow, wide, kernel_size=1, stride=2, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H/2, W/2]."""
        inner = F.relu(self.norm1(self.conv1(maps)))
        return F.relu(self.skip(maps) + self.norm2(self.conv2(inner)))


class ConvStem(nn.Module):
    """A strided convolution and residual stages down to the token grid: learns on little data where patches do not.

    After "Early Convolutions Help Transformers See Better" (Xiao et al. 2021), with residual stages in place of single
    convolutions. Batch norm: a layer norm in its place learnt much slower on a small set (docs/experiment-log.md).
    `patch_size` is a power of two, 2 or more.
    """

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        halvings = patch_size.bit_length() - 1
        widths = [max(16, embed_dim >> (halvings - 1 - step)) for step in range(halvings)]
        self.conv = nn.Conv2d(3, widths[0], kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.stages = nn.ModuleList(ResidualStage(narrow, wide) for narrow, wide in itertools.pairwise(widths))
        self.proj = nn.Linear(widths[-1], embed_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, H/P * W/P, D], row by row."""
        # Channels last: the batch norms and strided convolutions of a step take about an eighth less time on a CPU.
        maps = F.relu(self.norm(self.conv(pixels.contiguous(memory_format=torch.channels_last))))
        for stage in self.stages:
            maps = stage(maps)
        tokens: Tensor = self.proj(maps.flatten(2).transpose(1, 2))
        return tokens


def resize_position_embedding(pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Position embeddings [1, rows * columns, D] of one token grid as those of another: bicubic, antialiased."""
    return PositionResizer(old_grid)(pos_embed, new_grid)


class PositionResizer:
    """Resizes position embeddings of one grid to any other, keeping what it worked out for each.

    What is kept are the coefficients, which do not depend on the weights, so nothing goes stale as training moves them.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._matrices = TensorsByGrid(self._axis_matrices)

    def __call__(self, pos_embed: Tensor, new_grid: Grid) -> Tensor:
        """[1, rows * columns, D] of the own grid -> the same of `new_grid`; differentiable."""
        if new_grid == self._grid:
            return pos_embed
        by_row, by_column = self._matrices(new_grid, pos_embed.device, pos_embed.dtype)
        width = pos_embed.shape[-1]
        # Two small products in place of F.interpolate: deterministic backward on CUDA, and plain MatMul nodes in ONNX.
        with without_autocast(pos_embed):
            rows = by_row @ pos_embed.reshape(self._grid[0], self._grid[1] * width)
            resized: Tensor = by_column @ rows.reshape(new_grid[0], self._grid[1], width)
        return resized.reshape(1, new_grid[0] * new_grid[1], width)

    def _axis_matrices(self, new_grid: Grid) -> tuple[Tensor, Tensor]:
        by_row, by_column = (_axis_matrix(old, new) for old, new in zip(self._grid, new_grid, strict=True))
        return by_row, by_column


def _axis_matrix(old: int, new: int) -> Tensor:
    """[new, old], float64: resizing along one axis is linear, so resizing the unit vectors gives its matrix."""
    unit = torch.eye(old, dtype=torch.float64, device="cpu").reshape(1, 1, old, old)
    # Along the width only: torch 2.13 on CPU gets images one pixel wide wrong.
    resized = F.interpolate(unit, size=(old, new), mode="bicubic", align_corners=False, antialias=True)
    return resized.reshape(old, new).t().contiguous()


def draw_kept_tokens(tokens: Tensor, share: float, mask: Tensor | None) -> Tensor:
    """Which tokens each image of [B, N, D] keeps when `share` of them, 0 <= x < 1, is left out: int64 [B, kept].

    Drawn anew from the device's generator. Every image keeps the same number, at least one, so that shapes stay;
    tokens outside `mask`, bool [B, N], go first.
    """
    batch, length = tokens.shape[:2]
    order = torch.rand(batch, length, device=tokens.device)
    if mask is not None:
        order = order + (~mask).to(order.dtype)
    return order.topk(max(1, round(length * (1.0 - share))), largest=False, sorted=False).indices


def content_mask(valid_sizes: Tensor, height: int, width: int, cell: int = 1) -> Tensor:
    """Which cells of `cell` pixels a side hold any image content, for content centred in [height, width] pixels.

    `valid_sizes` [B, 2] are the (h, w) of the content in pixels; returns bool [B, height / cell, width / cell]. A side
    of 0 counts as 1: attention and mean over no cell would be NaN.
    """

    def along(axis: int, length: int) -> Tensor:
        size = valid_sizes[:, axis : axis + 1].to(torch.int64).clamp(min=1)
        first = torch.div(length - size, 2, rounding_mode="floor")
        start = torch.arange(0, length, cell, device=valid_sizes.device)
        return (start < first + size) & (start + cell > first)

    return along(0, height)[:, :, None] & along(1, width)[:, None, :]
