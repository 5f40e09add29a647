import logging
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagger.config_io import ConfigError
from tagger.data.index import MetadataIndex, open_index
from tagger.data.split import (
    Part,
    Split,
    SplitError,
    SplitKey,
    SplitRule,
    hashed_parts,
    listed_mask,
    path_ids,
    read_list,
    separate_groups,
    split_index,
    split_rows,
)
from tagger.rng import stable_id

PATHS = [PurePosixPath(f"/set/{folder}/{stem}.png") for folder in ("cats", "dogs") for stem in ("one", "two", "v1.5")]
IDS = np.array([stable_id(path.name.removesuffix(".png")) for path in PATHS], dtype=np.uint64)
MANY = np.array([stable_id(f"image {number}") for number in range(20_000)], dtype=np.uint64)

ids_of = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50)
fractions_of = st.tuples(st.floats(0, 0.5), st.floats(0, 0.25), st.floats(0, 0.25))


def listed(*lines: str) -> list[str]:
    mask = listed_mask(IDS, PATHS.__getitem__, list(lines), "list.txt")
    return [str(path.relative_to("/set")) for path, chosen in zip(PATHS, mask, strict=True) if chosen]


@given(ids_of, st.integers(0, 49), fractions_of)
def test_an_image_never_changes_part_when_the_set_grows(
    ids: list[int], kept: int, fractions: tuple[float, float, float]
) -> None:
    whole = np.array(ids, dtype=np.uint64)
    before = hashed_parts(whole[: kept + 1], *fractions)
    np.testing.assert_array_equal(before, hashed_parts(whole, *fractions)[: kept + 1])


def test_each_part_gets_about_its_fraction() -> None:
    for fractions in ((0.05, 0.02, 0.1), (0.5, 0.3, 0.2), (0.15, 0.0, 0.0)):
        shares = np.bincount(hashed_parts(MANY, *fractions), minlength=len(Part)) / len(MANY)
        for part, fraction in zip((Part.VAL, Part.CALIB, Part.TEST), fractions, strict=True):
            assert abs(shares[part] - fraction) <= 4 * np.sqrt(fraction * (1 - fraction) / len(MANY))


@given(fractions_of, st.integers(0, 2), st.floats(0, 1))
def test_another_fraction_moves_images_between_training_and_its_part_alone(
    fractions: tuple[float, float, float], changed: int, share: float
) -> None:
    ids = MANY[:2000]
    part = (Part.VAL, Part.CALIB, Part.TEST)[changed]
    larger = list(fractions)
    larger[changed] += share * ((0.5, 0.25, 0.25)[changed] - fractions[changed])
    before, after = hashed_parts(ids, *fractions), hashed_parts(ids, *larger)
    moved = before != after
    assert (before[moved] == Part.TRAIN).all() and (after[moved] == part).all()


def test_the_parts_of_the_hash_never_change_between_versions() -> None:
    """Models are compared across versions on the same images. Print the left sides to regenerate."""
    ids = np.array([stable_id(f"{number}") for number in range(100)], dtype=np.uint64)
    parts = hashed_parts(ids, 0.1, 0.05, 0.05)
    assert np.flatnonzero(parts == Part.VAL).tolist() == [5, 24, 30, 33, 37, 46, 50, 61, 65, 87]
    assert np.flatnonzero(parts == Part.CALIB).tolist() == [11, 42, 68, 73, 79, 81, 86]
    assert np.flatnonzero(parts == Part.TEST).tolist() == [7, 15, 34, 38, 41, 60, 76, 77]


@pytest.mark.parametrize("fractions", [(0.1, 0.3, 0.3), (0.6, 0.1, 0.0), (0.6, 0.0, 0.1)])
def test_parts_that_would_overlap_are_refused(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="lower"):
        hashed_parts(IDS, *fractions)


group_labels = st.lists(st.integers(0, 9), min_size=12, max_size=12)


@given(st.lists(st.integers(0, 3), min_size=12, max_size=12), group_labels)
def test_a_group_is_used_on_one_side_alone_and_nobody_gets_a_part_that_is_not_his(
    parts: list[int], groups: list[int]
) -> None:
    before = np.array(parts, dtype=np.uint8)
    labels = np.array([groups.index(group) for group in groups])
    after = separate_groups(before, labels)
    assert all(set(after[labels == label]) - {Part.UNUSED} == {before[labels == label].max()} for label in labels)
    assert ((after == before) | (after == Part.UNUSED)).all()
    assert (after[before == Part.VAL] == Part.VAL).all()


@given(st.lists(st.integers(0, 3), min_size=12, max_size=12), group_labels, st.integers(1, 12), st.data())
def test_growth_moves_no_image_of_a_group_to_another_side(
    parts: list[int], groups: list[int], kept: int, data: st.DataObject
) -> None:
    """Newcomers may join groups and connect them, which is all that they can do to what was there: out of use at most,
    never back into it."""
    own = np.array(parts, dtype=np.uint8)
    before_labels = np.array([groups.index(group) for group in groups])[:kept]
    joined = [data.draw(st.integers(0, 3)) if number % 2 else number + 20 for number in range(10)]
    wider = [joined[group] for group in groups]
    after_labels = np.array([wider.index(group) for group in wider])
    before, after = separate_groups(own[:kept], before_labels), separate_groups(own, after_labels)[:kept]
    assert ((after == before) | (after == Part.UNUSED)).all()


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
    assert "list.txt" in record.message and "one.png, two.png; a name is written without its suffix" in record.message


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
        (None, 1e-9, r"val_fraction=1e-09 of 6 images leaves no image for validation; .* 3 distinct names"),
        (None, 1 - 1e-9, "leaves no image for training; .* 3 distinct names"),
        (["nothing"], 0.5, "val_list=.* leaves no image for validation; .* without its suffix"),
        (["one", "two", "v1.5"], 0.5, "val_list=.* leaves no image for training; take names out"),
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
        split_rows(IDS, PATHS.__getitem__, SplitRule(fraction, val_list=val_list))


def write_set(root: Path, names: list[str]) -> MetadataIndex:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"not read here")
        (root / name).with_suffix(".json").write_bytes(b'{"tags": "a b"}')
    return open_index([root], root.parent / "index")


def parts_of(index: MetadataIndex, rule: SplitRule) -> dict[str, int]:
    return dict(zip(map(index.relative_path, range(len(index))), split_index(index, rule).parts.tolist(), strict=True))


def test_a_path_is_the_key_of_images_whose_folders_repeat_their_names(tmp_path: Path) -> None:
    names = [f"{folder:03}/{stem}.jpg" for folder in range(60) for stem in ("front", "ba.ck")]
    index = write_set(tmp_path / "set", names)
    assert path_ids(index).tolist() == [stable_id(name.removesuffix(".jpg")) for name in sorted(names)]
    rule = SplitRule(0.3, test_fraction=0.2, key="path")
    before = parts_of(index, rule)
    assert set(before.values()) == {Part.TRAIN, Part.TEST, Part.VAL}
    after = parts_of(write_set(tmp_path / "set", [f"{number}/front.jpg" for number in range(500, 560)]), rule)
    assert len(after) == 180 and all(after[name] == part for name, part in before.items())


def test_a_name_is_the_key_of_images_that_move_between_folders(tmp_path: Path) -> None:
    names = [f"{number % 7}/{number}.jpg" for number in range(60)]
    before = parts_of(write_set(tmp_path / "set", names), SplitRule(0.3))
    moved = [f"new/{number}.png" for number in range(60)]
    after = parts_of(write_set(tmp_path / "other", moved), SplitRule(0.3))
    assert [after[name] for name in moved] == [before[name] for name in names]


@pytest.mark.parametrize("key", ["name", "path"])
def test_files_of_one_name_in_different_parts_are_known_by_path(key: SplitKey, tmp_path: Path) -> None:
    index = write_set(tmp_path / "set", [f"{folder}/image.jpg" for folder in range(40)])
    listing = tmp_path / "val.txt"
    found = []
    for chosen in ("7", "8", "7"):
        listing.write_text(f"{chosen}/image")
        found.append(split_index(index, SplitRule(0.1, val_list=listing, key=key)))
    assert [split.rows(Part.VAL).tolist() for split in found] != [found[0].rows(Part.VAL).tolist()] * 3
    assert found[0].split_sha256 == found[2].split_sha256
    for part in (Part.VAL, Part.TRAIN):
        assert found[0].part_sha256(part) != found[1].part_sha256(part)
    listing.write_text("image\nother")
    with pytest.raises(SplitError, match="no image for training"):
        split_index(index, SplitRule(0.1, val_list=listing, key=key))


def test_a_stratified_split_is_known_by_path(tmp_path: Path) -> None:
    index = write_set(tmp_path / "set", [f"{folder}/image.jpg" for folder in range(40)])
    split = split_index(index, SplitRule(0.25, stratified=True))
    np.testing.assert_array_equal(split.keys, path_ids(index))
    other = Split(np.roll(split.parts, 1), split.keys, split.key)
    assert split.key == "path" and other.split_sha256 != split.split_sha256


def test_a_list_with_paths_leaves_the_hash_of_the_others_to_their_names(tmp_path: Path) -> None:
    index = write_set(tmp_path / "set", [f"{number % 3}/{number}.jpg" for number in range(90)])
    listing = tmp_path / "val.txt"
    found = []
    for line in ("4", "1/4"):
        listing.write_text(line)
        found.append(split_index(index, SplitRule(0.1, calib_fraction=0.3, val_list=listing)))
    np.testing.assert_array_equal(found[0].parts, found[1].parts)
    assert [split.key for split in found] == ["name", "path"]


@pytest.mark.parametrize(
    ("names", "known"), [(["image"], "only 1 distinct name,"), (["a", "b", "c"], "only 3 distinct names,")]
)
def test_an_empty_part_of_a_set_with_few_names_says_how_many_and_what_to_set(
    names: list[str], known: str, tmp_path: Path
) -> None:
    paths = [f"{folder}/{name}.jpg" for folder in range(30) for name in names]
    index = write_set(tmp_path / "set", paths)
    for rule in (SplitRule(1e-3), SplitRule(0.999), SplitRule(0.4, calib_fraction=1e-3)):
        with pytest.raises(
            SplitError, match=f"leaves no image for .*{known}.* set data.split_key=path, or (raise|low)"
        ):
            split_index(index, rule)
    assert (np.bincount(split_index(index, SplitRule(0.3, key="path")).parts)[[Part.TRAIN, Part.VAL]] > 0).all()


def test_a_part_far_from_its_share_for_want_of_names_is_said(caplog: pytest.LogCaptureFixture) -> None:
    ids = np.concatenate([np.full(600, stable_id("5"), dtype=np.uint64), MANY[:1400]])
    split_rows(ids, PATHS.__getitem__, SplitRule(0.1))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("37.0 % of the images are for validation, 10.0 % were asked for: ")
    assert "only 1401 distinct names" in line and "set data.split_key=path, or live with it" in line
    caplog.clear()
    split_rows(MANY, PATHS.__getitem__, SplitRule(0.05, test_fraction=0.05))
    assert not caplog.records


@pytest.mark.parametrize("name", ["calib_fraction", "test_fraction"])
def test_a_part_that_was_asked_for_and_is_empty_is_refused(name: str) -> None:
    with pytest.raises(SplitError, match=f"data.{name}=1e-09 of 20000 images leaves no image .* raise it"):
        split_rows(MANY, PATHS.__getitem__, SplitRule(0.1, **{name: 1e-9}))


@given(ids_of, st.lists(st.sampled_from(list(Part)), min_size=50, max_size=50))
def test_the_parts_are_disjoint_and_cover_every_row(ids: list[int], chosen: list[Part]) -> None:
    split = Split(np.array(chosen[: len(ids)], dtype=np.uint8), np.array(ids, dtype=np.uint64))
    rows = np.concatenate([split.rows(part) for part in Part])
    assert sorted(rows.tolist()) == list(range(len(ids)))
    for part in Part:
        assert not split.others(part)[split.rows(part)].any()
        assert split.others(part).sum() == len(ids) - len(split.rows(part))


def test_calibration_and_test_images_are_carved_from_what_a_list_leaves(tmp_path: Path) -> None:
    paths = [PurePosixPath(f"/set/image {number}.png") for number in range(len(MANY))]
    chosen = set(range(0, 2000, 3))
    listing = tmp_path / "val.txt"
    listing.write_text("\n".join(paths[number].stem for number in chosen))
    rule = SplitRule(0.9, calib_fraction=0.1, test_fraction=0.05, val_list=listing)
    split = split_rows(MANY, paths.__getitem__, rule)
    assert set(split.validation_rows.tolist()) == chosen
    by_hash = hashed_parts(MANY, 0.0, 0.1, 0.05)
    rest = split.others(Part.VAL)
    np.testing.assert_array_equal(split.parts[rest], by_hash[rest])
    assert len(split.rows(Part.CALIB)) > 1500 and len(split.rows(Part.TEST)) > 700


def test_the_hash_of_a_split_names_who_is_where_and_not_in_which_order() -> None:
    split = Split(hashed_parts(MANY, 0.1, 0.1, 0.1), MANY)
    order = np.random.default_rng(0).permutation(len(MANY))
    assert Split(split.parts[order], MANY[order]).split_sha256 == split.split_sha256
    moved = split.parts.copy()
    moved[split.training_rows[0]] = Part.TEST
    other = Split(moved, MANY)
    assert other.split_sha256 != split.split_sha256
    assert other.part_sha256(Part.VAL) == split.part_sha256(Part.VAL)
    assert other.part_sha256(Part.TEST) != split.part_sha256(Part.TEST)
    grown = Split(split.parts[:-1], MANY[:-1])
    assert grown.split_sha256 != split.split_sha256
    assert len(split.split_sha256) == 64 and split.split_sha256[:12] in split.describe()
