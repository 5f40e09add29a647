"""Damage that keeps a file's size: found in every file of an index before anything is learnt from it, and mended."""

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scripts import index as index_command
from tagger.data import manifest
from tagger.data.batch_job import TagTable
from tagger.data.index import MetadataIndex, open_index
from tagger.files import FormatError
from tests.pictures import encode

NUM_IMAGES = 6
PICTURE = encode(Image.new("RGB", (4, 5)), "PNG")
COLUMNS = (
    *("tag_ids", "tag_offsets", "tag_counts", "image_ids", "ratings", "paths", "path_offsets"),
    *("sidecar_sizes", "sidecar_mtimes"),
)
FILES = [*(f"{name}.npy" for name in COLUMNS), "tags.json", "problems.json", "meta.json"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(NUM_IMAGES):
        (folder / f"{number}.png").write_bytes(PICTURE)
        tags = [f"tag {number}", "sky", f"tag {number // 2}"]
        (folder / f"{number}.json").write_bytes(orjson.dumps({"tags": tags, "rating": "gs"[number % 2]}))
    (folder / "odd.json").write_bytes(b"{}")
    return folder


def content(index: MetadataIndex) -> list[object]:
    facts = [index.tag_counts().tolist(), index.image_ids.tolist(), index.report()]
    return [[index.record(row) for row in range(len(index))], *facts]


def flip_a_bit(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1 << (place % 8)
    path.write_bytes(raw)


def zero_the_page(path: Path, start: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[start:] = bytes(len(raw) - start)
    path.write_bytes(raw)


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_of_any_file_is_found_and_the_index_built_anew(
    root: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    index_dir = root.parent / "index"
    first = open_index([root], index_dir)
    wanted, size = content(first), (first.path / name).stat().st_size
    kept = first.path.with_name(".tmp-kept")
    shutil.copytree(first.path, kept)
    for place in sorted({9, size // 2, size - 1}):
        flip_a_bit(first.path / name, place)
        caplog.clear()
        again = open_index([root], index_dir)
        assert again.path != first.path and content(again) == wanted, place
        (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert str(first.path) in line and "anew" in line
        assert name in line or "its columns do not fit together" in line
        shutil.rmtree(again.path)
        shutil.rmtree(first.path)
        shutil.copytree(kept, first.path)
    assert open_index([root], index_dir).path == first.path


@pytest.mark.parametrize("name", COLUMNS)
def test_a_zeroed_page_is_found_by_whoever_trains(root: Path, name: str) -> None:
    path = open_index([root], root.parent / "index").path
    zero_the_page(path / f"{name}.npy", 128)
    with pytest.raises(FormatError, match=rf"index .* is damaged: ({name}\.npy is not|its columns do not fit)"):
        TagTable.create(MetadataIndex.load(path), lambda _: 0, (), 1)


def test_a_damaged_index_gives_no_row_to_an_update(root: Path) -> None:
    """The old index is read when files have changed; its damage must not pass into the new one."""
    index_dir = root.parent / "index"
    first = open_index([root], index_dir)
    flip_a_bit(first.path / "tag_ids.npy", 130)
    (root / "0.json").write_bytes(b'{"tags": ["another tag"]}')
    index = open_index([root], index_dir)
    assert index.update is not None and index.update.new == NUM_IMAGES and not index.update.kept
    assert content(index) == content(open_index([root], root.parent / "other"))


def test_an_older_generation_that_is_damaged_is_not_gone_back_to(root: Path) -> None:
    index_dir = root.parent / "index"
    before = (root / "0.json").read_bytes(), (root / "0.json").stat().st_mtime_ns
    first = open_index([root], index_dir)
    wanted = content(first)
    (root / "0.json").write_bytes(b'{"tags": ["another tag"]}')
    assert open_index([root], index_dir).path != first.path
    flip_a_bit(first.path / "tag_ids.npy", 130)
    (root / "0.json").write_bytes(before[0])
    os.utime(root / "0.json", ns=(before[1], before[1]))
    back = open_index([root], index_dir)
    assert back.path != first.path and content(back) == wanted


def test_a_whole_index_is_verified_once(root: Path) -> None:
    open_index([root], root.parent / "index")
    index = open_index([root], root.parent / "index")
    flip_a_bit(index.path / "tag_ids.npy", 130)
    index.verify()  # it was, when it was opened
    with pytest.raises(FormatError, match="a start builds it anew"):
        MetadataIndex.load(index.path).verify()


def test_the_command_says_that_an_index_was_damaged(
    root: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    index_dir = root.parent / "index"
    flip_a_bit(open_index([root], index_dir).path / "ratings.npy", 129)
    assert index_command.main([str(root), "--index-dir", str(index_dir)]) == 0
    assert "ratings.npy is not as it was written" in caplog.text
    assert f"+{NUM_IMAGES} new" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["widths.npy", "heights.npy", "file_sizes.npy", "file_mtimes.npy", "broken.json"])
def test_damaged_sizes_of_images_are_read_anew(root: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    headers = open_index([root], root.parent / "index", headers=True).headers
    assert headers is not None
    wanted = [headers.widths.tolist(), headers.heights.tolist(), headers.file_mtimes.tolist()]
    flip_a_bit(headers.path / name, (headers.path / name).stat().st_size - 1)
    again = open_index([root], root.parent / "index", headers=True).headers
    assert again is not None and again.path != headers.path
    assert [again.widths.tolist(), again.heights.tolist(), again.file_mtimes.tolist()] == wanted
    assert f"{name} is not as it was written" in caplog.text


def test_an_unreadable_sector_is_a_line_and_not_a_crash(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = open_index([root], root.parent / "index").path

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(manifest, "_checksum", fail)
    with pytest.raises(FormatError, match=r"index .* cannot be read: Input/output error; a start builds it anew"):
        MetadataIndex.load(path).verify()


@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(0, 10_000), st.booleans())
def test_damage_is_found_in_any_block(num_bytes: int, place: int, zeroed: bool) -> None:
    """Blocks of 64 bytes in pieces of 16 stand for those of megabytes."""
    import tempfile

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        patch.setattr(manifest, "BLOCK_BYTES", 64)
        patch.setattr(manifest, "_PIECE_BYTES", 16)
        folder, raw = Path(name), np.random.default_rng(num_bytes).integers(1, 256, num_bytes, dtype=np.uint8)
        (folder / "a").write_bytes(raw.tobytes())
        (folder / "b").write_bytes(b"")
        manifest.write_manifest(folder, {"a": num_bytes, "b": 0}, {"format_version": 1})
        files = manifest.read_manifest(folder, "folder", 1)["files"]
        manifest.verify_files(folder, files, "folder")
        assert len(files["a"]["crc32"]) == -(-num_bytes // 64) and files["b"]["crc32"] == []
        place %= num_bytes
        raw[place : place + 8 if zeroed else place + 1] ^= raw[place : place + 8] if zeroed else np.uint8(1)
        (folder / "a").write_bytes(raw.tobytes())
        start = place // 64 * 64
        stop = min(start + 64, num_bytes)
        with pytest.raises(FormatError, match=f"a is not as it was written .bytes {start} to {stop}."):
            manifest.verify_files(folder, files, "folder")
