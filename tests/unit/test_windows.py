"""Accumulation windows cover every batch once, from any position, through every phase."""

from collections.abc import Generator, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tagger.batch import Batch
from tagger.data.batch_plan import BatchPlan, BucketPlan, PlainPlan
from tagger.data.epoch_order import EpochOrder
from tagger.data.phases import PhasePlan
from tagger.data.position import Position, PositionError
from tagger.data.sampler import RowSampler
from tagger.data.windows import Feed, Window, accumulation_windows
from tagger.errors import DataFailureError
from tagger.preprocess import Preprocess

SQUARE = (8, 8)


class MemoryLoader:
    """A plan's batches, of empty images whose row ids are their places in the epoch."""

    def __init__(self, plan: BatchPlan) -> None:
        num_rows = len(plan.sampler)
        self.order = EpochOrder(plan, {"seed": plan.sampler.seed or -1, "rows": num_rows, "rows_hash": 0})
        self.epoch, self.start = 0, 0
        self.log: list[str] = []

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def seek(self, position: Mapping[str, int]) -> None:
        self.epoch, self.start = position["epoch"], self.order.sample_at(position)

    def __iter__(self) -> Generator[tuple[Batch, Position], None, None]:
        start, self.start = self.start, 0
        self.log.append("iterate")
        for span in self.order.plan.spans(start):
            empty = torch.zeros(0, dtype=torch.int32)
            images = torch.zeros(span.stop - span.start, 3, 1, 1, dtype=torch.uint8)
            places = torch.arange(span.start, span.stop)
            yield Batch(images, empty, empty, places, empty, empty), self.order.position(span.done, self.epoch)

    def close(self) -> None:
        self.log.append("close")


def plain(num_images: int, batch_size: int, *, keep_last: bool = False) -> MemoryLoader:
    sampler = RowSampler(np.arange(num_images), None if keep_last else 7)
    return MemoryLoader(PlainPlan(sampler, min(batch_size, num_images), ((num_images, SQUARE),)))


def feed_of(loaders: list[MemoryLoader], shares: list[float], num_epochs: int, size: int) -> Feed:
    return Feed(loaders, PhasePlan.create(shares, num_epochs, [loader.order for loader in loaders]), size)


def one_phase(num_images: int, batch_size: int, num_epochs: int, size: int) -> Feed:
    return feed_of([plain(num_images, batch_size, keep_last=True)], [1.0], num_epochs, size)


def places(window: Window) -> list[int]:
    return [place for batch in window.batches for place in batch.row_ids.tolist()]


def windows_of(feed: Feed, position: Position | None = None, epoch: int = 0) -> list[Window]:
    windows = list(accumulation_windows(feed, position, epoch))
    left = feed.left(position, epoch)
    for phase in range(len(feed.loaders)):
        own = [window for window in windows if window.phase == phase]
        assert left[phase] == len(own)
    return windows


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_batch_of_every_epoch_comes_once_and_in_order(size: int) -> None:
    windows = windows_of(one_phase(8, 2, 3, size))
    assert [(w.epoch, place) for w in windows for place in places(w)] == [(e, p) for e in range(3) for p in range(8)]


def test_a_window_never_crosses_an_epoch_and_the_last_one_says_so() -> None:
    windows = windows_of(one_phase(5, 2, 2, 2))
    assert [(len(w.batches), w.num_images, w.epoch, w.ends_epoch) for w in windows] == [
        (2, 4, 0, False),
        (1, 1, 0, True),
        (2, 4, 1, False),
        (1, 1, 1, True),
    ]


def test_a_finished_run_has_no_window_left() -> None:
    feed = one_phase(2, 1, 2, 1)
    assert windows_of(feed, windows_of(feed)[-1].position, 1) == []
    assert windows_of(feed, feed.loaders[0].order.position(1, 3), 3) == []


def test_a_phase_may_begin_inside_an_epoch_and_goes_on_where_the_one_before_stopped() -> None:
    feed = feed_of([plain(20, 4), plain(20, 2)], [0.75, 0.25], 2, 1)
    windows = windows_of(feed)
    assert [(w.phase, w.epoch, w.num_images, w.ends_epoch) for w in windows] == [
        *([(0, 0, 4, False)] * 4), (0, 0, 4, True),
        *([(0, 1, 4, False)] * 3), *([(1, 1, 2, False)] * 3), (1, 1, 2, True),
    ]  # fmt: skip
    assert [place for w in windows[5:] for place in places(w)] == list(range(20))


def test_a_phase_ends_the_epoch_where_the_next_one_has_no_whole_batch_left_of_it() -> None:
    # 14 of 16 images are seen at the switch, and the second phase takes 4 at a time.
    windows = windows_of(feed_of([plain(16, 2), plain(16, 4)], [13 / 32, 19 / 32], 2, 1))
    assert [(w.phase, w.epoch, w.ends_epoch) for w in windows] == [
        *([(0, 0, False)] * 6), (0, 0, True), *([(1, 1, False)] * 3), (1, 1, True),
    ]  # fmt: skip


def test_what_a_large_batch_leaves_of_an_epoch_is_served_by_the_next_phase_alone() -> None:
    # Eight images at a time leave 4 of 20; the switch, at 16 of them, comes before the epoch's end.
    windows = windows_of(feed_of([plain(20, 8), plain(20, 2)], [16 / 40, 24 / 40], 2, 1))
    assert [w.phase for w in windows] == [0, 0, *([1] * 12)]
    assert [w.ends_epoch for w in windows].index(True) == 3


def test_loaders_take_turns_and_a_finished_phase_is_closed() -> None:
    first, second = plain(8, 2), plain(8, 2)
    feed = feed_of([first, second], [0.5, 0.5], 4, 1)
    windows = accumulation_windows(feed, None, 0)
    for _ in range(8):
        next(windows)
    assert (first.log, second.log) == (["iterate"] * 2, [])
    next(windows)
    assert (first.log, second.log) == (["iterate", "iterate", "close"], ["iterate"])
    list(windows)
    assert first.log[-1] == "close" and second.log == ["iterate"] * 2
    feed.close()
    assert second.log[-1] == "close"


@st.composite
def feeds(draw: st.DrawFn) -> Feed:
    """Up to three phases of any batch sizes, over letterboxed images or aspect buckets."""
    num_images, num_epochs = draw(st.integers(3, 150)), draw(st.integers(1, 4))
    count = draw(st.integers(1, 3))
    weights = [draw(st.floats(0.05, 1.0)) for _ in range(count)]
    buckets = draw(st.booleans())
    sides = np.random.default_rng(draw(st.integers(0, 99))).integers(100, 400, (num_images, 2))
    loaders = []
    for _ in range(count):
        batch_size = min(draw(st.integers(1, 40)), num_images)
        if buckets:
            shapes = Preprocess.create(32 * draw(st.integers(3, 8)), "buckets", 16).shapes
            window = draw(st.integers(1, 5))
            sampler = RowSampler(np.arange(num_images), 7)
            plan = BucketPlan(sampler, batch_size, shapes, sides[:, 0], sides[:, 1], window_batches=window)
            loaders.append(MemoryLoader(plan))
        else:
            loaders.append(plain(num_images, batch_size))
    return feed_of(loaders, [weight / sum(weights) for weight in weights], num_epochs, draw(st.integers(1, 3)))


def facts(window: Window) -> tuple[object, ...]:
    return window.phase, window.epoch, window.ends_epoch, window.position, places(window)


@settings(max_examples=40)
@given(feeds(), st.data())
def test_phases_follow_each_other_and_a_resume_anywhere_goes_on_the_same(feed: Feed, data: st.DataObject) -> None:
    windows = windows_of(feed)
    phases = [window.phase for window in windows]
    assert phases == sorted(phases)
    # An epoch of fewer images than one batch aside, every epoch has its end, and it is the last window of the epoch.
    epochs = [window.epoch for window in windows]
    assert [w.ends_epoch for w in windows] == [e != after for e, after in zip(epochs, [*epochs[1:], -1], strict=True)]
    assert sorted(set(epochs)) == list(range(feed.plan.num_epochs))
    stop = data.draw(st.integers(1, len(windows)))
    position, epoch = windows[stop - 1].position, windows[stop - 1].epoch
    assert [facts(w) for w in windows_of(feed, position, epoch)] == [facts(w) for w in windows[stop:]]


@settings(max_examples=40)
@given(feeds())
def test_images_of_an_epoch_come_once_and_each_phase_has_its_share(feed: Feed) -> None:
    windows = windows_of(feed)
    grouped = isinstance(feed.loaders[0].order.plan, BucketPlan)
    for epoch in range(feed.plan.num_epochs):
        seen = [place for w in windows if w.epoch == epoch for place in places(w)]
        if not grouped:
            assert seen == list(range(len(seen)))
        else:
            # A window of the order that was begun is ended; what the next order's window shares with it comes again.
            assert set(seen) == set(range(max(seen) + 1))
    for phase, start in enumerate(feed.plan.starts):
        before = [w for w in windows if w.phase < phase]
        if before:
            # The last update before a phase, or the window of the order that it belongs to, starts before its place.
            last = before[-1]
            grouping = feed.loaders[last.phase].order.plan.grouping(places(last)[0])
            begun = places(last)[0] if grouping is None else grouping.whole
            assert last.epoch * feed.plan.images_an_epoch + begun < start


def test_with_buckets_a_phase_starts_where_its_own_order_has_a_window() -> None:
    sides = np.full(100, 64)
    shapes = Preprocess.create(64, "buckets", 16).shapes
    order = RowSampler(np.arange(100), 7)
    loaders = [MemoryLoader(BucketPlan(order, 5, shapes, sides, sides, window_batches=w)) for w in (2, 4)]
    for share, expected in [(0.1, 0), (0.11, 20), (0.35, 40), (0.81, 80), (0.95, 100)]:
        assert feed_of(loaders, [share, 1 - share], 1, 1).plan.starts == (0, expected)


def test_ranks_change_phase_at_the_same_update() -> None:
    found = []
    for rank in range(2):
        sampler = RowSampler(np.arange(21), 7)
        plans = [PlainPlan(sampler, size, ((21, SQUARE),), rank, 2) for size in (4, 1)]
        feed = feed_of([MemoryLoader(plan) for plan in plans], [0.7, 0.3], 2, 1)
        windows = list(accumulation_windows(feed, None, 0))
        found.append([(w.phase, w.epoch, w.ends_epoch, w.position) for w in windows])
        assert sum(feed.left(None, 0)) == len(windows)
    assert found[0] == found[1] and {phase for phase, *_ in found[0]} == {0, 1}


def test_what_is_no_position_is_refused_by_the_loader() -> None:
    with pytest.raises(PositionError, match="not a position of a loader"):
        next(accumulation_windows(feed_of([plain(8, 2), plain(8, 2)], [0.5, 0.5], 4, 1), {"epoch": 0}, 0))


class MissesOne(MemoryLoader):
    """Every image of its second batch is refused."""

    def __iter__(self) -> Generator[tuple[Batch, Position], None, None]:
        for number, found in enumerate(super().__iter__()):
            if number != 1:
                yield found


def test_a_batch_that_is_missing_is_an_error_before_its_window_is_used() -> None:
    loader = MissesOne(plain(40, 4).order.plan)
    windows = accumulation_windows(feed_of([loader], [1.0], 1, 3), None, 0)
    seen = [next(windows), next(windows), next(windows)]
    assert [len(window.batches) for window in seen] == [3, 3, 3]
    with pytest.raises(DataFailureError, match="epoch 1 is 1 batches short: every image of a batch was refused"):
        next(windows)
