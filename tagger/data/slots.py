"""The slots of a ring of shared memory: which are free, which the consumer still has tensors on.

The ring never waits for the consumer: two slots may be in its hands, and a batch that it would keep beyond those is
copied to memory of its own. Where the ring is page-locked for CUDA, a slot that is let go is used again only after what
the device had to do until then, because a copy to the device may still be reading it.
"""

import logging
import math
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tagger.data.prefetch import BufferPool
from tagger.data.shared_block import PAGE_BYTES, SharedBlock

logger = logging.getLogger(__name__)

_HELD = 2
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device of the process


class SlotRing:
    """`max_in_flight` slots to be filled and two in the consumer's hands. Not safe from several threads, except that
    tensors may die anywhere."""

    def __init__(self, head_bytes: int, batch_bytes: int, max_in_flight: int, *, pin: bool) -> None:
        """`head_bytes`, whole pages, come before the slots, each of `batch_bytes` rounded up to whole pages."""
        self.slot_bytes = -(-batch_bytes // PAGE_BYTES) * PAGE_BYTES
        num_slots = max_in_flight + _HELD
        self.block = SharedBlock.create(head_bytes + num_slots * self.slot_bytes)
        self._memory = self.block.array[head_bytes:].reshape(num_slots, self.slot_bytes)
        self._free = deque(range(num_slots))
        # Slots that no tensor is left on, with the event after which they may be used.
        self._returned: deque[tuple[int, Any]] = deque()
        self._num_lent = 0
        self._copies = BufferPool(batch_bytes, num_slots)
        self._pinned = pin and self._register()

    def take(self) -> int:
        """A slot to be filled; there is one as long as no more than `max_in_flight` are."""
        return self._free.popleft()

    def free(self, slot: int) -> None:
        """A slot that was taken and is not lent."""
        self._free.append(slot)

    def lend(self, slot: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The uint8 tensor of a shape in a filled slot; the slot is free when no tensor on it is left."""
        self._reclaim()
        memory = self._memory[slot, : math.prod(shape)]
        if self._num_lent == _HELD:
            self._free.append(slot)
            copied, array = self._copies.take(shape)
            array[...] = memory.reshape(shape)
            return copied
        self._num_lent += 1
        lent: NDArray[np.uint8] = memory.reshape(shape)
        # The finalizer runs wherever the last reference dies; deque operations are atomic.
        weakref.finalize(lent, _give_back, self._returned, slot, self._pinned).atexit = False
        return torch.from_numpy(lent)

    def close(self) -> None:
        """Unlock the pages and let go of the memory; tensors on it stay valid. Calling it again does nothing."""
        if self._pinned:
            torch.cuda.synchronize()
            self._pinned = False
            address = self._memory.ctypes.data
            _check(torch.cuda.cudart().cudaHostUnregister(address), "unlocked")  # type: ignore[no-untyped-call]
        self._memory = np.empty((0, self.slot_bytes), dtype=np.uint8)
        self.block.close()

    def _reclaim(self) -> None:
        """Free the returned slots that the device is done with; wait for the first where all are lent."""
        while self._returned:
            slot, event = self._returned[0]
            if event is not None and not event.query():
                if self._num_lent < _HELD:
                    return
                event.synchronize()
            self._returned.popleft()
            self._free.append(slot)
            self._num_lent -= 1

    def _register(self) -> bool:
        address, size = self._memory.ctypes.data, self._memory.nbytes
        return _check(torch.cuda.cudart().cudaHostRegister(address, size, _PORTABLE), "locked")  # type: ignore[no-untyped-call]


def _give_back(returned: deque[tuple[int, Any]], slot: int, pinned: bool) -> None:
    event = None
    if pinned:
        # On the stream that copies: a batch that is copied on another one must be kept until that is done.
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
    returned.append((slot, event))


def _check(code: Any, done: str) -> bool:
    if int(code) != 0:
        logger.warning(
            "the loader's memory cannot be page-%s (CUDA error %d); copies to the GPU are slower", done, code
        )
    return int(code) == 0
