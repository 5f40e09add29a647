import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagger.config_io import ConfigError
from tagger.data.index import open_index
from tagger.data.split import Part, SplitRule, split_index
from tagger.data.stratify import stratified_parts
from tagger.rng import stable_id


def pack(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    tags = np.array([tag for row in rows for tag in row], dtype=np.int64)
    return offsets, tags, np.array([stable_id(f"{number}") for number in range(len(rows))], dtype=np.uint64)


def long_tailed(num_rows: int, num_tags: int, seed: int) -> list[list[int]]:
    draws = np.random.default_rng(seed)
    share = np.minimum(0.6, 1.5 / np.arange(1, num_tags + 1))
    return [np.flatnonzero(draws.random(num_tags) < share).tolist() for _ in range(num_rows)]


@pytest.mark.parametrize("fractions", [(0.8, 0.2), (0.75, 0.05, 0.1, 0.1), (0.5, 0.0, 0.0, 0.5)])
def test_every_part_has_its_share_of_images_and_of_each_tag(fractions: tuple[float, ...]) -> None:
    rows = long_tailed(1000, 60, seed=1)
    parts = stratified_parts(*pack(rows), fractions)
    sizes = np.bincount(parts, minlength=len(fractions))
    for size, fraction in zip(sizes, fractions, strict=True):
        assert abs(size - fraction * len(rows)) <= 2
    for tag in range(60):
        carriers = parts[[tag in row for row in rows]]
        for part, fraction in enumerate(fractions):
            found, expected = int((carriers == part).sum()), fraction * len(carriers)
            assert (found > 0) >= (expected > 1)
            assert abs(found - expected) <= max(1.5, 0.5 * np.sqrt(expected))


def test_it_is_nearer_to_the_shares_than_chance() -> None:
    rows = long_tailed(1000, 60, seed=2)
    has = np.array([[tag in row for tag in range(60)] for row in rows])

    def error(parts: np.ndarray) -> float:
        return float(np.abs(has[parts == 1].sum(0) - 0.2 * has.sum(0)).mean())

    draws = np.random.default_rng(0)
    chance = [error((draws.permutation(len(rows)) < 200).astype(np.uint8)) for _ in range(10)]
    assert error(stratified_parts(*pack(rows), (0.8, 0.2))) < 0.25 * np.mean(chance)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.integers(0, 8), max_size=4, unique=True), min_size=1, max_size=30),
    st.sampled_from([(0.5, 0.5), (0.9, 0.1), (0.7, 0.0, 0.1, 0.2)]),
)
def test_every_row_gets_a_part_that_was_asked_for_and_the_same_one_again(
    rows: list[list[int]], fractions: tuple[float, ...]
) -> None:
    parts = stratified_parts(*pack(rows), fractions)
    assert all(part < len(fractions) and fractions[part] > 0 for part in parts)
    np.testing.assert_array_equal(parts, stratified_parts(*pack(rows), fractions))


def test_tags_of_two_images_are_on_both_sides_of_an_even_split() -> None:
    rows = [[number // 2] for number in range(40)]
    parts = stratified_parts(*pack(rows), (0.5, 0.5))
    assert (parts[::2] != parts[1::2]).all()


def test_rows_without_tags_fill_the_parts_by_room() -> None:
    parts = stratified_parts(*pack([[] for _ in range(100)]), (0.7, 0.3))
    assert np.bincount(parts).tolist() == [70, 30]


def test_the_ratings_of_a_data_set_are_stratified_as_tags(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    for number in range(100):
        (root / f"{number}.png").touch()
        rating = {"rating": "sensitive"} if number % 10 == 0 else {"rating": "general"} if number % 3 else {}
        (root / f"{number}.json").write_text(json.dumps({"tags": ["thing", f"kind {number % 5}"], **rating}))
    index = open_index([root], tmp_path / "index")
    split = split_index(index, SplitRule(0.2, test_fraction=0.2, stratified=True))
    sensitive = index.ratings == 2
    assert [int((sensitive & (split.parts == part)).sum()) for part in Part] == [6, 0, 2, 2, 0]
    assert np.bincount(split.parts).tolist() == [60, 0, 20, 20]


@pytest.mark.parametrize(
    ("rule", "other"),
    [
        (SplitRule(0.2, val_list=Path("val.txt"), stratified=True), "data.val_list"),
        (SplitRule(0.2, near_duplicate_bits=3, stratified=True), "data.group_near_duplicates"),
    ],
)
def test_it_refuses_what_decides_about_the_same_images(rule: SplitRule, other: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").touch()
    (tmp_path / "set" / "a.json").write_text('{"tags": ["thing"]}')
    with pytest.raises(ConfigError, match=f"data.stratified_split and {other} .* choose one"):
        split_index(open_index([tmp_path / "set"], tmp_path / "index"), rule)
