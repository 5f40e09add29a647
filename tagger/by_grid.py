"""What depends on the token grid of an image alone, worked out once for each grid and kept. Refuses nothing."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Grid: TypeAlias = tuple[int, int]  # rows and columns of tokens


class TensorsByGrid:
    """Tensors that `make` gives for a grid (on the CPU, exact), as the device and dtype of their use want them."""

    def __init__(self, make: Callable[[Grid], tuple[Tensor, ...]]) -> None:
        self._make = make
        self._kept: dict[tuple[Grid, torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    def __call__(self, grid: Grid, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        # While a model is traced or exported, sizes may be symbols, and what is made is part of the trace.
        keeps = all(type(length) is int for length in grid) and not torch.compiler.is_compiling()
        key = (grid, device, dtype)
        if keeps and key in self._kept:
            return self._kept[key]
        # Kept across calls, so these must be ordinary tensors even when first needed under inference mode.
        with torch.inference_mode(False), torch.no_grad():
            made = tuple(tensor.to(dtype).to(device) for tensor in self._make(grid))
        if keeps and all(type(tensor) is Tensor for tensor in made):  # not the shapes without values that count FLOPs
            self._kept[key] = made
        return made
