"""Where the scores of an evaluation lie on the host: in memory, or in a mapped temporary file once they are many.

Also brings tensors from a device to the host one batch late, so that no batch waits for its own copy.
"""

import math
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tagger.errors import StorageError

Receive = Callable[[tuple[Tensor, ...]], None]


class HostMemory:
    """Arrays of zeros in memory up to `limit_bytes` together (None: no limit), then in files below `folder`.

    The files are temporary (below the system's folder where `folder` is None) and go when this is closed or collected.
    """

    def __init__(self, limit_bytes: int | None = None, folder: Path | None = None) -> None:
        if limit_bytes is not None and limit_bytes < 0:
            raise ValueError(f"limit_bytes={limit_bytes} is negative; expected bytes of memory, or None for no limit")
        self.limit_bytes = limit_bytes
        self.folder = folder
        self._used = 0
        self._files = 0
        self._temporary: Path | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

    @property
    def temporary_folder(self) -> Path | None:
        """The folder of this one's files; None while everything is in memory."""
        return self._temporary

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array of zeros; raises StorageError where its file has no room."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self.limit_bytes is None or self._used + size <= self.limit_bytes:
            self._used += size
            return np.zeros(shape, dtype)
        try:
            return np.memmap(self._next_file(), dtype=dtype, mode="w+", shape=shape)
        except OSError as error:
            where = self.folder or tempfile.gettempdir()
            raise StorageError(
                f"cannot map {size:,} bytes of scores below {where}: {error}; make room there or name another folder"
            ) from error

    def free(self, array: npt.NDArray[Any]) -> None:
        """Count an array as given back."""
        if not isinstance(array, np.memmap):
            self._used = max(0, self._used - array.nbytes)

    def close(self) -> None:
        """Remove the files; arrays still in use stay readable where the system allows it."""
        if self._finalizer is not None:
            self._finalizer()
        self._temporary = self._finalizer = None

    def _next_file(self) -> Path:
        if self._temporary is None:
            folder = tempfile.TemporaryDirectory(prefix="scores-", dir=self.folder, ignore_cleanup_errors=True)
            self._temporary, self._finalizer = Path(folder.name), weakref.finalize(self, folder.cleanup)
        self._files += 1
        return self._temporary / f"{self._files:05d}.bin"


class LateCopies:
    """Hands tensors to a function once they are on the host: at once on a CPU, one `send` later from a CUDA device.

    Waiting for the batch before costs nothing, as its copy is long done; other devices are waited for.
    """

    def __init__(self) -> None:
        self._waiting: tuple[torch.cuda.Event, tuple[Tensor, ...], Receive] | None = None

    def send(self, tensors: tuple[Tensor, ...], receive: Receive) -> None:
        """Pass the tensors, on the CPU, to `receive`, after those sent before."""
        if all(tensor.device.type != "cuda" for tensor in tensors):
            self.drain()
            receive(tuple(tensor.cpu() for tensor in tensors))
            return
        on_host = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)
        device = next(tensor.device for tensor in tensors if tensor.device.type == "cuda")
        event = torch.cuda.current_stream(device).record_event()
        self.drain()
        self._waiting = (event, on_host, receive)

    def drain(self) -> None:
        """Wait for what is under way and pass it on."""
        if self._waiting is not None:
            event, tensors, receive = self._waiting
            self._waiting = None
            event.synchronize()
            receive(tensors)
