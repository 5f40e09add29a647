"""Batches of an epoch: every row at most once, one shape each, in step on all ranks, and the same after a resume."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tagger.data.batch_plan import BatchPlan, BucketPlan, create_plan
from tagger.data.buckets import aspects_of, nearest_shape
from tagger.data.sampler import RowSampler
from tagger.data.weighting import WeightedSampler
from tagger.errors import InputError
from tagger.preprocess import Preprocess

BUCKETS = Preprocess.create(224, "buckets", 16)
LETTERBOX = Preprocess(image_size=224)


@dataclass(frozen=True)
class Epoch:
    """Rows to serve, how large their images are, and how they are served."""

    rows: NDArray[np.int64] = field(repr=False)
    widths: NDArray[np.int64] = field(repr=False)
    heights: NDArray[np.int64] = field(repr=False)
    seed: int
    epoch: int

    def bucket_plan(self, batch_size: int, window: int = 3, rank: int = 0, world_size: int = 1) -> BucketPlan:
        sampler = RowSampler(self.rows, self.seed)
        sizes = self.widths, self.heights
        shapes = BUCKETS.shapes
        return BucketPlan(sampler, batch_size, shapes, *sizes, rank=rank, world_size=world_size, window_batches=window)

    def own_buckets(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return nearest_shape(BUCKETS.shapes, aspects_of(self.widths[rows], self.heights[rows]))


@st.composite
def epochs(draw: st.DrawFn, least: int = 1) -> Epoch:
    """Any number of rows of an index that is larger, with any mix of aspects: even, or a few favourites."""
    num_rows = draw(st.integers(least, 200))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    favourites = draw(st.lists(st.floats(0.2, 5.0), max_size=4))
    aspects = np.exp(random.uniform(np.log(0.4), np.log(2.5), 500))
    if favourites:
        aspects = np.where(random.random(500) < 0.8, random.choice(favourites, 500), aspects)
    heights = random.integers(300, 900, 500)
    heights[random.random(500) < 0.02] = 0
    rows = np.sort(random.choice(500, num_rows, replace=False))
    widths = np.round(aspects * heights).astype(np.int64)
    return Epoch(rows, widths, heights, draw(st.integers(0, 2**40)), draw(st.integers(0, 1000)))


def served(plan: BatchPlan, epoch: int, start: int = 0) -> list[tuple[tuple[int, int], list[int], int]]:
    """(shape, rows, position after it) of each batch."""
    return [
        (plan.shape_at(epoch, span.start), plan.rows_at(epoch, span.start, span.stop).tolist(), span.done)
        for span in plan.spans(start)
    ]


def rows_of(batches: list[tuple[tuple[int, int], list[int], int]]) -> list[int]:
    return [row for _, rows, _ in batches for row in rows]


@settings(max_examples=25, deadline=None)
@given(epochs(), st.integers(1, 40), st.integers(1, 12), st.data())
def test_buckets_serve_each_row_once_in_batches_of_one_size_and_resume_exactly(
    data: Epoch, batch_size: int, window: int, draw: st.DataObject
) -> None:
    batch_size = min(batch_size, len(data.rows))
    plan = data.bucket_plan(batch_size, window)
    batches = served(plan, data.epoch)
    assert len(batches) == len(plan.spans(0)) == len(data.rows) // batch_size
    assert all(len(rows) == batch_size for _, rows, _ in batches)
    found = rows_of(batches)
    assert len(set(found)) == len(found) and set(found) <= set(data.rows.tolist())
    # What an epoch leaves out is less than one batch, and the sampler's last rows: others in each epoch.
    order = RowSampler(data.rows, data.seed).rows_at(data.epoch, 0, len(data.rows))
    assert set(found) == set(order[: len(found)].tolist())

    consumed = draw.draw(st.integers(0, len(batches)))
    samples = batches[consumed - 1][2] if consumed else 0
    assert samples == consumed * batch_size
    again = data.bucket_plan(batch_size, window)
    assert again.resume_at(samples, plan.grouping(samples)) == samples
    assert served(again, data.epoch, samples) == batches[consumed:]


@settings(max_examples=40, deadline=None)
@given(epochs(least=8), st.integers(1, 20), st.integers(1, 6), st.integers(1, 5))
def test_ranks_share_each_step_equally_and_have_its_shape(
    data: Epoch, batch_size: int, window: int, world_size: int
) -> None:
    batch_size = min(batch_size, len(data.rows) // world_size)
    alone = served(data.bucket_plan(batch_size * world_size, window), data.epoch)
    ranks = [served(data.bucket_plan(batch_size, window, rank, world_size), data.epoch) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    for whole, *parts in zip(alone, *ranks, strict=True):
        shape, rows, done = whole
        assert [part[0] for part in parts] == [shape] * world_size
        assert [part[2] for part in parts] == [done] * world_size
        assert all(len(part[1]) == batch_size for part in parts)
        assert rows_of(parts) == rows


@settings(max_examples=40, deadline=None)
@given(epochs(least=2), st.integers(1, 20), st.integers(1, 20), st.integers(1, 5), st.data())
def test_another_batch_size_loses_no_row_and_repeats_what_it_says(
    data: Epoch, before: int, after: int, window: int, draw: st.DataObject
) -> None:
    before, after = min(before, len(data.rows)), min(after, len(data.rows))
    plan, other = data.bucket_plan(before, window), data.bucket_plan(after, window)
    batches = served(plan, data.epoch)
    consumed = draw.draw(st.integers(0, len(batches)))
    samples = consumed * before
    start = other.resume_at(samples, plan.grouping(samples))
    if len(other.spans(start)) == 0:
        assert consumed == len(batches) or len(data.rows) - samples < after
        return
    first, second = set(rows_of(batches[:consumed])), set(rows_of(served(other, data.epoch, start)))
    if before == after:
        assert not first & second
        return
    assert start <= samples
    assert len(first & second) <= samples - start
    num_left_out = len(data.rows) - start - len(second)
    assert num_left_out < after
    order = RowSampler(data.rows, data.seed).rows_at(data.epoch, 0, len(data.rows)).tolist()
    assert first | second >= set(order[: len(order) - num_left_out])
    assert other.resume_at(start, other.grouping(start)) == start


@settings(max_examples=30, deadline=None)
@given(epochs(least=40), st.integers(1, 20), st.data())
def test_going_from_buckets_to_a_letterbox_and_back_loses_no_row(
    data: Epoch, batch_size: int, draw: st.DataObject
) -> None:
    sampler = RowSampler(data.rows, data.seed)
    plain = create_plan(sampler, LETTERBOX, batch_size, None)
    plan = data.bucket_plan(batch_size)
    num_batches = len(plan.spans(0))
    samples = draw.draw(st.integers(0, num_batches)) * batch_size
    assert plan.resume_at(samples, plain.grouping(samples)) <= samples
    start = plain.resume_at(samples, plan.grouping(samples))
    if samples == num_batches * batch_size:
        assert len(plain.spans(start)) == 0
        return
    first = set(rows_of(served(plan, data.epoch)[: samples // batch_size]))
    assert first >= set(sampler.rows_at(data.epoch, 0, start).tolist())


def even_mix(num_rows: int) -> Epoch:
    random = np.random.default_rng(0)
    heights = np.full(num_rows, 1000)
    widths = np.round(np.exp(random.uniform(np.log(0.5), np.log(2.0), num_rows)) * 1000).astype(np.int64)
    return Epoch(np.arange(num_rows), widths, heights, 7, 0)


def test_few_rows_leave_their_bucket_and_then_for_the_next_one() -> None:
    data = even_mix(40_000)
    plan = data.bucket_plan(64, 64)
    moves = np.concatenate(
        [data.own_buckets(np.array(rows)) - BUCKETS.shapes.index(shape) for shape, rows, _ in served(plan, 0)]
    )
    assert np.abs(moves).max() == 1
    assert np.mean(moves != 0) < 0.08
    assert abs(np.mean(moves)) < 0.01


def test_a_rare_bucket_is_served_as_often_as_its_rows_ask_for() -> None:
    random = np.random.default_rng(1)
    heights = np.full(60_000, 1000)
    rare = random.random(60_000) < 0.003  # 12 of the 4096 rows of a window: never a batch of their own by rounding
    widths = np.where(rare, 1900, 1000)
    plan = Epoch(np.arange(60_000), widths, heights, 3, 0).bucket_plan(64, 64)
    shapes = [plan.shape_at(epoch, span.start) for epoch in range(8) for span in plan.spans(0)]
    share = np.mean([shape == BUCKETS.shapes[-1] for shape in shapes])
    assert share == pytest.approx(rare.mean(), rel=0.5)


def test_batches_of_a_window_are_not_in_the_order_of_their_aspects() -> None:
    data = even_mix(4096)
    shapes = [BUCKETS.shapes.index(shape) for shape, _, _ in served(data.bucket_plan(64, 64), 0)]
    assert abs(np.corrcoef(shapes, np.arange(64))[0, 1]) < 0.5
    assert shapes != [BUCKETS.shapes.index(shape) for shape, _, _ in served(data.bucket_plan(64, 64), 1)]


def test_memory_is_that_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of a hundred million rows is planned without an array of its length."""
    num_rows, longest = 10**8, 0
    constant = np.broadcast_to(np.uint16(500), num_rows)
    rows = np.broadcast_to(np.int64(0), num_rows)
    monkeypatch.setattr(BucketPlan, "_hash_order", lambda *_: 1)
    original = RowSampler.rows_at

    def rows_at(self, epoch, start, stop):
        nonlocal longest
        longest = max(longest, stop - start)
        return original(self, epoch, start, stop)

    monkeypatch.setattr(RowSampler, "rows_at", rows_at)
    plan = BucketPlan(RowSampler(rows, 1), 64, BUCKETS.shapes, constant, constant)
    spans = plan.spans(plan.grouping(50_000_000).whole)
    span = next(iter(spans))
    assert len(plan.rows_at(4, span.start, span.stop)) == 64 and plan.shape_at(4, span.start) == (224, 224)
    assert longest < 128 * 64


def test_the_order_inside_a_window_never_changes_between_versions() -> None:
    """A resumed run relies on it. Print the left side to regenerate after a change on purpose."""
    found = served(even_mix(40).bucket_plan(4, 3), 5)[:3]
    assert [rows for _, rows, _ in found] == [[5, 16, 10, 26], [31, 30, 28, 22], [25, 1, 13, 32]]


def test_stand_ins_have_the_shape_of_their_batch() -> None:
    data = even_mix(2000)
    plan = data.bucket_plan(16, 40)
    for position in range(0, 1984, 131):
        bucket = BUCKETS.shapes.index(plan.shape_at(0, position))
        drawn = [plan.reserve_row(0, position, attempt) for attempt in range(20)]
        assert (data.own_buckets(np.array(drawn)) == bucket).all()
        assert len(set(drawn)) > 10
        again = data.bucket_plan(16, 40)
        assert drawn == [again.reserve_row(0, position, attempt) for attempt in range(20)]


def test_a_change_that_moves_rows_inside_windows_is_noticed() -> None:
    data = even_mix(1000)
    plan = data.bucket_plan(8, 16)
    at = 8 * 30
    assert data.bucket_plan(8, 16).resume_at(at, plan.grouping(at)) == at
    assert plan.grouping(at).whole == plan.resume_at(at, None) == 8 * 17
    wider = Epoch(data.rows, data.widths + (np.arange(1000) == 500), data.heights, data.seed, data.epoch)
    for changed in (wider.bucket_plan(8, 16), data.bucket_plan(8, 17), data.bucket_plan(4, 32, 0, 1)):
        assert changed.resume_at(at, plan.grouping(at)) <= plan.grouping(at).whole
    assert data.bucket_plan(4, 16, 1, 2).resume_at(at, plan.grouping(at)) == at  # two ranks make the same steps


def test_drawing_with_replacement_is_grouped_too() -> None:
    data = even_mix(1000)
    sampler = WeightedSampler(data.rows, 5, np.cumsum(np.arange(1.0, 1001.0)))
    plan = BucketPlan(sampler, 10, BUCKETS.shapes, data.widths, data.heights)
    assert sorted(rows_of(served(plan, 2))) == sorted(sampler.rows_at(2, 0, 1000).tolist())


# Letterbox, and validation


@settings(max_examples=40, deadline=None)
@given(epochs(), st.integers(1, 50), st.integers(1, 5), st.integers(1, 50), st.integers(1, 5), st.data())
def test_a_letterbox_resumes_exactly_at_any_batch_size_and_number_of_ranks(
    data: Epoch, before: int, ranks_before: int, after: int, ranks_after: int, draw: st.DataObject
) -> None:
    sampler = RowSampler(data.rows, data.seed)
    if len(data.rows) < max(ranks_before, ranks_after):
        return
    order = sampler.rows_at(data.epoch, 0, len(data.rows)).tolist()

    def plans(batch_size: int, world_size: int) -> list[BatchPlan]:
        return [
            create_plan(sampler, LETTERBOX, batch_size, None, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]

    ranks = [served(plan, data.epoch) for plan in plans(before, ranks_before)]
    assert len({len(batches) for batches in ranks}) == 1
    steps = list(zip(*ranks, strict=True))
    assert [row for step in steps for row in rows_of(list(step))] == order[: steps[-1][0][2]]
    assert all({done for _, _, done in step} == {step[0][2]} for step in steps)
    _, _, samples = steps[draw.draw(st.integers(0, len(steps) - 1))][0]
    later = [served(plan, data.epoch, samples) for plan in plans(after, ranks_after)]
    resumed = [row for step in zip(*later, strict=True) for row in rows_of(list(step))]
    assert resumed == order[samples : samples + len(resumed)]
    size = min(after, len(data.rows) // ranks_after) * ranks_after
    assert len(order) - samples - len(resumed) < size


@settings(max_examples=40, deadline=None)
@given(epochs(), st.integers(1, 50), st.integers(1, 4), st.booleans())
def test_validation_serves_every_row_once_in_its_own_bucket(
    data: Epoch, batch_size: int, world_size: int, buckets: bool
) -> None:
    sampler = RowSampler(data.rows, None)
    sizes = np.stack([data.widths, data.heights], axis=1)
    preprocess = BUCKETS if buckets else LETTERBOX
    ranks = [
        served(create_plan(sampler, preprocess, batch_size, sizes, rank=rank, world_size=world_size), 0)
        for rank in range(world_size)
    ]
    assert sorted(row for batches in ranks for row in rows_of(batches)) == data.rows.tolist()
    for shape, rows, _ in (batch for batches in ranks for batch in batches):
        assert 1 <= len(rows) <= batch_size and rows == sorted(rows)
        if buckets:
            assert {BUCKETS.shapes[i] for i in data.own_buckets(np.array(rows))} == {shape}
        else:
            assert shape == (224, 224)
    if not buckets and world_size == 1:
        assert rows_of(ranks[0]) == data.rows.tolist()
    assert max(done for batches in ranks for _, _, done in batches) == len(data.rows)


def test_fewer_rows_than_ranks_are_refused() -> None:
    with pytest.raises(InputError, match="3 images for training on 4 ranks"):
        create_plan(RowSampler(np.arange(3), 1), LETTERBOX, 8, None, rank=0, world_size=4)
    with pytest.raises(ValueError, match="rank 4 of 4"):
        create_plan(RowSampler(np.arange(9), 1), LETTERBOX, 8, None, rank=4, world_size=4)


def test_fewer_rows_than_one_step_are_one_step() -> None:
    plans = [create_plan(RowSampler(np.arange(11), 1), LETTERBOX, 8, None, rank=r, world_size=2) for r in range(2)]
    ranks = [served(plan, 0) for plan in plans]
    assert [len(rows) for ((_, rows, _),) in ranks] == [5, 5]
    assert len(set(rows_of(ranks[0]) + rows_of(ranks[1]))) == 10
