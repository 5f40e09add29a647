"""Counts of an evaluation from all ranks on one: plain arrays over torch.distributed, nothing that runs code.

Refuses images that two ranks have scored, which would count twice.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import orjson
import torch
import torch.distributed as dist
from torch import Tensor

Arrays = Mapping[str, npt.NDArray[np.generic]]
_PIECE_BYTES = 64 << 20


class Counts(Protocol):
    """What is asked of `evaluation_metrics.MetricComputer`."""

    def arrays(self) -> Arrays:
        """All that was counted."""

    def add_arrays(self, arrays: Arrays) -> None:
        """Add what another counted."""

    def per_image(self, name: str) -> npt.NDArray[np.int64]:
        """int64 [N] of "image_ids"."""


def gather_metrics(counts: Counts, destination: int = 0, group: dist.ProcessGroup | None = None) -> bool:
    """Bring every rank's counts to rank `destination` of the group; True there, where `counts` then holds all images.

    A collective call: every rank of the group makes it. The result does not depend on how images were spread over the
    ranks. One rank's arrays are in memory beside those of the destination at a time. Raises ValueError on the
    destination for an image id that came from two ranks. Without a process group there is nothing to do.
    """
    if not dist.is_initialized():
        return True
    own, world = dist.get_rank(group), dist.get_world_size(group)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    for source in range(world):
        if source == destination or own not in (source, destination):
            continue
        if own == source:
            _send(counts.arrays(), destination, group, device)
        else:
            counts.add_arrays(_receive(source, group, device))
    if own != destination:
        return False
    ids, times = np.unique(counts.per_image("image_ids"), return_counts=True)
    if (times > 1).any():
        raise ValueError(f"{int((times > 1).sum())} images were scored by two ranks, e.g. image {ids[times > 1][0]}")
    return True


def _send(arrays: Arrays, destination: int, group: dist.ProcessGroup | None, device: torch.device | str) -> None:
    forms = {name: [array.dtype.str, list(array.shape)] for name, array in arrays.items()}
    header = torch.frombuffer(bytearray(orjson.dumps(forms)), dtype=torch.uint8)
    dist.send(torch.tensor([len(header)]).to(device), group=group, group_dst=destination)
    dist.send(header.to(device), group=group, group_dst=destination)
    for array in arrays.values():
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, len(flat), _PIECE_BYTES):
            # A copy, because a tensor over memory that is mapped for reading only is refused.
            piece = torch.from_numpy(flat[start : start + _PIECE_BYTES].copy())
            dist.send(piece.to(device), group=group, group_dst=destination)


def _receive(source: int, group: dist.ProcessGroup | None, device: torch.device | str) -> Arrays:
    def take(num_bytes: int) -> Tensor:
        piece = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        dist.recv(piece, group=group, group_src=source)
        return piece

    length = torch.zeros(1, dtype=torch.int64, device=device)
    dist.recv(length, group=group, group_src=source)
    forms = orjson.loads(take(int(length)).cpu().numpy().tobytes())
    arrays = {}
    for name, (dtype, shape) in forms.items():
        array = np.empty(shape, dtype)
        flat = array.reshape(-1).view(np.uint8)
        for start in range(0, len(flat), _PIECE_BYTES):
            flat[start : start + _PIECE_BYTES] = take(min(_PIECE_BYTES, len(flat) - start)).cpu().numpy()
        arrays[name] = array
    return arrays
