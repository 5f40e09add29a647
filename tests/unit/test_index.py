"""The metadata index: the same rows everywhere, nothing dropped unseen, reused while the files are the same."""

import errno
import multiprocessing
import os
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import orjson
import pytest

from tagger.data import index_build, sidecar_rows
from tagger.data.columns import open_column
from tagger.data.index import DatasetError, MetadataIndex, open_index
from tagger.files import FormatError
from tagger.rng import stable_id


def _image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not read by the index")


def _pair(path: Path, tags: object, **fields: object) -> Path:
    _image(path)
    sidecar = path.with_suffix(".json")
    sidecar.write_bytes(orjson.dumps({"tags": tags, **fields}))
    return sidecar


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three rows, in two folders, with their own tags and ratings."""
    _pair(tmp_path / "set/b/sun.png", ["sun", "sky"], rating="s", categories=["weather"])
    _pair(tmp_path / "set/a.JPG", "sky, red ball", rating=0)
    _pair(tmp_path / "set/b/moon.webp", "moon sky")
    return tmp_path / "set"


def _open(root: Path, **options: object) -> MetadataIndex:
    return open_index([root], root.parent / "index", **options)


def _rows(index: MetadataIndex) -> list[tuple[str, tuple[str, ...], str | None]]:
    records = [index.record(row) for row in range(len(index))]
    return [(index.relative_path(row), record.tags, record.rating) for row, record in enumerate(records)]


def _kinds(index: MetadataIndex) -> dict[str, str]:
    return {Path(item.path).name: item.kind for item in index.rejected}


def test_an_extra_field_that_gives_no_tag_is_warned_of(root, caplog):
    for _ in range(2):  # built, and opened as it is
        caplog.clear()
        _open(root, extra_fields=["categories", "nothere=not"])
        assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
            "data.extra_fields: no image has a tag by the field 'nothere'; check its spelling"
        ]


def test_rows_carry_paths_tags_and_ratings_in_path_order(root):
    index = _open(root, extra_fields=["categories"])
    assert _rows(index) == [
        ("a.JPG", ("sky", "red ball"), "general"),
        ("b/moon.webp", ("moon", "sky"), None),
        ("b/sun.png", ("sun", "sky", "category:weather"), "sensitive"),
    ]
    assert index.image_path(2) == root.resolve() / "b/sun.png"
    assert [index.stem(row) for row in range(3)] == ["a", "moon", "sun"]
    assert index.image_ids.tolist() == [stable_id("a"), stable_id("moon"), stable_id("sun")]
    assert index.tag_ids.dtype == np.uint16 and index.tag_offsets.tolist() == [0, 2, 4, 7]
    assert index.ratings.tolist() == [1, 0, 2]
    counts = dict(zip(index.tag_names, index.tag_counts().tolist(), strict=True))
    assert counts == {"sky": 3, "red ball": 1, "moon": 1, "sun": 1, "category:weather": 1}
    assert index.rating_counts() == {"general": 1, "sensitive": 1}
    assert not index.rejected and index.report() == ("3 images with 5 distinct tags in 1 folder",)
    with pytest.raises(IndexError):
        index.record(3)


def test_rows_of_several_roots_follow_their_order(tmp_path):
    for name in ("y", "x"):
        _pair(tmp_path / name / "1.png", [name])
    index = open_index([tmp_path / "y", str(tmp_path / "x")], tmp_path / "index")
    assert [index.image_path(row).parent.name for row in range(2)] == ["y", "x"]
    assert len(set(index.image_ids.tolist())) == 1  # one stem, one id


def test_what_gives_no_row_is_counted_and_listed(root):
    (root / "empty.json").write_bytes(b"")
    (root / "broken.json").write_bytes(b'{"tags": [')
    (root / "untagged.json").write_bytes(b'{"tags": []}')
    (root / "number.json").write_bytes(b'{"tags": ["a", 1]}')
    for stem in ("empty", "broken", "untagged", "number", "lonely"):
        _image(root / f"{stem}.png")
    (root / "orphan.json").write_bytes(b'{"tags": ["a"]}')
    _pair(root / "odd.png", ["sky"], rating="unrated")
    index = _open(root)
    assert _kinds(index) == {
        "broken.json": "invalid JSON",
        "empty.json": "empty file",
        "number.json": "a tag is not a string",
        "untagged.json": "no tags",
    }
    assert [Path(path).name for path in index.images_without_sidecar] == ["lonely.png"]
    assert [Path(path).name for path in index.sidecars_without_image] == ["orphan.json"]
    assert len(index) == 4
    report = "\n".join(index.report())
    for words in (
        "rejected, no tags: 1 (",
        "images without sidecar: 1 (",
        "sidecars without image: 1 (",
        "(tags[1] is",
    ):
        assert words in report
    assert "ratings not understood (rows kept without): 1 (" in report and "odd.json (unrated)" in report
    again = _open(root)  # the list is part of the index, not of the build
    assert again.path == index.path and again.rejected == index.rejected


def test_a_report_names_at_most_three_examples(root):
    for number in range(5):
        _image(root / f"n{number}.png")
    line = next(line for line in _open(root).report() if line.startswith("images without sidecar"))
    assert line.startswith("images without sidecar: 5 (") and line.endswith(", ...)") and "n3.png" not in line


def test_of_two_images_with_one_stem_the_sidecar_names_its_own(tmp_path):
    root = tmp_path / "set"
    _pair(root / "a.jpg", ["one"], filename="a.png")
    _image(root / "a.png")
    _pair(root / "b.jpg", ["two"], filename="other.png")
    _image(root / "b.png")
    _image(root / "c.jpg")
    _image(root / "c.png")
    index = _open(root)
    assert [row[0] for row in _rows(index)] == ["a.png"]
    assert _kinds(index) == {"b.json": "ambiguous image"} and "b.jpg, b.png" in index.rejected[0].reason
    assert sorted(Path(path).name for path in index.images_without_sidecar) == ["a.jpg", "c.jpg", "c.png"]


@pytest.mark.skipif(os.name == "nt", reason="file names there ignore case")
def test_of_two_sidecars_with_one_stem_the_second_is_refused(root):
    if (root / "b" / "SUN.PNG").exists():
        pytest.skip("file names on this disk ignore case")
    (root / "b/sun.JSON").write_bytes(b'{"tags": ["other"]}')
    index = _open(root)
    assert len(index) == 3 and _kinds(index) == {"sun.JSON": "second sidecar of one image"}


def test_a_hidden_file_is_nothing_to_report(root):
    before = open_index([root], root.parent / "index before").report()
    (root / ".DS_Store").touch()
    (root / ".demo-complete").write_text("{}")
    assert _open(root).report() == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs and symbolic links")
def test_links_to_folders_fifos_and_hidden_folders_are_skipped_and_counted(root):
    (root / "loop").symlink_to(root, target_is_directory=True)
    os.mkfifo(root / "pipe.json")
    os.mkfifo(root / "pipe.png")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    _pair(root / ".cache/1.png", ["hidden"])
    (root / ".DS_Store").touch()
    (root / "link.png").symlink_to(root / "b/sun.png")
    (root / "link.json").symlink_to(root / "b/sun.json")
    index = _open(root)
    assert [row[0] for row in _rows(index)] == ["a.JPG", "b/moon.webp", "b/sun.png", "link.png"]
    assert index.report()[-1] == "skipped: 1 hidden folders, 1 links to folders, 3 not regular files"


@pytest.mark.skipif(os.name == "nt" or os.uname().sysname == "Darwin", reason="file names there are always text")
def test_undecodable_file_names_survive(tmp_path):
    folder = os.fsencode(tmp_path / "set")
    (tmp_path / "set").mkdir()
    for name, content in ((b"caf\xe9.png", b""), (b"caf\xe9.json", b'{"tags": ["x"]}'), (b"bad\xe9.json", b"{}")):
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(content)
    index = _open(tmp_path / "set")
    assert index.image_path(0).exists()
    assert index.image_ids[0] == stable_id(index.stem(0))
    assert "bad\\udce9.json" in index.sidecars_without_image[0]


def test_an_unchanged_data_set_is_not_built_again(root, monkeypatch):
    first = _open(root)
    monkeypatch.setattr("tagger.data.index.add_scanned_rows", None)
    assert _open(root).path == first.path


@pytest.mark.parametrize("change", ["edit", "add", "remove", "rename", "image"])
def test_a_changed_data_set_is_built_again(root, change):
    first = _open(root)
    sidecar = root / "b/sun.json"
    if change == "edit":
        sidecar.write_bytes(sidecar.read_bytes().replace(b"sun", b"sum"))
        os.utime(sidecar, ns=(1, 1))
    elif change == "add":
        _pair(root / "new.png", ["new"])
    elif change == "remove":
        sidecar.unlink()
    elif change == "rename":
        sidecar.rename(root / "b/son.json")
        (root / "b/sun.png").rename(root / "b/son.png")
    else:
        _image(root / "more.png")
    second = _open(root)
    assert second.fingerprint != first.fingerprint and second.path != first.path
    assert _rows(second) != _rows(first) or change == "image"
    assert len(_rows(first)) == 3  # what another run has open stays readable


def test_other_fields_are_another_index_and_old_generations_go(root):
    plain = _open(root)
    assert _open(root, extra_fields=["categories"]).path.parent != plain.path.parent
    for number in range(4):
        os.utime(root / "a.json", ns=(number + 1, number + 1))
        newest = _open(root)
    kept = [path.name for path in newest.path.parent.iterdir()]
    assert len(kept) == 2 and newest.path.name in kept


@pytest.mark.parametrize("damage", ["short", "missing", "meta"])
def test_a_damaged_index_is_refused_by_path_and_built_anew(root, damage):
    index = _open(root)
    rows = _rows(index)
    path = index.path
    if damage == "short":
        os.truncate(path / "tag_ids.npy", 130)
    elif damage == "missing":
        (path / "ratings.npy").unlink()
    else:
        (path / "meta.json").write_bytes(b"{")
    with pytest.raises(FormatError):
        MetadataIndex.load(path)
    assert _rows(_open(root)) == rows


def test_a_newer_index_is_refused_by_name(root):
    path = _open(root).path
    meta = orjson.loads((path / "meta.json").read_bytes())
    (path / "meta.json").write_bytes(orjson.dumps({**meta, "format_version": 99}))
    with pytest.raises(FormatError, match="format_version 99"):
        MetadataIndex.load(path)


def test_an_index_inside_a_root_does_not_change_it(root):
    first = open_index([root], root / "cache")
    assert open_index([root], root / "cache").path == first.path
    assert not first.sidecars_without_image


def _count_in_child(index: MetadataIndex) -> int:
    return int(index.tag_counts().sum())


def test_another_process_gets_the_path_not_the_rows(tmp_path):
    for number in range(300):
        _pair(tmp_path / "set" / f"{number}.png", [f"tag{number}", "all"])
    index = _open(tmp_path / "set")
    assert len(pickle.dumps(index)) < 500
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_count_in_child, (index,)) == 600
    assert not index.tag_ids.flags.writeable


def test_many_tags_take_four_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(index_build, "BLOCK_ROWS", 8)  # the type has to change while the column is being written
    with index_build.RowWriter(tmp_path, with_marks=False) as rows:
        for start in range(0, 70_000, 1000):
            rows.add(f"{start}.png", [f"t{number}" for number in range(start, start + 1000)], None)
        sizes = rows.close()
    ids = open_column(tmp_path / "tag_ids.npy")
    assert ids.dtype == np.uint32 and np.array_equal(ids, np.arange(70_000))
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == sizes
    assert open_column(tmp_path / "tag_counts.npy").sum() == 70_000


@pytest.fixture
def many(tmp_path: Path) -> Path:
    for number in range(700):
        _pair(tmp_path / "many" / f"{number:04}.png", [f"tag{number}"])
    return tmp_path / "many"


def test_slow_storage_is_read_in_threads_and_gives_the_same_rows(many, monkeypatch):
    expected = _rows(_open(many))
    threads: set[int] = set()
    read = sidecar_rows._read_once

    def slowly(path: str, folder: int | None = None) -> object:
        threads.add(threading.get_ident())
        time.sleep(0.0005)
        return read(path, folder)

    monkeypatch.setattr(sidecar_rows, "_read_once", slowly)
    index = open_index([many], many.parent / "other")
    assert _rows(index) == expected and index.tag_names[:2] == ("tag0", "tag1")
    assert len(threads) > 2


def _fail(monkeypatch: pytest.MonkeyPatch, code: int, times: int) -> None:
    read = sidecar_rows._read_once
    left = [times]

    def fail(path: str, folder: int | None = None) -> object:
        if path.endswith("sun.json") and left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code), path)
        return read(path, folder)

    monkeypatch.setattr(sidecar_rows, "_read_once", fail)
    monkeypatch.setattr(sidecar_rows, "_RETRY_WAITS_S", (0.0, 0.0))


def test_a_sidecar_that_cannot_be_read_is_looked_for_again_next_time(root, monkeypatch):
    _fail(monkeypatch, errno.EACCES, 2)  # one look, and another to say why
    index = _open(root)
    assert len(index) == 2 and _kinds(index) == {"sun.json": "unreadable"} and not index.complete
    healed = _open(root)
    assert len(healed) == 3 and healed.complete and not healed.rejected


def test_a_hiccup_of_the_storage_costs_no_row(root, monkeypatch):
    _fail(monkeypatch, errno.EIO, 2)
    assert len(_open(root)) == 3


def test_an_outage_of_the_storage_stops_the_build(root, monkeypatch):
    _fail(monkeypatch, errno.ESTALE, 99)
    with pytest.raises(DatasetError, match=r"cannot read .*sun\.json: .*start again"):
        _open(root)
    assert not list((root.parent / "index").glob("*/*"))


def test_a_failed_write_leaves_nothing_and_names_the_folder(root, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tagger.data.columns.os.fsync", full)
    with pytest.raises(DatasetError, match=r"data\.index_dir: cannot write .*No space left"):
        _open(root)
    assert not list((root.parent / "index").glob("*/*"))


def test_roots_that_cannot_be_used_are_refused_in_one_line(tmp_path, root):
    (tmp_path / "texts").mkdir()
    for number in range(10):
        (tmp_path / "texts" / f"{number}.txt").write_text("x")
    for number in range(2):
        (tmp_path / "texts" / f"{number}.json").write_text("{}")
    (tmp_path / "void").mkdir()
    _image(tmp_path / "bare/1.png")
    _image(tmp_path / "bad/1.png")
    (tmp_path / "bad/1.json").write_text("{}")
    cases = {
        (): "data.roots is empty",
        ("nowhere",): f"data.roots: {tmp_path / 'nowhere'} does not exist",
        ("set/a.JPG",): "is a file; name the folder",
        ("texts",): f"data.roots: no images found in {tmp_path / 'texts'}: it holds 12 files (.txt 10, .json 2)",
        ("set", "void"): "it holds no files",
        ("set", "set/b"): "overlap",
        ("set", "set"): "overlap",
        ("bare",): "there is no sidecar; put a .json of the same stem",
        ("bad",): "rejected 1 (no 'tags' key 1), the first",
    }
    for names, message in cases.items():
        with pytest.raises(DatasetError) as caught:
            open_index([tmp_path / name for name in names], tmp_path / "index")
        assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DatasetError, match=r"data\.extra_fields: extra field 'tags'"):
        _open(root, extra_fields=["tags"])


# Annotation files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "sub/b.png", "c.png"):
        _image(tmp_path / "images" / name)
    return tmp_path / "images"


def _annotate(folder: Path, content: bytes, name: str = "tags.json") -> MetadataIndex:
    path = folder.parent / name
    path.write_bytes(content)
    return open_index([folder], folder.parent / "index", extra_fields=["categories"], annotations=path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.json", b'[{"filename": "sub/b.png", "tags": "x y"}, {"image": "a.png", "tags": ["z"], "rating": "q"}]'),
        ("t.json", b'{"sub/b.png": {"tags": ["x", "y"]}, "./a.png": {"tags": "z", "rating": 2}}'),
        ("t.jsonl", b'{"path": "sub\\\\b.png", "tags": "x,y"}\n\n{"file_name": "a.png", "tags": "z", "rating": "q"}'),
    ],
)
def test_annotation_files_of_each_form_give_the_same_rows(folder, name, content):
    index = _annotate(folder, content, name)
    assert _rows(index) == [("a.png", ("z",), "questionable"), ("sub/b.png", ("x", "y"), None)]
    assert index.image_path(1) == folder.resolve() / "sub/b.png"
    assert [Path(path).name for path in index.images_without_sidecar] == ["c.png"]
    assert index.report()[1].startswith("images without an entry: 1 (")


def test_annotations_from_name_to_tags_alone(folder):
    assert _rows(_annotate(folder, b'{"a.png": ["x"], "c.png": "y z"}')) == [
        ("a.png", ("x",), None),
        ("c.png", ("y", "z"), None),
    ]


def test_annotation_entries_that_give_no_row_are_listed_with_their_line(folder):
    lines = [
        b'{"filename": "a.png", "tags": ["x"], "categories": ["food"]}',
        b'{"filename": "../secret.png", "tags": ["x"]}',
        b'{"filename": "/etc/a.png", "tags": ["x"]}',
        b'{"filename": "C:\\\\a.png", "tags": ["x"]}',
        b'{"filename": "gone.png", "tags": ["x"]}',
        b'{"filename": "notes.txt", "tags": ["x"]}',
        b'{"filename": "a.png", "tags": ["twice"]}',
        b'{"filename": 3, "tags": ["x"]}',
        b'{"tags": ["x"]}',
        b'{"filename": "c.png"}',
        b'{"filename": "c.png", ',
        b"[]",
    ]
    index = _annotate(folder, b"\n".join(lines), "tags.jsonl")
    assert _rows(index) == [("a.png", ("x", "category:food"), None)]
    assert [(item.path.rpartition(" line ")[2], item.kind) for item in index.rejected] == [
        ("2", "path outside the image folder"),
        ("3", "path outside the image folder"),
        ("4", "path outside the image folder"),
        ("5", "missing image"),
        ("6", "not an image"),
        ("7", "image named twice"),
        ("8", "the image name is not a string"),
        ("9", "no image name"),
        ("10", "no 'tags' key"),
        ("11", "invalid JSON"),
        ("12", "not a JSON object"),
    ]


def test_a_changed_annotation_file_or_folder_is_read_again(folder):
    first = _annotate(folder, b'{"a.png": ["x"]}')
    assert _annotate(folder, b'{"a.png": ["xyz"]}').tag_names == ("xyz",)
    _image(folder / "d.png")
    assert _annotate(folder, b'{"a.png": ["x"]}').fingerprint != first.fingerprint


def test_annotation_files_that_cannot_be_used_are_refused_in_one_line(folder):
    for content, message in (
        (b'{"a.png": ', "invalid JSON"),
        (b"3", "holds a number; expected a list"),
        (b"[]", "has no entry"),
        (b'{"gone.png": ["x"]}', "missing image 1"),
    ):
        with pytest.raises(DatasetError, match=message):
            _annotate(folder, content)
    with pytest.raises(DatasetError, match=r"data\.annotations: cannot read .*gone\.json"):
        open_index([folder], folder.parent / "index", annotations=folder / "gone.json")
    with pytest.raises(DatasetError, match="needs one image folder"):
        open_index([folder, folder.parent], folder.parent / "index", annotations=folder / "gone.json")
