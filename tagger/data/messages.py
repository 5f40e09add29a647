"""What a loader and the processes it started say to each other over their pipes, and what they share at the start.

The only pickled bytes of the project: they never leave the pipes and the memory of processes that this one started,
and are never read from a file.
"""

import pickle
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tagger.batch import Batch
from tagger.data.batch_job import Outcome, PreparedBatch
from tagger.data.quarantine_log import KnownBad
from tagger.data.shared_block import SharedBlock

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Begin:
    """To the process: a pass over an epoch begins. What is known of broken files changes between passes."""

    epoch: int
    known_bad: KnownBad


@dataclass(frozen=True)
class Grant:
    """To the process: prepare batch `number` of the pass, samples `start` to `stop`, in the memory of a slot."""

    number: int
    start: int
    stop: int
    slot: int


@dataclass(frozen=True)
class End:
    """To the process: drop what is granted and not yet prepared."""


@dataclass(frozen=True)
class Ready:
    """From the process: it has started."""


@dataclass(frozen=True)
class Done:
    """From the process: a batch is prepared, its images in the slot.

    `rows` int64 are the attempts' rows, in order; `special` the outcomes that are not simply an image used, by place.
    """

    number: int
    shape: tuple[int, ...]
    arrays: dict[str, NDArray[Any]]
    rest: PreparedBatch
    rows: NDArray[np.int64]
    special: dict[int, Outcome]

    @classmethod
    def of(cls, number: int, prepared: PreparedBatch) -> "Done":
        """A prepared batch without its images."""
        batch, outcomes = prepared.batch, prepared.outcomes
        arrays = {} if batch is None else {f.name: getattr(batch, f.name).numpy() for f in fields(batch)}
        images = arrays.pop("images", None)
        return cls(
            number,
            () if images is None else images.shape,
            arrays,
            replace(prepared, batch=None, outcomes=()),
            np.array([outcome.row for outcome in outcomes], dtype=np.int64),
            {place: outcome for place, outcome in enumerate(outcomes) if outcome != Outcome(outcome.row, None)},
        )

    def prepared(self, images: torch.Tensor | None) -> PreparedBatch:
        """The batch again, with its images; None where every one was refused."""
        outcomes = tuple(self.special.get(place) or Outcome(row, None) for place, row in enumerate(self.rows.tolist()))
        if images is None:
            return replace(self.rest, outcomes=outcomes)
        tensors = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        return replace(self.rest, batch=Batch(images=images, **tensors), outcomes=outcomes)


@dataclass(frozen=True)
class Failed:
    """From the process: preparing a batch raised `error`; `trace` is its traceback as text."""

    number: int
    error: BaseException
    trace: str

    @classmethod
    def of(cls, number: int, error: BaseException, trace: str) -> "Failed":
        """An error as it can travel: one that does not survive pickling becomes a RuntimeError with its words."""
        failed = cls(number, error, trace)
        try:
            again = pickle.loads(pickle.dumps(error))
        except Exception as problem:
            words = f"{type(error).__name__}: {error}"
            return cls(number, RuntimeError(words), f"{trace}\n(the error itself cannot be sent: {problem})")
        return failed if type(again) is type(error) else cls(number, RuntimeError(str(error)), trace)


@dataclass(frozen=True)
class Ended:
    """From the process: the pass is over and no slot is written to any more."""


@dataclass(frozen=True)
class LogLine:
    """From the process: a record of its log."""

    name: str
    level: int
    text: str


class Sender:
    """Writes messages to a pipe; safe to use from any thread."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def send(self, message: object) -> None:
        """Write one message; OSError when the other side is gone."""
        content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        with self._lock:
            self._pipe.write(_LENGTH.pack(len(content)) + content)
            self._pipe.flush()


def received(pipe: IO[bytes]) -> Iterator[Any]:
    """The messages of a pipe until its other side is closed or dies, be it in the middle of one."""
    while len(header := pipe.read(_LENGTH.size)) == _LENGTH.size:
        (length,) = _LENGTH.unpack(header)
        content = pipe.read(length)
        if len(content) < length:
            return
        yield pickle.loads(content)


def share(thing: object) -> tuple[SharedBlock, list[int]]:
    """A block that holds `thing` for `shared`, and the sizes of its parts: arrays are shared, not copied."""
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(thing, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(content), *(buffer.raw() for buffer in buffers)]
    sizes = [part.nbytes for part in parts]
    block = SharedBlock.create(_places(sizes)[-1])
    for place, part in zip(_places(sizes), parts, strict=False):
        block.array[place : place + part.nbytes] = np.frombuffer(part, dtype=np.uint8)
    return block, sizes


def shared(block: SharedBlock, sizes: list[int]) -> Any:
    """What was put in the block with `share`; its arrays are read-only views of the block."""
    memory = block.array.data.toreadonly()
    places = _places(sizes)
    parts = [memory[place : place + size] for place, size in zip(places, sizes, strict=False)]
    return pickle.loads(parts[0], buffers=parts[1:])


def _places(sizes: list[int]) -> list[int]:
    """Where each part begins, at multiples of 64 bytes, and where the last one ends (never 0)."""
    places = [0]
    for size in sizes:
        places.append(places[-1] + max(64, -(-size // 64) * 64))
    return places
