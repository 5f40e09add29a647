"""A loader thread that hangs: it cannot be ended, so it is named, and a run that waits in vain ends."""

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dataset_loader import DataLoader
from tagger.data import prefetch, thread_pass
from tagger.data.batch_job import ImageSource, LoadedImage
from tagger.errors import StorageError
from tests.tiny_dataset import assert_same, epoch_of, loaders, path_of, rows_of


@dataclasses.dataclass(frozen=True)
class StuckImages(ImageSource):
    """One row that waits until `released`, as a read from a dead disk does; `met` is set once it is waited for."""

    row: int = -1
    met: threading.Event = dataclasses.field(default_factory=threading.Event)
    released: threading.Event = dataclasses.field(default_factory=threading.Event)

    def load_into(self, row: int, memory: NDArray[np.uint8], *, mirror: bool) -> LoadedImage:
        if row == self.row:
            self.met.set()
            self.released.wait()
        return super().load_into(row, memory, mirror=mirror)


MakeStuck = Callable[[DataLoader, int], StuckImages]


@pytest.fixture
def make_stuck() -> Iterator[MakeStuck]:
    """Have a loader hang at a row until the test, at the latest, ends; no thread is left then."""
    made: list[StuckImages] = []

    def make(loader: DataLoader, row: int) -> StuckImages:
        images = loader._source.images
        facts = {field.name: getattr(images, field.name) for field in dataclasses.fields(images)}
        made.append(StuckImages(**facts, row=row))
        loader._source = dataclasses.replace(loader._source, images=made[-1])
        return made[-1]

    yield make
    for images in made:
        images.released.set()
    for thread in threading.enumerate():
        if thread.name.startswith("loader-"):
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def quick_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert thread_pass.HANG_S < 60 < thread_pass.END_S
    monkeypatch.setattr(prefetch, "_WAKE_S", 0.01)
    monkeypatch.setattr(prefetch, "_JOIN_S", 0.05)
    monkeypatch.setattr(thread_pass, "HANG_S", 0.1)


@pytest.mark.usefixtures("quick_waits")
def test_it_is_named_once_with_its_stack_and_the_bytes_are_those_of_an_undisturbed_pass(
    root: Path, make_stuck: MakeStuck, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = loaders(root)[0]
    expected = epoch_of(loader)
    row = rows_of(expected)[17]
    stuck = make_stuck(loader, row)
    # As soon as it is said, and twice that time has passed, the disk comes back.
    inner, looks = thread_pass._Watch.look, 0

    def look(watch: thread_pass._Watch) -> None:
        nonlocal looks
        inner(watch)
        looks += bool(caplog.records)
        if looks == 20:
            stuck.released.set()

    monkeypatch.setattr(thread_pass._Watch, "look", look)
    assert_same(epoch_of(loader), expected)
    assert looks >= 20
    (record,) = [record for record in caplog.records if "no image was loaded" in record.getMessage()]
    line, *stack = record.getMessage().splitlines()
    assert record.levelno == logging.ERROR
    assert str(path_of(loader, row)) in line and "for 0 s" in line and "data.num_processes=1" in line
    assert line.count(str(root)) == 1  # the others had nothing left to do
    assert "self.released.wait()" in "".join(stack)


@pytest.mark.usefixtures("quick_waits")
def test_a_run_that_waits_in_vain_ends_with_the_file_in_hand(
    root: Path, make_stuck: MakeStuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread_pass, "END_S", 0.3)
    loader = loaders(root)[0]
    expected = epoch_of(loader)
    row = rows_of(expected)[17]
    stuck = make_stuck(loader, row)
    found = []
    with pytest.raises(StorageError, match="no image was loaded for 0 s, loading ") as caught:
        found.extend(loader)
    assert str(path_of(loader, row)) in str(caught.value)
    assert stuck.met.is_set() and not stuck.released.is_set()
    assert_same(found, expected[:2])


@pytest.mark.usefixtures("quick_waits")
def test_a_slow_loader_that_moves_is_not_taken_for_a_hung_one(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every image takes less than the limit, a batch several times that."""
    monkeypatch.setattr(thread_pass, "HANG_S", 0.25)
    monkeypatch.setattr(thread_pass, "END_S", 0.5)
    inner = ImageSource.load_into

    def slowly(self: ImageSource, row: int, memory: NDArray[np.uint8], *, mirror: bool) -> LoadedImage:
        threading.Event().wait(0.05)
        return inner(self, row, memory, mirror=mirror)

    loader = loaders(root, data__num_threads=1, training__batch_size=16)[0]
    monkeypatch.setattr(ImageSource, "load_into", slowly)
    next(iter(loader))
    assert "no image was loaded" not in caplog.text
