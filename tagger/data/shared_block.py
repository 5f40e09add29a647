"""Memory that this process shares with the loader processes it starts.

It has no name in a file system where that can be had, so that nothing is left behind however a process ends, and the
small `/dev/shm` of a container does not limit it. On POSIX the other process inherits the descriptor (`pass_fds`); on
Windows it opens the block by name, and the system frees it with the last process that has it open.
"""

import mmap
import os
import sys
import tempfile
import uuid

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = 4096


class SharedBlock:
    """A block of shared memory, zeros at first. `array` is all of it, uint8 [num_bytes].

    Views of `array` stay valid after `close`: the memory goes when the last of them does.
    """

    def __init__(self, num_bytes: int, handle: int | str, mapped: mmap.mmap) -> None:
        """Use `create` or `attach`."""
        self.num_bytes = num_bytes
        self.handle = handle
        self.array: NDArray[np.uint8] = np.frombuffer(mapped, dtype=np.uint8)

    @classmethod
    def create(cls, num_bytes: int) -> "SharedBlock":
        """A new block; OSError or MemoryError when the system has no room for it."""
        if sys.platform == "win32":
            name = f"tagsmith-{uuid.uuid4().hex}"
            return cls(num_bytes, name, mmap.mmap(-1, num_bytes, tagname=name))
        descriptor = _anonymous_file()
        os.truncate(descriptor, num_bytes)
        return cls(num_bytes, descriptor, mmap.mmap(descriptor, num_bytes))

    @classmethod
    def attach(cls, num_bytes: int, handle: int | str) -> "SharedBlock":
        """The block of another process, by the `handle` that `create` gave it there."""
        if sys.platform == "win32":
            assert isinstance(handle, str)
            return cls(num_bytes, handle, mmap.mmap(-1, num_bytes, tagname=handle))
        assert isinstance(handle, int)
        return cls(num_bytes, handle, mmap.mmap(handle, num_bytes))

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What `subprocess.Popen(pass_fds=...)` must let through for `attach` to work."""
        return (self.handle,) if isinstance(self.handle, int) else ()

    def close(self) -> None:
        """Let go of the block. Calling it again does nothing."""
        if isinstance(self.handle, int):
            os.close(self.handle)
        self.handle = ""
        self.array = np.empty(0, dtype=np.uint8)


def _anonymous_file() -> int:
    if create := vars(os).get("memfd_create"):
        return int(create("tagsmith"))
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
