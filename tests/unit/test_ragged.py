from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tagger.data.ragged import distinct, gather, pack

LISTS = st.lists(st.lists(st.integers(0, 30), max_size=6), min_size=1, max_size=8)


@given(LISTS, st.data())
def test_gather_picks_what_a_loop_picks(lists: list[list[int]], data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=10))
    offsets = np.cumsum([0, *map(len, lists)])
    values = np.array([value for one in lists for value in one], dtype=np.uint16)
    found, places = gather(offsets, values, np.array(wanted, dtype=np.int64))
    assert found.tolist() == [value for number in wanted for value in lists[number]]
    assert places.tolist() == [place for place, number in enumerate(wanted) for _ in lists[number]]


@given(st.lists(st.integers(-9, 9), max_size=40))
def test_distinct_is_what_a_set_keeps(values: list[int]) -> None:
    assert distinct(np.array(values, dtype=np.int64)).tolist() == sorted(set(values))


@given(LISTS, st.data())
def test_pack_sorts_each_list_and_drops_repeats(lists: list[list[int]], data: st.DataObject) -> None:
    pairs = data.draw(st.permutations([(place, value) for place, one in enumerate(lists) for value in one]))
    places = np.array([place for place, _ in pairs], dtype=np.int64)
    values = np.array([value for _, value in pairs], dtype=np.int64)
    packed, offsets = pack(values, places, len(lists), 31)
    assert packed.dtype == offsets.dtype == np.int32
    found = [packed[start:stop].tolist() for start, stop in pairwise(offsets)]
    assert found == [sorted(set(one)) for one in lists]
