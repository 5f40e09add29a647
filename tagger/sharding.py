"""Tensors of which each rank holds a part (torch's DTensor), and plain ones, by the same words.

What is saved is whole and what is loaded is cut here, so that a checkpoint is the same file however many ranks there
were. Every function is collective where a tensor is sharded: all ranks call it for the same tensors in the same order.
"""

from typing import Any, cast

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part of it only."""
    # Not by type: importing torch.distributed.tensor takes half a second, which one process need not pay.
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered from all ranks; itself where it is not sharded."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_sharded(tensor) else tensor


def like(source: Tensor, target: Tensor) -> Tensor:
    """`source`, a whole tensor that every rank has, on the device of `target` and cut as that is. Sends nothing."""
    if not is_sharded(target):
        return source
    from torch.distributed.tensor import distribute_tensor

    where = cast(Any, target)
    return distribute_tensor(source.to(target.device), where.device_mesh, where.placements, src_data_rank=None)


@torch.no_grad()
def fill(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor that every rank has into one of any kind, in place."""
    target.copy_(like(source, target))
