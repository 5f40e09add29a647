import itertools
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dctn

from tagger.data import hash_cache, phash
from tagger.data.decode import DecodeError
from tagger.data.hash_cache import FILE_NAME, image_hashes
from tagger.data.index import MetadataIndex, open_index
from tagger.data.near_duplicates import MAX_BITS, find_near_duplicates, similar_pairs
from tagger.data.phash import grey_thumbnail, perceptual_hashes
from tagger.data.split import Part, SplitError, SplitRule, split_index
from tagger.files import FormatError
from tests.pictures import encode, scene, worn_copy

MAX_PIXELS = 10**6


def hash_of(*contents: bytes) -> tuple[np.ndarray, np.ndarray]:
    return perceptual_hashes(np.stack([grey_thumbnail(content, max_pixels=MAX_PIXELS) for content in contents]))


def write(root: Path, stem: str, content: bytes, suffix: str = "png") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{stem}.json").write_text(json.dumps({"tags": ["thing"]}))
    path = root / f"{stem}.{suffix}"
    path.write_bytes(content)
    return path


def open_set(root: Path) -> MetadataIndex:
    return open_index([root], root.parent / "index")


# Hashes.


def test_the_transform_is_the_orthonormal_cosine_transform() -> None:
    grey = np.random.default_rng(1).integers(0, 256, (32, 32)).astype(np.float64)
    np.testing.assert_allclose(phash._DCT @ grey @ phash._DCT.T, dctn(grey, norm="ortho"), atol=1e-9)
    lowest = [divmod(int(place), 32) for place in phash._PLACES]
    assert lowest[0] != (0, 0) and len(set(lowest)) == 128
    assert max(map(sum, lowest)) == min(u + v for u, v in np.ndindex(32, 32) if (u, v) not in [(0, 0), *lowest])


def test_copies_lie_within_the_default_threshold_and_others_far_off() -> None:
    originals = [encode(scene(number), "PNG") for number in range(40)]
    copies = [worn_copy(scene(number)) for number in range(40)]
    hashes, usable = hash_of(*originals, *copies)
    assert usable.all()
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None]).astype(int)
    pairs = distance[np.arange(40), np.arange(40, 80)]
    assert pairs[:, 0].max() <= 3 and pairs[:, 1].max() <= 6
    unlike = distance[:40, :40, 0][np.triu_indices(40, 1)]
    assert unlike.min() > MAX_BITS


def test_a_symmetric_drawing_keeps_its_hash_where_half_its_frequencies_are_noise() -> None:
    canvas = np.full((160, 160, 3), 255, dtype=np.uint8)
    canvas[30:130, 40:120] = 0
    canvas[45:70, 55:105] = 255
    drawing = Image.fromarray(canvas)
    hashes, _ = hash_of(encode(drawing, "PNG"), encode(drawing.resize((90, 90)), "JPEG", quality=60))
    assert np.bitwise_count(hashes[0] ^ hashes[1]).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_copy_with_its_orientation_in_exif_is_the_same_image(orientation: int) -> None:
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = scene(3)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(turned[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    hashes, _ = hash_of(encode(scene(3), "PNG"), encode(stored, "JPEG", quality=90, exif=exif))
    assert np.bitwise_count(hashes[0] ^ hashes[1])[0] <= 3


def test_plain_images_are_not_told_apart_and_so_not_grouped() -> None:
    _, usable = hash_of(*(encode(Image.new("RGB", (64, 64), colour), "PNG") for colour in ("red", "white", "gray")))
    assert not usable.any()


def test_what_the_loader_refuses_has_no_thumbnail() -> None:
    content = encode(scene(1), "JPEG")
    with pytest.raises(DecodeError, match="truncated"):
        grey_thumbnail(content[: len(content) // 2], max_pixels=MAX_PIXELS)
    with pytest.raises(DecodeError, match="too many pixels"):
        grey_thumbnail(content, max_pixels=100)


# Pairs and groups.


def distances_allow(left: np.ndarray, right: np.ndarray, bits: int) -> bool:
    differing = [int(a ^ b).bit_count() for a, b in zip(left, right, strict=True)]
    either = [int(a | b).bit_count() for a, b in zip(left, right, strict=True)]
    within = differing[0] <= bits and differing[1] <= 2 * bits
    return within and differing[0] * 20 <= bits * either[0] and sum(differing) * 40 <= 3 * bits * sum(either)


@st.composite
def clustered_hashes(draw: st.DrawFn) -> np.ndarray:
    """Hashes a few bits away from a few centres: a uniform draw would hold no pair."""
    draws = np.random.default_rng(draw(st.integers(0, 2**32)))
    centres = draws.integers(0, 2**64, (draw(st.integers(1, 3)), 2), dtype=np.uint64)
    hashes = centres[draws.integers(0, len(centres), draw(st.integers(2, 25)))]
    for word, most in ((0, draw(st.integers(0, 5))), (1, draw(st.integers(0, 8)))):
        for row in hashes:
            for bit in draws.integers(0, 64, draws.integers(0, most + 1)):
                row[word] ^= np.uint64(1 << int(bit))
    return np.asarray(hashes)


@settings(deadline=None, max_examples=60)
@given(clustered_hashes(), st.integers(0, MAX_BITS))
def test_every_pair_is_found_once_and_no_other(hashes: np.ndarray, bits: int) -> None:
    distinct = np.unique(hashes, axis=0)
    found = [
        tuple(sorted(pair))
        for left, right in similar_pairs(distinct, bits)
        for pair in zip(left.tolist(), right.tolist(), strict=True)
    ]
    expected = [
        (i, j)
        for i, j in itertools.combinations(range(len(distinct)), 2)
        if distances_allow(distinct[i], distinct[j], bits)
    ]
    assert sorted(found) == expected


@settings(deadline=None, max_examples=60)
@given(clustered_hashes(), st.integers(0, 4), st.data())
def test_groups_are_what_the_pairs_connect(hashes: np.ndarray, bits: int, data: st.DataObject) -> None:
    usable = np.array(data.draw(st.lists(st.booleans(), min_size=len(hashes), max_size=len(hashes))))
    found = find_near_duplicates(hashes, usable, bits)
    pairs = [
        (i, j)
        for i, j in itertools.combinations(np.flatnonzero(usable).tolist(), 2)
        if distances_allow(hashes[i], hashes[j], bits) or (hashes[i] == hashes[j]).all()
    ]
    labels = list(range(len(hashes)))
    for i, j in pairs * len(hashes):
        labels[i] = labels[j] = min(labels[i], labels[j])
    assert found.labels.tolist() == labels
    assert found.num_pairs == len(pairs)
    groups = [group.tolist() for group in found.groups()]
    assert sorted(map(tuple, groups)) == sorted(
        {tuple(np.flatnonzero(np.array(labels) == label).tolist()) for label in labels if labels.count(label) > 1}
    )
    assert [len(group) for group in groups] == sorted(map(len, groups), reverse=True)


def test_many_equal_hashes_are_one_group_without_comparing_each_pair() -> None:
    hashes = np.full((200_000, 2), 0x0F0F_1234_5678_9ABC, dtype=np.uint64)
    found = find_near_duplicates(hashes, np.ones(len(hashes), dtype=np.bool_), 3)
    assert not found.labels.any()
    assert found.num_identical == len(hashes) - 1 and found.num_pairs == len(hashes) * (len(hashes) - 1) // 2


def test_a_threshold_that_finds_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="0 to 8"):
        next(similar_pairs(np.zeros((1, 2), dtype=np.uint64), 9))


# The cache.


def reads_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    read: list[str] = []
    original = hash_cache.read_image_file

    def spy(path: Path) -> bytes:
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(hash_cache, "read_image_file", spy)
    return read


def test_only_new_and_changed_images_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "set"
    for number in range(6):
        write(root, f"{number}", encode(scene(number), "PNG"))
    write(root, "broken", b"nothing of an image")
    read = reads_of(monkeypatch)
    first = image_hashes(open_set(root), max_pixels=MAX_PIXELS, num_threads=2)
    assert sorted(read) == sorted(path.name for path in root.glob("*.png"))
    assert first.refused == {"not an image": [6]} and first.usable.tolist() == [True] * 6 + [False]
    read.clear()
    again = image_hashes(open_set(root), max_pixels=MAX_PIXELS)
    assert not read and again.refused == first.refused
    np.testing.assert_array_equal(again.hashes, first.hashes)
    changed = write(root, "2", encode(scene(99), "PNG"))
    os.utime(changed, ns=(1, 1))
    write(root, "a-new", encode(scene(7), "PNG"))
    third = image_hashes(open_set(root), max_pixels=MAX_PIXELS)
    assert sorted(read) == ["2.png", "a-new.png"]
    assert (third.hashes[2] != first.hashes[2]).any()


def test_a_missing_image_is_looked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "set"
    for number in range(2):
        write(root, f"{number}", encode(scene(number), "PNG"))
    index = open_set(root)
    content = (root / "1.png").read_bytes()
    (root / "1.png").unlink()
    assert image_hashes(index, max_pixels=MAX_PIXELS).refused == {"missing": [1]}
    (root / "1.png").write_bytes(content)
    read = reads_of(monkeypatch)
    assert image_hashes(index, max_pixels=MAX_PIXELS).refused == {} and read == ["1.png"]


def test_an_interruption_keeps_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "set"
    for number in range(5):
        write(root, f"{number}", encode(scene(number), "PNG"))
    monkeypatch.setattr(hash_cache, "_BLOCK_ROWS", 2)

    def interrupt(done: int, _total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        image_hashes(open_set(root), max_pixels=MAX_PIXELS, progress=interrupt)
    read = reads_of(monkeypatch)
    image_hashes(open_set(root), max_pixels=MAX_PIXELS)
    assert read == ["4.png"]


def test_a_damaged_cache_is_made_anew_and_one_of_another_method_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "set"
    write(root, "one", encode(scene(1), "PNG"))
    index = open_set(root)
    image_hashes(index, max_pixels=MAX_PIXELS)
    cache = index.path.parent / FILE_NAME
    content = cache.read_bytes()
    read = reads_of(monkeypatch)
    for damaged in (b"", b"PK", content[:-30], content[:200] + b"\xff" * 40 + content[240:]):
        cache.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            image_hashes(index, max_pixels=MAX_PIXELS)
        assert len(read) == 1 and "damaged" in caplog.text
        read.clear()
    monkeypatch.setattr(hash_cache, "METHOD_VERSION", phash.METHOD_VERSION + 1)
    image_hashes(index, max_pixels=MAX_PIXELS)
    assert len(read) == 1
    monkeypatch.setattr(hash_cache, "FORMAT_VERSION", 0)
    with pytest.raises(FormatError, match=r"format_version 1, this program reads up to 0; update"):
        image_hashes(index, max_pixels=MAX_PIXELS)


# Splits with groups.


def test_copies_land_on_one_side_and_the_held_out_one_wins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "set"
    for number in range(40):
        write(root, f"{number}", encode(scene(number), "PNG"))
        write(root / "copies", f"copy {number}", worn_copy(scene(number)), "jpg")
    index = open_set(root)
    rule = SplitRule(0.2, calib_fraction=0.1, test_fraction=0.1)
    alone = split_index(index, rule)
    with caplog.at_level(logging.INFO):
        grouped = split_index(index, SplitRule(0.2, 0.1, 0.1, near_duplicate_bits=3))
    part_of = {index.stem(row): int(grouped.parts[row]) for row in range(len(index))}
    own_part = {index.stem(row): int(alone.parts[row]) for row in range(len(index))}
    assert any(own_part[f"{number}"] != own_part[f"copy {number}"] for number in range(40))
    for pair in ((f"{number}", f"copy {number}") for number in range(40)):
        highest = max(own_part[name] for name in pair)
        assert [part_of[name] for name in pair] == [
            own_part[name] if own_part[name] == highest else Part.UNUSED for name in pair
        ]
    unused = [name for name, part in part_of.items() if part == Part.UNUSED]
    trained = [name for name in unused if own_part[name] == Part.TRAIN]
    assert len(trained) > 5 and not set(unused) & set(map(index.stem, grouped.training_rows.tolist()))
    said = f"40 groups of 80 images, the largest of 2; left out as copies of held-out images: {len(trained)} from"
    assert said in caplog.text
    assert f"{len(unused)} images for no use (copies of held-out images)" in grouped.describe()


def test_a_newcomer_that_connects_groups_moves_nobody_to_another_side(tmp_path: Path) -> None:
    """A picture, one like it, and one like both: the last comes later and makes one group of them."""
    root = tmp_path / "set"
    rule = SplitRule(0.3, 0.15, 0.15, near_duplicate_bits=3)
    for number in range(40):
        write(root, f"{number}", encode(scene(number), "PNG"))
    before_index = open_set(root)
    before = split_index(before_index, rule)
    part_of = {before_index.stem(row): int(before.parts[row]) for row in range(len(before_index))}
    for number in range(40):
        write(root / "later", f"copy {number}", worn_copy(scene(number)), "jpg")
    index = open_set(root)
    after = split_index(index, rule)
    changed = [
        (part_of[index.stem(row)], int(after.parts[row])) for row in range(len(index)) if index.stem(row) in part_of
    ]
    assert {new for old, new in changed if new != old} == {Part.UNUSED}
    assert all(new == Part.VAL for old, new in changed if old == Part.VAL)


def test_copies_of_listed_images_are_never_trained_on(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for number in range(10):
        write(root, f"{number}", encode(scene(number), "PNG"))
    write(root, "copy", worn_copy(scene(4)), "jpg")
    (tmp_path / "val.txt").write_text("4\n")
    index = open_set(root)
    split = split_index(index, SplitRule(0.5, val_list=tmp_path / "val.txt", near_duplicate_bits=3))
    assert [index.stem(int(row)) for row in split.validation_rows] == ["4"]
    assert [index.stem(int(row)) for row in split.rows(Part.UNUSED)] == ["copy"]


def test_groups_that_hold_out_most_of_the_set_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "set"
    for number in range(12):
        write(root, f"frame {number}", encode(scene(0), "JPEG", quality=60 + number), "jpg")
    for number in range(30):
        write(root, f"other {number}", encode(scene(1 + number), "PNG"))
    with caplog.at_level(logging.WARNING):
        split = split_index(open_set(root), SplitRule(0.1, near_duplicate_bits=3))
    frames = [row for row in range(len(split.parts)) if split.parts[row] in (Part.VAL, Part.UNUSED)]
    assert len(frames) >= 12 and (split.parts == Part.UNUSED).sum() == 9
    assert "more than twice what the fractions say" in caplog.text
    one = tmp_path / "one"
    for number in range(12):
        write(one, f"frame {number}", encode(scene(0), "JPEG", quality=60 + number), "jpg")
    with pytest.raises(SplitError, match="leaves no image for training"):
        split_index(open_set(one), SplitRule(0.3, near_duplicate_bits=3))
