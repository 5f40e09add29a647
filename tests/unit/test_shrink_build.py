"""Building the shrink cache: sets that change, builds that are interrupted, caches that are damaged."""

import dataclasses
import errno
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tagger.data import shrink_shards, shrink_tables, shrink_worker
from tagger.data.shrink_build import REFUSED, BuildProgress, build_cache
from tagger.data.shrink_cache import CacheError, ShrinkCache
from tagger.files import FormatError
from tests.tiny_cache import (
    NUM_IMAGES,
    OPTIONS,
    RECIPE,
    SIZE,
    build,
    content_of,
    expected_copy,
    images_of,
    indexed,
    read,
    write_image,
    write_images,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_images(tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def members_of(folder: Path) -> list[str]:
    names: list[str] = []
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            names += tar.getnames()
    return names


# A set that changes


def test_a_second_build_adds_only_what_is_new(root: Path, folder: Path) -> None:
    build(folder, root)
    before = content_of(folder)
    assert build(folder, root).progress == BuildProgress(NUM_IMAGES, NUM_IMAGES)
    assert content_of(folder) == before
    write_images(root, range(NUM_IMAGES, NUM_IMAGES + 2))
    assert build(folder, root).progress == BuildProgress(NUM_IMAGES + 2, NUM_IMAGES, made=2)
    assert {name: content for name, content in content_of(folder).items() if name in before and "shard" in name} == {
        name: content for name, content in before.items() if "shard" in name
    }
    cache = ShrinkCache.open(folder)
    assert all(read(cache, path) == expected_copy(path) for path in images_of(root))


def test_a_renamed_or_copied_image_is_known_by_its_content(root: Path, folder: Path) -> None:
    build(folder, root)
    first, second, *_ = images_of(root)
    first.rename(first.with_name("renamed.jpg"))
    first.with_suffix(".json").rename(first.with_name("renamed.json"))
    shutil.copy(second, root / "copied.jpg")
    (root / "copied.json").write_text('{"tags": "a_tag"}')
    cache = ShrinkCache.open(folder)
    assert read(cache, root / "copied.jpg") is None
    assert build(folder, root).progress == BuildProgress(NUM_IMAGES + 1, NUM_IMAGES - 1, linked=2)
    cache = ShrinkCache.open(folder)
    assert len(cache) == NUM_IMAGES
    assert all(read(cache, path) == expected_copy(path) for path in images_of(root))


def test_the_same_content_twice_is_stored_once(root: Path, folder: Path) -> None:
    for name in ("twin.jpg", "other/twin.jpg", "z.jpg"):
        write_image(root / name, 0)  # the content of a/000.jpg
    report = build(folder, root)
    assert (report.progress.made, report.progress.linked) == (NUM_IMAGES, 3)
    cache = ShrinkCache.open(folder)
    assert all(read(cache, path) == expected_copy(path) for path in images_of(root))


def test_a_changed_image_misses_until_it_is_built_again(root: Path, folder: Path) -> None:
    build(folder, root)
    changed, touched, *_ = images_of(root)
    write_image(changed, 77)
    os.utime(touched, ns=(1, 1))
    cache = ShrinkCache.open(folder)
    assert read(cache, changed) is None and read(cache, touched) is None
    assert build(folder, root).progress == BuildProgress(NUM_IMAGES, NUM_IMAGES - 2, made=1, linked=1)
    cache = ShrinkCache.open(folder)
    assert read(cache, changed) == expected_copy(changed)
    assert read(cache, touched) == expected_copy(touched)


@pytest.mark.parametrize("form", ["tar", "loose"])
def test_prune_drops_what_is_gone_and_nothing_else(root: Path, folder: Path, form: str) -> None:
    build(folder, root, form=form)
    gone = images_of(root)[1:4]
    for path in gone:
        path.unlink()
    assert build(folder, root, form=form).num_entries == NUM_IMAGES
    untouched = {name: content for name, content in content_of(folder).items() if name.startswith("shard-000002")}
    report = build(folder, root, form=form, prune=True)
    assert (report.dropped, report.num_entries) == (3, NUM_IMAGES - 3)
    cache = ShrinkCache.open(folder)
    assert all(read(cache, path) == expected_copy(path) for path in images_of(root))
    after = content_of(folder)
    assert untouched.items() <= after.items()
    assert sum(name.endswith(".jpg") for name in after) == (NUM_IMAGES - 3 if form == "loose" else 0)
    assert len(members_of(folder)) == (2 * (NUM_IMAGES - 3) if form == "tar" else 0)
    assert build(folder, root, form=form, prune=True).dropped == 0
    assert content_of(folder) == after


def test_whatever_happens_to_the_files_no_copy_is_wrong(tmp_path: Path) -> None:
    for seed in range(4):
        draw, home = random.Random(seed), tmp_path / str(seed)
        root, folder = home / "images", home / "cache"
        write_images(root, range(6))
        for step in range(5):
            for _ in range(3):
                _disturb(root, draw, 100 * seed + step)
            prune = draw.random() < 0.4
            report = build(folder, root, prune=prune, shard_images=draw.choice([1, 2, 100]))
            cache = ShrinkCache.open(folder)
            assert [read(cache, path) for path in images_of(root)] == [expected_copy(path) for path in images_of(root)]
            if prune:
                assert report.num_entries == len({path.read_bytes() for path in images_of(root)})


def _disturb(root: Path, draw: random.Random, number: int) -> None:
    path = draw.choice(images_of(root))
    new = root / f"{draw.randrange(10**9)}{path.suffix}"
    match draw.choice(["add", "change", "rename", "copy", "delete"]):
        case "add":
            write_image(new, number)
        case "change":
            write_image(path, number + 50)
        case "rename":
            path.rename(new)
            new.with_suffix(".json").write_text('{"tags": "a_tag"}')
        case "copy":
            shutil.copy2(path, new)
            new.with_suffix(".json").write_text('{"tags": "a_tag"}')
        case _ if len(images_of(root)) > 2:
            path.unlink()


def test_what_cannot_be_decoded_is_listed_and_tried_again(root: Path, folder: Path) -> None:
    cut, empty = images_of(root)[:2]
    cut.write_bytes(cut.read_bytes()[:400])
    empty.write_bytes(b"")
    report = build(folder, root)
    assert [(item.path, item.reason) for item in report.refused] == [
        (str(cut), "truncated"),
        (str(empty), "empty file"),
    ]
    listed = json.loads((folder / REFUSED).read_text())["refused"]
    assert [path for path, _ in listed] == [str(cut), str(empty)] and listed[0][1].startswith("truncated (")
    cache = ShrinkCache.open(folder)
    assert read(cache, cut) is None and read(cache, empty) is None
    write_image(cut, 5)
    write_image(empty, 6)
    report = build(folder, root)
    assert report.refused == () and report.progress.current == NUM_IMAGES - 2
    assert json.loads((folder / REFUSED).read_text())["refused"] == []


def test_a_file_that_changes_while_it_is_read_is_not_cached(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = images_of(root)[0]

    def read_and_change(path: Path) -> bytes:
        content = path.read_bytes()
        if path == victim:
            write_image(path, 99)
        return content

    monkeypatch.setattr(shrink_worker, "read_image_file", read_and_change)
    report = build(folder, root)
    assert [(item.path, item.reason) for item in report.refused] == [(str(victim), "changed while it was read")]
    assert read(ShrinkCache.open(folder), victim) is None


# Interruptions


def _snapshots(root: Path, home: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> list[Path]:
    """The folder as a kill would leave it: after every image, and before and after each time a name is made durable."""
    taken: list[Path] = []

    def take() -> None:
        taken.append(home / f"killed-{len(taken)}")
        shutil.copytree(home / "cache", taken[-1])
        (taken[-1] / "build.lock").unlink(missing_ok=True)

    def noticed(sync: Callable[[Path], None]) -> Callable[[Path], None]:
        def wrapped(folder: Path) -> None:
            take()
            sync(folder)

        return wrapped

    for module in (shrink_shards, shrink_tables):
        monkeypatch.setattr(module, "fsync_folder", noticed(module.fsync_folder))
    options = dataclasses.replace(OPTIONS, **changes)  # type: ignore[arg-type]
    build_cache(home / "cache", indexed(root), options, lambda _: take())
    monkeypatch.undo()
    return taken


@pytest.mark.parametrize("form", ["tar", "loose"])
def test_a_build_killed_anywhere_ends_as_an_uninterrupted_one(
    root: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(root / "a/twin.jpg", 0)  # the content of a/000.jpg, which a resume must not store again
    (root / "b/broken.jpg").write_bytes(b"\xff\xd8\xffnothing")
    (root / "b/broken.json").write_text('{"tags": "a_tag"}')
    build(tmp_path / "whole", root, form=form)
    snapshots = _snapshots(root, tmp_path, monkeypatch, form=form)
    assert len(snapshots) > NUM_IMAGES + 8
    for killed in snapshots:
        build(killed, root, form=form)
        assert content_of(killed) == content_of(tmp_path / "whole"), killed


def test_a_prune_killed_anywhere_loses_nothing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "cache", root)
    for path in images_of(root)[1:8:3]:
        path.unlink()
    write_image(root / "new.jpg", 50)
    snapshots = _snapshots(root, tmp_path, monkeypatch, prune=True)
    expected = [expected_copy(path) for path in images_of(root)]
    for killed in snapshots:
        report = build(killed, root, prune=True)
        assert report.num_entries == len(expected)
        cache = ShrinkCache.open(killed)
        assert [read(cache, path) for path in images_of(root)] == expected
        assert len(members_of(killed)) == 2 * len(expected)


def test_ctrl_c_keeps_the_committed_shards(root: Path, folder: Path) -> None:
    def interrupt(progress: BuildProgress) -> None:
        if progress.made == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(folder, indexed(root), OPTIONS, interrupt)
    kept = len(ShrinkCache.open(folder))
    assert 0 < kept <= 8
    assert not list(folder.glob("*.part")) and not (folder / "build.lock").exists()
    assert build(folder, root).progress == BuildProgress(NUM_IMAGES, kept, made=NUM_IMAGES - kept)


def test_a_full_disk_is_one_clear_line_and_the_next_build_goes_on(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    build(folder, root)
    write_images(root, range(20, 23))
    with monkeypatch.context() as patch:
        patch.setattr(shrink_shards._TarWriter, "add", full)
        with pytest.raises(CacheError, match="No space left on device; make room or name another folder"):
            build(folder, root)
    assert len(ShrinkCache.open(folder)) == NUM_IMAGES
    assert build(folder, root).progress.made == 3


# Damage


def test_a_flipped_bit_is_noticed_and_verify_mends_it(
    root: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(folder, root)
    path = images_of(root)[1]
    cache = ShrinkCache.open(folder)
    entry = cache.paths[cache.find_path(str(path), path.stat().st_size, path.stat().st_mtime_ns)].item()[3]
    _, offset, length, _, shard = cache.entries[entry].item()
    with (folder / f"shard-{shard:06}.tar").open("r+b") as stream:
        stream.seek(offset + length // 2)
        byte = stream.read(1)[0]
        stream.seek(offset + length // 2)
        stream.write(bytes([byte ^ 4]))
    for _ in range(2):
        assert read(cache, path) is None
    assert cache.num_damaged == 2
    assert sum("damaged or gone" in record.message for record in caplog.records) == 1
    assert build(folder, root).progress.made == 0
    report = build(folder, root, verify=True)
    assert (report.damaged, report.progress.made) == (1, 1)
    assert read(ShrinkCache.open(folder), path) == expected_copy(path)
    assert build(folder, root, verify=True).damaged == 0


@pytest.mark.parametrize("name", ["entry_hashes.npy", "entries.npy", "path_hashes.npy", "paths.npy", "meta.json"])
def test_a_flipped_bit_in_the_tables_serves_nobody_and_the_next_build_mends_it(
    root: Path, folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The last number of `paths.npy` says whose copy an image has: its checksum would hold for another's."""
    build(folder, root)
    (table,) = folder.glob(f"index-*/{name}")
    raw = bytearray(table.read_bytes())
    raw[-8] ^= 1
    if name == "meta.json":
        meta = json.loads(table.read_bytes())
        raw = bytearray(json.dumps({**meta, "shards": dict.fromkeys(meta["shards"], 7)}).encode())
    table.write_bytes(raw)
    with pytest.raises(FormatError, match=r"the tables in index-.* are not as they were written; start scripts"):
        ShrinkCache.open(folder).require(SIZE, RECIPE.background)
    assert build(folder, root).progress.made == 0
    assert "making its tables anew from its shards" in caplog.text
    cache = ShrinkCache.open(folder)
    cache.require(SIZE, RECIPE.background)
    assert all(read(cache, path) == expected_copy(path) for path in images_of(root))


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_broken_shard_falls_back_and_is_made_again(
    root: Path, folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    build(folder, root)
    shard = folder / "shard-000001.tar"
    if damage == "gone":
        shard.unlink()
    else:
        os.truncate(shard, 5000)
    cache = ShrinkCache.open(folder)
    assert "shard-000001.tar" in caplog.text
    lost = sum(read(cache, path) is None for path in images_of(root))
    assert 0 < lost < NUM_IMAGES
    assert build(folder, root).progress.made >= lost
    cache = ShrinkCache.open(folder)
    assert all(read(cache, path) == expected_copy(path) for path in images_of(root))
    assert not shard.exists()


@pytest.mark.parametrize("name", ["entries.npy", "path_hashes.npy", "meta.json"])
def test_lost_tables_are_made_again_from_the_shards(root: Path, folder: Path, name: str) -> None:
    build(folder, root)
    before = content_of(folder)
    (table,) = folder.glob(f"index-*/{name}")
    table.unlink()
    with pytest.raises(FormatError, match=r"start scripts.build_cache again|does not exist"):
        ShrinkCache.open(folder)
    assert build(folder, root).progress == BuildProgress(NUM_IMAGES, NUM_IMAGES)
    assert content_of(folder) == before


def test_a_foreign_tar_among_the_shards_is_refused(root: Path, folder: Path) -> None:
    build(folder, root)
    with tarfile.open(folder / "shard-000099.tar", "w") as tar:
        tar.add(images_of(root)[0], "picture.png")
    with pytest.raises(FormatError, match=r"shard-000099.tar is not a shard of this cache .*; move it away"):
        build(folder, root)
