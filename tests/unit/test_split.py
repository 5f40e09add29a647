import logging
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagger.data.split import Split, SplitError, hashed_mask, listed_mask, read_list, split_rows
from tagger.rng import stable_id

PATHS = [PurePosixPath(f"/set/{folder}/{stem}.png") for folder in ("cats", "dogs") for stem in ("one", "two", "v1.5")]
IDS = np.array([stable_id(path.name.removesuffix(".png")) for path in PATHS], dtype=np.uint64)


def listed(*lines: str) -> list[str]:
    mask = listed_mask(IDS, PATHS.__getitem__, list(lines), "list.txt")
    return [str(path.relative_to("/set")) for path, chosen in zip(PATHS, mask, strict=True) if chosen]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50), st.integers(0, 49), st.floats(0.01, 0.99))
def test_an_image_never_changes_side_when_the_set_grows(ids: list[int], kept: int, fraction: float) -> None:
    whole = np.array(ids, dtype=np.uint64)
    np.testing.assert_array_equal(hashed_mask(whole[: kept + 1], fraction), hashed_mask(whole, fraction)[: kept + 1])


def test_the_hash_holds_out_about_the_fraction() -> None:
    ids = np.array([stable_id(f"image {number}") for number in range(20_000)], dtype=np.uint64)
    for fraction in (0.05, 0.15, 0.5):
        share = hashed_mask(ids, fraction).mean()
        assert abs(share - fraction) < 4 * np.sqrt(fraction * (1 - fraction) / len(ids))


def test_a_larger_fraction_only_adds_to_validation() -> None:
    ids = np.array([stable_id(f"{number}") for number in range(2000)], dtype=np.uint64)
    assert not (hashed_mask(ids, 0.1) & ~hashed_mask(ids, 0.2)).any()


def test_the_sides_of_the_hash_never_change_between_versions() -> None:
    """Models are compared across versions on the same images. Print the left side to regenerate."""
    ids = np.array([stable_id(f"{number}") for number in range(100)], dtype=np.uint64)
    assert np.flatnonzero(hashed_mask(ids, 0.1)).tolist() == [5, 24, 30, 33, 37, 46, 50, 61, 65, 87]


def test_a_stem_holds_out_every_image_of_that_name() -> None:
    assert listed("one") == ["cats/one.png", "dogs/one.png"]
    assert listed("v1.5") == ["cats/v1.5.png", "dogs/v1.5.png"]


def test_a_line_with_a_slash_names_the_end_of_a_path() -> None:
    assert listed("cats/one") == ["cats/one.png"]
    assert listed("/cats/one") == ["cats/one.png"]
    assert listed("set/dogs/v1.5", "two") == ["cats/two.png", "dogs/two.png", "dogs/v1.5.png"]
    assert listed("ats/one") == []


def test_lines_that_match_nothing_are_counted_with_examples(caplog: pytest.LogCaptureFixture) -> None:
    listed("one", "a", "b", "birds/one", "d")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "4 of 5 lines" in record.message and "a, b, birds/one" in record.message and "d" not in record.message[-3:]


def test_a_list_that_matches_nothing_is_an_error_line(caplog: pytest.LogCaptureFixture) -> None:
    listed("one.png", "two.png")
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "list.txt" in record.message and "one.png" in record.message


def test_a_list_is_read_as_people_write_it(tmp_path: Path) -> None:
    path = tmp_path / "val.txt"
    path.write_bytes(b"\xef\xbb\xbfone \r\n\r\n  two words\ncaf\xc3\xa9")
    assert read_list(path) == ["one", "two words", "café"]


def test_a_list_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(SplitError, match=r"nowhere\.txt cannot be read"):
        read_list(tmp_path / "nowhere.txt")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SplitError, match="not UTF-8"):
        read_list(tmp_path / "bad.txt")


@pytest.mark.parametrize(
    ("lines", "fraction", "message"),
    [
        (None, 1e-9, r"val_fraction=1e-09 of 6 images leaves no image for validation; raise"),
        (None, 1 - 1e-9, "leaves no image for training; lower data.val_fraction"),
        (["nothing"], 0.5, "val_list=.* leaves no image for validation; .* without its suffix"),
        (["one", "two", "v1.5"], 0.5, "val_list=.* leaves no image for training"),
    ],
)
def test_an_empty_side_is_refused_with_a_remedy(
    lines: list[str] | None, fraction: float, message: str, tmp_path: Path
) -> None:
    val_list = None
    if lines is not None:
        val_list = tmp_path / "val.txt"
        val_list.write_text("\n".join(lines))
    with pytest.raises(SplitError, match=message):
        split_rows(IDS, PATHS.__getitem__, val_list=val_list, val_fraction=fraction)


def test_the_sides_are_disjoint_and_cover_every_row() -> None:
    split = Split(np.array([False, True, False, True, True]))
    assert split.training_rows.tolist() == [0, 2]
    assert split.validation_rows.tolist() == [1, 3, 4]
