"""Rows drawn by their tags come as often as their weights say, the same every time, from any position on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagger.data.ragged import gather
from tagger.data.sampler import RowSampler
from tagger.data.weighting import class_aware_sampler, weighted_sampler
from tagger.errors import InputError


class Tags:
    """An index in small: tag lists of rows; the index's tag numbers are twice those of the vocabulary, plus one."""

    def __init__(self, lists: list[list[int]], num_tags: int) -> None:
        self.num_tags = num_tags
        self._index_of = np.full(2 * num_tags + 2, -1, dtype=np.int64)
        self._index_of[1 : 2 * num_tags : 2] = np.arange(num_tags)
        self._values = np.array([2 * tag + 1 for tags in lists for tag in tags], dtype=np.uint16)
        self._offsets = np.concatenate([[0], np.cumsum([len(tags) for tags in lists])]).astype(np.int64)

    def known_tags(self, rows):
        numbers, places = gather(self._offsets, self._values, rows)
        tags = self._index_of[numbers]
        return tags[tags >= 0], places[tags >= 0]


# Tag 0 on every row but the last two, tag 1 on every fourth, tag 2 on one; number 3 is not in the vocabulary.
LISTS = [[0, 1] if row % 4 == 0 else [0] for row in range(38)] + [[2], [3]]
TABLE = Tags(LISTS, 3)
ROWS = np.arange(40, dtype=np.int32)


def deviation(counts: np.ndarray, shares: np.ndarray) -> float:
    """Chi-square over its degrees of freedom, as standard deviations from 1."""
    expected = shares / shares.sum() * counts.sum()
    freedom = len(counts) - 1
    return float(((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize(("power", "cap"), [(0.5, 10.0), (1.0, 2.0), (1.0, 100.0), (0.0, 1.0)])
def test_rows_come_as_often_as_their_rarest_tag_says(power: float, cap: float) -> None:
    counts = {0: 38, 1: 10, 2: 1}
    weights = np.array([min((counts.get(t, 40) for t in tags), default=40) ** -power for tags in LISTS])
    weights[39] = weights.min()
    expected = np.minimum(weights, cap * weights.min())
    sampler = weighted_sampler(TABLE, ROWS, 3, power=power, cap=cap)
    found = np.bincount(sampler.rows_at(0, 0, 200_000), minlength=40)
    assert abs(deviation(found, expected)) < 5


def test_tags_come_equally_often_and_their_rows_too() -> None:
    sampler = class_aware_sampler(TABLE, ROWS, 3)
    found = np.bincount(sampler.rows_at(0, 0, 200_000), minlength=40)
    shares = np.array([sum({0: 1 / 38, 1: 1 / 10, 2: 1.0}.get(t, 0) for t in tags) for tags in LISTS])
    assert found[39] == 0
    assert abs(deviation(found[:39], shares[:39])) < 5


def test_a_tag_that_an_image_has_twice_counts_once() -> None:
    doubled = Tags([[0, 0, 1], [1]], 2)
    sampler = class_aware_sampler(doubled, np.arange(2), 1)
    assert sampler.offsets.tolist() == [0, 1, 3] and sampler.members.tolist() == [0, 0, 1]


@given(st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=30), st.data())
def test_the_rows_of_each_tag_are_exactly_those_that_carry_it(lists: list[list[int]], data: st.DataObject) -> None:
    rows = np.array(data.draw(st.lists(st.integers(0, len(lists) - 1), min_size=1, unique=True)))
    expected = [[place for place, row in enumerate(rows) if tag in lists[row]] for tag in range(5)]
    table = Tags(lists, 5)
    if not any(expected):
        with pytest.raises(InputError, match=r"none of the \d+ training images has a tag"):
            class_aware_sampler(table, rows, 0)
        return
    sampler = class_aware_sampler(table, rows, 0)
    found = [sampler.members[a:b].tolist() for a, b in zip(sampler.offsets, sampler.offsets[1:], strict=False)]
    assert found == [places for places in expected if places]
    assert set(sampler.rows_at(0, 0, 50)) <= {row for row in rows if set(lists[row]) & set(range(5))}


def samplers(seed: int):
    return weighted_sampler(TABLE, ROWS, seed, power=0.5, cap=10), class_aware_sampler(TABLE, ROWS, seed)


@given(st.integers(0, 2**31), st.integers(0, 50), st.integers(0, 40), st.integers(0, 40))
def test_draws_depend_on_seed_epoch_and_position_alone(seed: int, epoch: int, first: int, second: int) -> None:
    start, stop = sorted((first, second))
    for sampler in samplers(seed):
        whole = sampler.rows_at(epoch, 0, 40)
        np.testing.assert_array_equal(sampler.rows_at(epoch, start, stop), whole[start:stop])
        assert sampler.reserve_row(epoch, first, 2) == RowSampler(ROWS, seed).reserve_row(epoch, first, 2)


def test_epochs_seeds_and_schemes_draw_differently() -> None:
    drawn = [tuple(s.rows_at(epoch, 0, 40)) for seed in (1, 2) for epoch in (0, 1) for s in samplers(seed)]
    assert len(set(drawn)) == len(drawn)


def test_each_scheme_has_its_own_number() -> None:
    weighted, class_aware = samplers(1)
    other = weighted_sampler(TABLE, ROWS, 1, power=0.6, cap=10)
    numbers = [RowSampler(ROWS, 1).scheme, weighted.scheme, class_aware.scheme, other.scheme]
    assert len(set(numbers)) == 4 and numbers[0] == 0 and max(numbers) < 2**53
    assert weighted.scheme == samplers(7)[0].scheme


def test_draws_never_change_between_versions() -> None:
    """A resumed run relies on it. Print the left sides to regenerate after a change on purpose."""
    weighted, class_aware = samplers(42)
    assert weighted.rows_at(3, 0, 8).tolist() == [20, 36, 0, 36, 34, 22, 26, 18]
    assert class_aware.rows_at(3, 0, 8).tolist() == [8, 38, 19, 7, 8, 28, 38, 4]
