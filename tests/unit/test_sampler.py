import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagger.data.sampler import Permutation, RowSampler, hash_rows


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_permutation_is_a_bijection(num_items: int, key: int) -> None:
    items = Permutation(num_items, key)(np.arange(num_items))
    assert items.dtype == np.int64
    np.testing.assert_array_equal(np.sort(items), np.arange(num_items))


@given(st.integers(1, 10**12), st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_any_position_has_its_row_without_the_others(num_items: int, key: int, position: int) -> None:
    permutation = Permutation(num_items, key)
    positions = (np.arange(64) * 7919 + position) % num_items
    together = permutation(positions)
    assert ((together >= 0) & (together < num_items)).all()
    assert permutation(positions[5:6])[0] == together[5]


def test_small_permutations_are_all_about_equally_frequent() -> None:
    draws = 6000
    found = [tuple(Permutation(4, key)(np.arange(4))) for key in range(draws)]
    counts = np.array([found.count(order) for order in set(found)])
    assert len(counts) == 24
    chi_square = float(((counts - draws / 24) ** 2 / (draws / 24)).sum())
    assert chi_square < 60  # 23 degrees of freedom: the mean is 23, the standard deviation 6.8


def test_a_shuffled_order_is_not_correlated_with_the_index() -> None:
    items = Permutation(20_000, 3)(np.arange(20_000)).astype(float)
    assert abs(np.corrcoef(items, np.arange(20_000))[0, 1]) < 0.03
    assert abs(np.corrcoef(items[1:], items[:-1])[0, 1]) < 0.03


def test_epochs_and_seeds_differ_and_repeat() -> None:
    rows = np.arange(500, dtype=np.int32)
    orders = {
        (seed, epoch): tuple(RowSampler(rows, seed).rows_at(epoch, 0, 500)) for seed in (0, 1, 2) for epoch in range(4)
    }
    assert len(set(orders.values())) == len(orders)
    assert tuple(RowSampler(rows, 1).rows_at(2, 0, 500)) == orders[1, 2]


def test_an_epoch_covers_its_rows_in_pieces_of_any_size() -> None:
    rows = np.flatnonzero(np.arange(1000) % 3 > 0)
    sampler = RowSampler(rows, 9)
    whole = sampler.rows_at(4, 0, len(rows))
    assert sorted(whole) == rows.tolist()
    pieces = [sampler.rows_at(4, start, min(start + 37, len(rows))) for start in range(0, len(rows), 37)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_without_a_seed_the_order_is_the_one_given() -> None:
    rows = np.array([4, 2, 9], dtype=np.int32)
    for epoch in (0, 3):
        assert RowSampler(rows, None).rows_at(epoch, 0, 3).tolist() == [4, 2, 9]


def test_the_reserve_stream_draws_from_the_rows_by_its_key() -> None:
    rows = np.arange(100, 200)
    sampler = RowSampler(rows, 5)
    drawn = [sampler.reserve_row(0, position, attempt) for position in range(40) for attempt in range(5)]
    assert set(drawn) <= set(rows.tolist())
    assert len(set(drawn)) > 60
    assert drawn == [sampler.reserve_row(0, position, attempt) for position in range(40) for attempt in range(5)]
    assert drawn != [sampler.reserve_row(1, position, attempt) for position in range(40) for attempt in range(5)]


def test_the_order_of_an_epoch_never_changes_between_versions() -> None:
    """A resumed run relies on it. Print the left sides to regenerate after a change on purpose."""
    assert RowSampler(np.arange(10), 42).rows_at(3, 0, 10).tolist() == [0, 8, 1, 5, 6, 2, 4, 7, 9, 3]
    assert RowSampler(np.arange(1000), 42).reserve_row(3, 17, 1) == 492


def test_the_hash_of_rows_knows_members_and_places() -> None:
    ids = np.arange(50, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    rows = np.arange(0, 40)
    found = hash_rows(ids, rows)
    assert 0 <= found < 2**53
    assert found == hash_rows(ids, rows.astype(np.int32))
    assert len({found, hash_rows(ids, rows[::-1]), hash_rows(ids, rows + 1), hash_rows(ids, rows[:-1])}) == 4


def test_no_items_cannot_be_ordered() -> None:
    with pytest.raises(ValueError, match="0 items"):
        Permutation(0, 1)
