"""Tag lists of many rows, flat (``tag_indices`` and ``tag_offsets``), as coordinates of a [rows, tags] table.

Refuses lists that do not fit the table. On a CPU every fault is a ValueError; elsewhere only what can be seen without
reading device memory is, and what is left fails as the device's own out-of-bounds assertion where the coordinates are
used for indexing: a wrong index never reaches another row's or another tag's cell.
"""

import torch
from torch import Tensor


def tag_coordinates(tag_indices: Tensor, tag_offsets: Tensor, num_rows: int, num_tags: int) -> tuple[Tensor, Tensor]:
    """Row and column of every listed tag, both int64 of ``len(tag_indices)``, without a host sync.

    Both lists are of any integer type; the tags of row ``r`` are ``tag_indices[tag_offsets[r]:tag_offsets[r+1]]``.
    """
    for name, tensor in (("tag_indices", tag_indices), ("tag_offsets", tag_offsets)):
        if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            found = f"{tensor.dtype} of shape {list(tensor.shape)}"
            raise ValueError(f"{name} is {found}; expected integers in one dimension")
    if len(tag_offsets) != num_rows + 1:
        raise ValueError(
            f"tag_offsets has {len(tag_offsets)} entries for {num_rows} rows; expected {num_rows + 1} (rows + 1)"
        )
    if tag_indices.device.type == "cpu" and tag_offsets.device.type == "cpu":
        _check_values(tag_indices, tag_offsets, num_tags)
    positions = torch.arange(len(tag_indices), dtype=tag_offsets.dtype, device=tag_offsets.device)
    rows = torch.searchsorted(tag_offsets[1:].contiguous(), positions, right=True)
    # One place out of bounds for every wrong index: a negative one would count from the end instead of failing, and one
    # far above would be a tag of a later row where rows and columns are packed into one number.
    wrong = (tag_indices < 0) | (tag_indices >= num_tags)
    columns = torch.where(wrong, num_tags, tag_indices.long())
    return rows, columns


def _check_values(tag_indices: Tensor, tag_offsets: Tensor, num_tags: int) -> None:
    if int(tag_offsets[0]) != 0 or int(tag_offsets[-1]) != len(tag_indices):
        raise ValueError(
            f"tag_offsets runs from {int(tag_offsets[0])} to {int(tag_offsets[-1])}; "
            f"expected 0 to {len(tag_indices)}, the number of tag_indices"
        )
    if bool((tag_offsets[1:] < tag_offsets[:-1]).any()):
        raise ValueError("tag_offsets decreases; expected the running total of the rows' tag counts")
    if len(tag_indices):
        low, high = (int(value) for value in torch.aminmax(tag_indices))
        if low < 0 or high >= num_tags:
            raise ValueError(f"tag_indices holds {low if low < 0 else high}; expected 0..{num_tags - 1}")
