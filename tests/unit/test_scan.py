"""The scan of a folder: it pairs names in bulk, and must say what looking at each name alone says."""

import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tagger.data.scan import Problems, image_suffixes, scan_root
from tagger.data.sidecar_rows import FileReader

_stems = st.sampled_from(["a", "b", "a.png", "b.json", ".a", "-", "0", "日本", "a b", "json", "png"])
_suffixes = st.sampled_from([".png", ".jpg", ".json", ".JSON", ".Json", ".PNG", ".txt", "", "."])
_names = st.lists(st.tuples(_stems, _suffixes).map("".join), max_size=14, unique=True)


def _expected(names: list[str]) -> tuple[dict[str, str], set[str], set[str], int]:
    """({image: its sidecar}, images without, sidecars without, seconds of one stem), one name at a time."""
    seen = [name for name in names if not name.startswith(".")]
    images = {name for name in seen if "." in name and name.rpartition(".")[2].lower() in image_suffixes()}
    sidecars: dict[str, str] = {}
    for name in sorted(seen):  # "x.json" comes after "x.JSON" and is kept
        if name.rpartition(".")[2].lower() == "json" and "." in name:
            sidecars[name.rpartition(".")[0]] = name
    seconds = sum(name.lower().endswith(".json") for name in seen) - len(sidecars)
    stems = {image.rpartition(".")[0] for image in images}
    pairs = {image: sidecars[image.rpartition(".")[0]] for image in images if image.rpartition(".")[0] in sidecars}
    return pairs, images - pairs.keys(), {sidecars[stem] for stem in sidecars.keys() - stems}, seconds


@settings(deadline=None, max_examples=60)
@given(_names, st.booleans())
@example(["a.png", "a.json", "b.jpg", "b.json"], True)
@example(["a.png.jpg", "a.png.json", "a.png", "a.json"], False)
@example(["a.png", "a.PNG", "a.json", "a.JSON"], True)
def test_a_folder_is_paired_as_its_names_say(names, with_marks):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "set"
        (root / "inner").mkdir(parents=True)
        (root / "inner/one.png").touch()
        for name in names:
            (root / name).write_bytes(name.encode())
        names = [path.name for path in root.iterdir()]  # a disk may not tell large letters from small ones
        pairs, images, sidecars, seconds = _expected([name for name in names if name != "inner"])
        problems = Problems()
        scan = scan_root(root, problems, with_sidecars=True, with_marks=with_marks)
        rows = range(len(scan.pairs))
        assert scan.pairs.images(rows) == sorted(pairs)
        assert scan.pairs.sidecars(rows) == [pairs[image] for image in sorted(pairs)]
        assert [scan.pairs.sidecar(row) for row in rows] == scan.pairs.sidecars(rows)
        arena, lengths = scan.pairs.image_paths(0, len(rows))
        assert arena.tobytes().decode() == "".join(sorted(pairs))
        assert lengths.tolist() == [len(image.encode()) for image in sorted(pairs)]
        found = [Path(path).relative_to(root).as_posix() for path in problems.images_without_sidecar]
        assert sorted(found) == sorted([*images, "inner/one.png"])
        assert {Path(path).name for path in problems.sidecars_without_image} == sidecars
        assert len(problems.rejected) == seconds
        stems = Counter(image.rpartition(".")[0] for image in pairs)
        assert {stem: len(rows) for stem, rows in scan.pairs.rivals.items()} == {
            stem: count for stem, count in stems.items() if count > 1
        }
        assert scan.num_files == sum(not name.startswith(".") for name in names)  # "inner" for what it holds
        marks = list(zip(scan.pairs.sizes.tolist(), scan.pairs.mtimes.tolist(), strict=True))
        if with_marks:
            facts = [(root / pairs[image]).stat() for image in sorted(pairs)]
            assert marks == [(one.st_size, one.st_mtime_ns) for one in facts]
        else:
            assert set(marks) <= {(-1, 0)}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize("with_marks", [True, False])
def test_folders_links_and_pipes_are_told_from_files_whatever_their_names(tmp_path, with_marks):
    root = tmp_path / "set"
    (root / "a.png").mkdir(parents=True)
    (root / "a.json").mkdir()
    (root / ".hidden").mkdir()
    (root / "a.png/in.jpg").touch()
    (root / "a.png/in.json").write_bytes(b"1234")
    os.mkfifo(root / "b.png")
    (root / "c.png").symlink_to(root / "c.png")
    (root / "d.png").symlink_to(root / "a.png")
    (root / "e.png").symlink_to(root / "a.png/in.jpg")
    (root / "e.json").symlink_to(root / "a.png/in.json")
    problems = Problems()
    scan = scan_root(root, problems, with_sidecars=True, with_marks=with_marks)
    assert scan.pairs.images(range(2)) == ["a.png/in.jpg", "e.png"] and len(scan.pairs) == 2
    assert scan.pairs.sizes.tolist() == ([4, 4] if with_marks else [-1, -1])
    assert problems.skipped == {"hidden folders": 1, "links to folders": 1, "not regular files": 2}
    assert scan.num_files == 7 and scan.num_images == 2


def test_files_of_many_folders_are_read_under_their_own_names(tmp_path):
    names = [f"{folder}{number}.json" for folder in ("", "a/", "a/b/", "c/") for number in range(100)]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    mixed = [name for group in zip(names[:100], names[100:200], strict=True) for name in group]
    reader = FileReader()
    for order in (names, mixed, names[::-1], [*names, "a/missing.json", "none/1.json"]):
        found = [content for files in reader.read(str(tmp_path), order) for content in files.contents]
        assert [content for content in found if isinstance(content, bytes)] == [
            name.encode() for name in order if name in names
        ]
        assert sum(isinstance(content, OSError) for content in found) == len(order) - len(set(order) & set(names))
    reader.close()
