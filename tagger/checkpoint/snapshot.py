"""Training state copied to host memory, so that training goes on while it is written; and the state of randomness.

Buffers are pinned where the state lies on CUDA and are used again. Memory that is touched for the first time costs more
than the copy itself, so that it is better reserved before the first save.
"""

import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from tagger.checkpoint.format import CheckpointError, Json, Tensors
from tagger.checkpoint.room import tensor_bytes
from tagger.sharding import whole

# What makes two buffers interchangeable: shape, type, and whether the memory is pinned.
_Form: TypeAlias = tuple[torch.Size, torch.dtype, bool]
_Buffers: TypeAlias = dict[_Form, list[Tensor]]


@dataclass(frozen=True)
class HostSnapshot:
    """A copy of training state that nobody changes until it goes back to its pool: tensors by part and name."""

    tensors: Mapping[str, Tensors]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return tensor_bytes(self.tensors)


class SnapshotPool:
    """Makes snapshots and keeps their memory for the next ones. Safe to use from several threads.

    Holds as many sets of buffers as there were snapshots alive at once: one where writing keeps up with saving, one
    more for each save that waits. A tensor takes any free buffer of its shape and type.
    """

    def __init__(self) -> None:
        self._free: _Buffers = {}
        self._lock = threading.Lock()

    def reserve(self, parts: Mapping[str, Tensors], sets: int = 2) -> None:
        """Allocate and touch the memory of that many snapshots of tensors like these, whose values are not read.

        Two are what saving needs while the disk is a little slow: the one being written and the one that waits.
        """
        for _ in range(sets):
            for tensors in parts.values():
                for tensor in tensors.values():
                    buffer = torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                    self._give_back(buffer.fill_(0))

    def capture(self, parts: Mapping[str, Tensors]) -> HostSnapshot:
        """Copy device or host tensors; returns when the copy is complete."""
        devices: set[torch.device] = set()
        copies: dict[str, dict[str, Tensor]] = {}
        for part, tensors in parts.items():
            copies[part] = {}
            for name, tensor in tensors.items():
                buffer = self._take(tensor)
                # Gathered one at a time, so that a device never holds all of a sharded state.
                buffer.copy_(whole(tensor.detach()), non_blocking=tensor.is_cuda)
                copies[part][name] = buffer
                if tensor.is_cuda:
                    devices.add(tensor.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return HostSnapshot(copies)

    def release(self, snapshot: HostSnapshot) -> None:
        """Take back the memory of a snapshot that nobody reads any more."""
        for tensors in snapshot.tensors.values():
            for buffer in tensors.values():
                self._give_back(buffer)

    def _take(self, tensor: Tensor) -> Tensor:
        with self._lock:
            free = self._free.get((tensor.shape, tensor.dtype, tensor.is_cuda))
            if free:
                return free.pop()
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)

    def _give_back(self, buffer: Tensor) -> None:
        form = (buffer.shape, buffer.dtype, buffer.is_pinned())
        with self._lock:
            self._free.setdefault(form, []).append(buffer)


def capture_random_state(device: torch.device) -> tuple[Tensors, dict[str, Json]]:
    """The generators of torch (CPU and `device`), NumPy and Python, as tensors and JSON values."""
    kind, keys, position, has_gauss, gauss = cast(
        tuple[str, "np.ndarray[tuple[int], np.dtype[np.uint32]]", int, int, float], np.random.get_state(legacy=True)
    )
    assert kind == "MT19937"
    version, words, next_gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "python": torch.tensor(words, dtype=torch.int64),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        tensors["mps"] = torch.mps.get_rng_state()
    numbers: dict[str, Json] = {
        "numpy": [int(position), int(has_gauss), float(gauss)],
        "python": [version, next_gauss],
    }
    return tensors, numbers


def restore_random_state(tensors: Tensors, numbers: Mapping[str, Json], device: torch.device) -> list[str]:
    """Put every generator back. Returns the device generators that had no counterpart here or in the checkpoint.

    Raises CheckpointError where a state does not fit its generator: going on with other random numbers would be silent.
    """
    here = {device.type} & {"cuda", "mps"}
    saved = {"cuda", "mps"} & tensors.keys()
    try:
        position, has_gauss, gauss = cast(list[float], numbers["numpy"])
        version, next_gauss = cast(list[float | None], numbers["python"])
        keys = tensors["numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
        random.setstate((version, tuple(tensors["python"].tolist()), next_gauss))
        torch.set_rng_state(tensors["torch"])
        for kind in here & saved:
            if kind == "cuda":
                torch.cuda.set_rng_state(tensors[kind], device)
            else:
                torch.mps.set_rng_state(tensors[kind])
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"the checkpoint's random state cannot be restored ({error})") from error
    return sorted(here ^ saved)
