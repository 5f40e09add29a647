"""What a ring of loader processes is made of; tests/integration/test_loader_processes.py runs it."""

import gc
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tagger.batch import Batch
from tagger.data.batch_job import Outcome, PreparedBatch
from tagger.data.messages import Done, Failed, Grant, Sender, received, share, shared
from tagger.data.quarantine import Refusal
from tagger.data.ring import default_num_processes
from tagger.data.shared_block import SharedBlock
from tagger.data.slots import SlotRing
from tagger.errors import DataFailureError, StorageError
from tests.faulty_images import OddError


@pytest.mark.parametrize("without", [(), ("memfd_create",)], ids=["linux", "macos"])
def test_a_block_is_the_same_memory_wherever_it_is_attached(
    monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...]
) -> None:
    for name in without:
        monkeypatch.delattr(os, name, raising=False)
    block = SharedBlock.create(5000)
    assert not block.array.any() and block.array.shape == (5000,)
    other = SharedBlock.attach(block.num_bytes, block.handle)
    other.array[4999] = 7
    assert block.array[4999] == 7


def test_a_view_outlives_its_block() -> None:
    block = SharedBlock.create(100)
    view = torch.from_numpy(block.array[10:20])
    view += 3
    block.close()
    block.close()
    gc.collect()
    assert (view == 3).all()


def test_a_block_leaves_no_descriptor_behind() -> None:
    def open_descriptors() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0  # noqa: PTH112, PTH208

    before = open_descriptors()
    for _ in range(5):
        SharedBlock.create(100).close()
    gc.collect()
    assert open_descriptors() == before


@dataclass(frozen=True)
class Shareable:
    rows: np.ndarray
    name: str
    flags: np.ndarray


def test_what_is_shared_comes_back_with_arrays_that_are_the_block() -> None:
    thing = Shareable(np.arange(1000), "a name", np.zeros(0, dtype=np.bool_))
    block, sizes = share(thing)
    again = shared(SharedBlock.attach(block.num_bytes, block.handle), sizes)
    assert np.array_equal(again.rows, thing.rows) and again.name == thing.name and again.flags.size == 0
    assert not again.rows.flags.writeable and not again.rows.flags.owndata


def test_messages_end_with_the_other_side_even_inside_one() -> None:
    pipe = io.BytesIO()
    sender = Sender(pipe)
    for number in range(3):
        sender.send(Grant(number, 0, 8, 1))
    whole = pipe.getvalue()
    assert [grant.number for grant in received(io.BytesIO(whole))] == [0, 1, 2]
    for cut in (1, 5, 30):
        assert len(list(received(io.BytesIO(whole[:-cut])))) == 2


def prepared_batch(num_images: int) -> PreparedBatch:
    batch = Batch(
        images=torch.zeros((num_images, 3, 4, 6), dtype=torch.uint8),
        tag_indices=torch.tensor([1, 5], dtype=torch.int32),
        tag_offsets=torch.tensor([0, 2, *[2] * (num_images - 1)], dtype=torch.int32),
        row_ids=torch.arange(num_images),
        valid_sizes=torch.ones((num_images, 2), dtype=torch.int32),
        mirrored=torch.zeros(num_images, dtype=torch.bool),
    )
    refusal = Refusal("b.jpg", "truncated", "at byte 7")
    outcomes = (Outcome(3, None), Outcome(9, refusal), Outcome(4, None, partial=True))
    return PreparedBatch(batch, 5, outcomes)


def sent(message: object) -> object:
    pipe = io.BytesIO()
    Sender(pipe).send(message)
    (found,) = received(io.BytesIO(pipe.getvalue()))
    return found


def test_a_prepared_batch_travels_whole() -> None:
    original = prepared_batch(3)
    done = sent(Done.of(7, original))
    assert isinstance(done, Done) and done.number == 7 and done.shape == (3, 3, 4, 6)
    again = done.prepared(original.batch.images)
    for name, tensor in vars(original.batch).items():
        assert torch.equal(vars(again.batch)[name], tensor) and vars(again.batch)[name].dtype == tensor.dtype
    assert again.num_vetoed == 5
    assert again.outcomes == original.outcomes
    assert set(done.special) == {1, 2}


def test_a_batch_of_refused_images_alone_travels_without_images() -> None:
    outcomes = (Outcome(3, Refusal("a.jpg", "missing")),)
    done = sent(Done.of(0, PreparedBatch(None, 0, outcomes)))
    assert done.shape == ()
    again = done.prepared(None)
    assert again.batch is None and again.outcomes[0].refused.reason == "missing"


@pytest.mark.parametrize("error", [StorageError("gone"), DataFailureError("too many"), AssertionError("held out")])
def test_errors_keep_their_type(error: BaseException) -> None:
    failed = sent(Failed.of(2, error, "trace"))
    assert type(failed.error) is type(error) and str(failed.error) == str(error) and failed.trace == "trace"


def test_an_error_that_cannot_travel_keeps_its_words() -> None:
    failed = sent(Failed.of(2, OddError("salt", "pepper"), "trace"))
    assert type(failed.error) is RuntimeError
    assert str(failed.error) == "OddError: salt and pepper" and "cannot be sent" in failed.trace


@pytest.mark.parametrize(
    ("cores", "on_cuda", "expected"),
    [(64, False, 0), (2, True, 0), (4, True, 1), (15, True, 1), (16, True, 2), (128, True, 2)],
)
def test_the_number_of_processes_follows_device_and_cores(cores: int, on_cuda: bool, expected: int) -> None:
    number, reason = default_num_processes(cores, on_cuda=on_cuda)
    assert number == expected
    assert "CUDA" in reason or "cores" in reason


# Slots


def fill(ring: SlotRing, value: int) -> int:
    slot = ring.take()
    ring._memory[slot] = value
    return slot


def test_a_slot_is_used_again_when_no_tensor_is_left_on_it() -> None:
    ring = SlotRing(4096, 12, 2, pin=False)
    seen = set()
    for value in range(20):
        slot = fill(ring, value)
        tensor = ring.lend(slot, (4, 3))
        view = tensor[1:2]
        del tensor
        assert (view == value).all()
        seen.add(view.data_ptr() // ring.slot_bytes)
        del view
    assert len(seen) <= 4


def test_batches_kept_beyond_two_are_copied_so_that_the_ring_never_waits() -> None:
    ring = SlotRing(0, 12, 2, pin=False)
    kept = [ring.lend(fill(ring, value), (4, 3)) for value in range(50)]
    assert all((tensor == value).all() for value, tensor in enumerate(kept))
    assert sum(np.shares_memory(tensor.numpy(), ring._memory) for tensor in kept) == 2
    del kept[:2]
    assert np.shares_memory(ring.lend(fill(ring, 1), (4, 3)).numpy(), ring._memory)
    assert [ring.take() for _ in range(2)]


def test_tensors_outlive_the_ring() -> None:
    ring = SlotRing(4096, 12, 2, pin=False)
    kept = ring.lend(fill(ring, 8), (12,))
    ring.close()
    ring.close()
    del ring
    gc.collect()
    assert (kept == 8).all()


class Cuda:
    """Stands in for the parts of CUDA that page-locked memory needs; `done` is how far the device has come."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.locked: dict[int, int] = {}
        self.recorded = 0
        self.done = 0

    def cudaHostRegister(self, address: int, size: int, _flags: int) -> int:
        if not self.code:
            self.locked[address] = size
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0

    def event(self) -> SimpleNamespace:
        event = SimpleNamespace(number=0)

        def record() -> None:
            self.recorded += 1
            event.number = self.recorded

        def synchronize() -> None:
            self.done = max(self.done, event.number)

        event.record, event.synchronize, event.query = record, synchronize, lambda: event.number <= self.done
        return event


@pytest.fixture
def make_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cuda]:
    def make(code: int = 0) -> Cuda:
        cuda = Cuda(code)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "Event", cuda.event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        return cuda

    return make


def test_pages_are_locked_and_unlocked(make_cuda: Callable[..., Cuda]) -> None:
    cuda = make_cuda()
    ring = SlotRing(4096, 5000, 2, pin=True)
    assert list(cuda.locked.values()) == [4 * 8192]
    ring.close()
    ring.close()
    assert not cuda.locked


def test_pages_that_cannot_be_locked_are_used_unlocked(
    make_cuda: Callable[..., Cuda], caplog: pytest.LogCaptureFixture
) -> None:
    make_cuda(code=2)
    ring = SlotRing(4096, 12, 2, pin=True)
    assert "page-locked (CUDA error 2)" in caplog.text
    assert (ring.lend(fill(ring, 4), (12,)) == 4).all()
    ring.close()


def test_a_slot_waits_for_the_copy_to_the_device(make_cuda: Callable[..., Cuda]) -> None:
    cuda = make_cuda()
    ring = SlotRing(0, 12, 2, pin=True)
    first = ring.lend(fill(ring, 1), (12,))
    address = first.data_ptr()
    del first
    held = ring.lend(fill(ring, 2), (12,))
    assert cuda.done == 0  # one slot was left, so nothing waited
    third = ring.lend(fill(ring, 3), (12,))
    assert cuda.done == 1  # none was left: it waited for the first copy rather than copy here
    assert np.shares_memory(third.numpy(), ring._memory) and len({address, held.data_ptr(), third.data_ptr()}) == 3
    ring.close()
