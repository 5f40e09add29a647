"""The shrink cache: what it stores, what it serves, what it refuses, and what is left of an interrupted build."""

import dataclasses
import errno
import hashlib
import io
import json
import multiprocessing
import os
import random
import tarfile
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tagger.data import shrink_build, shrink_cache, shrink_tables, shrink_worker
from tagger.data.decode import decode_image
from tagger.data.shrink_build import BuildProgress, build_cache
from tagger.data.shrink_cache import CacheError, CacheRecipe, Manifest, ShrinkCache
from tagger.data.shrink_tables import PATH_ROW, find_rows
from tagger.files import FormatError
from tagger.preprocess import Preprocess
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
from tests.tiny_dataset import photograph


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_images(tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# What is stored


@pytest.mark.parametrize("form", ["tar", "loose"])
def test_every_image_is_served_as_the_definition_says(root: Path, folder: Path, form: str) -> None:
    report = build(folder, root, form=form)
    assert (report.progress.made, report.num_entries, report.refused) == (NUM_IMAGES, NUM_IMAGES, ())
    cache = ShrinkCache.open(folder)
    assert len(cache) == NUM_IMAGES
    for path in images_of(root):
        assert read(cache, path) == expected_copy(path)


@pytest.mark.parametrize(("height", "width"), [(448, 448), (300, 700), (731, 222)])
def test_pixels_stay_within_what_the_quality_costs(tmp_path: Path, folder: Path, height: int, width: int) -> None:
    size = 224
    for number in range(3):
        write_image(tmp_path / f"images/{number}.png", number, height=height, width=width)
    build(folder, tmp_path / "images", recipe=CacheRecipe(size))
    cache, preprocess = ShrinkCache.open(folder), Preprocess(size)
    for path in images_of(tmp_path / "images"):
        copy = read(cache, path)
        assert copy is not None
        direct, direct_size = preprocess.apply(decode_image(path.read_bytes(), max_pixels=10**9))
        cached, cached_size = preprocess.apply(decode_image(copy, max_pixels=10**9))
        assert cached_size == direct_size
        error = np.mean((direct.numpy().astype(float) - cached.numpy()) ** 2)
        assert 10 * np.log10(255**2 / error) >= 38


def test_a_small_image_is_not_enlarged_and_orientation_and_alpha_are_settled(tmp_path: Path, folder: Path) -> None:
    root = tmp_path / "images"
    write_image(root / "small.png", 1, width=20, height=10)
    write_image(root / "turned.jpg", 2, width=60, height=40)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photograph(2, 40, 60)).save(root / "turned.jpg", exif=exif)
    write_image(root / "clear.png", 3)
    Image.new("RGBA", (30, 30), (0, 0, 0, 0)).save(root / "clear.png")
    build(folder, root)
    cache = ShrinkCache.open(folder)
    shapes = {}
    for path in images_of(root):
        copy = read(cache, path)
        assert copy is not None and copy == expected_copy(path)
        with Image.open(io.BytesIO(copy)) as image:
            shapes[path.stem] = image.size
            assert "exif" not in image.info
            if path.stem == "clear":
                colour = np.asarray(image).reshape(-1, 3)
                assert np.abs(colour.astype(int) - RECIPE.background).max() <= 2
    assert shapes == {"small": (20, 10), "turned": (32, 48), "clear": (30, 30)}


def test_other_tools_read_the_shards_in_order(root: Path, folder: Path) -> None:
    build(folder, root)
    shards = sorted(folder.glob("shard-*.tar"))
    assert len(shards) >= 3
    order = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            members = tar.getmembers()
            assert len(members) % 2 == 0
            for jpeg, facts in zip(members[::2], members[1::2], strict=True):
                key = jpeg.name.removesuffix(".jpg")
                assert (jpeg.name, facts.name) == (f"{key}.jpg", f"{key}.json") and len(key) == 32
                content, source = tar.extractfile(jpeg), tar.extractfile(facts)
                assert content is not None and source is not None
                said = json.load(source)
                order.append(said["path"])
                path = root / said["path"]
                assert said["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
                assert (said["size"], said["mtime_ns"]) == (path.stat().st_size, path.stat().st_mtime_ns)
                assert (said["width"], said["height"]) == (90, 70)
                copy = content.read()
                assert copy == expected_copy(path) and said["crc32"] == zlib.crc32(copy)
    assert order == [str(path.relative_to(root)) for path in images_of(root)]


def test_the_same_images_give_the_same_files(root: Path, tmp_path: Path) -> None:
    build(tmp_path / "one", root)
    build(tmp_path / "two", root)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")


def test_shards_are_closed_at_the_limits(root: Path, folder: Path, tmp_path: Path) -> None:
    build(folder, root, shard_images=5, shard_bytes=10**9)
    cache = ShrinkCache.open(folder)
    assert np.bincount(cache.entries["shard"]).tolist() == [5, 5, 2]
    build(tmp_path / "bytes", root, shard_bytes=12_000)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "bytes").glob("shard-*.tar"))]
    assert all(12_000 <= size < 12_000 + 8_000 for size in sizes[:-1])


# Reading


def test_reads_are_the_same_from_many_threads_and_few_handles(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(folder, root, shard_images=1)
    monkeypatch.setattr(shrink_cache, "_MAX_OPEN_SHARDS", 3)
    cache, paths = ShrinkCache.open(folder), images_of(root)
    expected = {path: expected_copy(path) for path in paths}
    wanted = random.Random(1).choices(paths, k=600)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda path: read(cache, path), wanted)) == [expected[path] for path in wanted]
    assert len(cache._shards._handles) == 3
    cache.close()
    assert read(cache, paths[0]) == expected[paths[0]]


def _read_in_child(cache: ShrinkCache, paths: list[Path], connection: object) -> None:
    connection.send([read(cache, path) for path in paths])  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_cache_travels_to_a_spawned_process(root: Path, folder: Path) -> None:
    build(folder, root)
    cache, paths = ShrinkCache.open(folder), images_of(root)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_read_in_child, args=(cache, paths, there))
    process.start()
    assert here.recv() == [expected_copy(path) for path in paths]
    process.join()


def test_transient_errors_pass_through_and_others_fall_back(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(folder, root)
    cache, path = ShrinkCache.open(folder), images_of(root)[0]

    def failing(code: int) -> Callable[..., bytes]:
        def pread(*_: object) -> bytes:
            raise OSError(code, "injected")

        return pread

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", failing(errno.EIO))
        with pytest.raises(OSError, match="injected"):
            read(cache, path)
        patch.setattr(os, "pread", failing(errno.EINVAL))
        assert read(cache, path) is None
    assert read(cache, path) == expected_copy(path)


def test_equal_halves_of_hashes_are_told_apart(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_id, real_key = shrink_cache.path_id, CacheRecipe.key_of
    for module in (shrink_cache, shrink_worker):
        monkeypatch.setattr(module, "path_id", lambda path: bytes(8) + real_id(path)[8:])
    monkeypatch.setattr(CacheRecipe, "key_of", lambda self, sha256: bytes(8) + real_key(self, sha256)[8:])
    write_image(root / "twin.jpg", 0)
    report = build(folder, root)
    assert (report.progress.made, report.progress.linked) == (NUM_IMAGES, 1)
    cache = ShrinkCache.open(folder)
    assert all(read(cache, path) == expected_copy(path) for path in images_of(root))
    assert cache.find_path("/nowhere", 1, 1) == -1 and cache.find_key(b"\0" * 16) == -1
    assert build(folder, root, prune=True).progress == BuildProgress(NUM_IMAGES + 1, NUM_IMAGES + 1)


def test_tables_replaced_while_a_cache_is_opened_are_found(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(folder, root)
    load, stale = Manifest.load, Manifest.load(folder)
    write_images(root, range(20, 22))
    build(folder, root)
    answers = iter([stale])
    monkeypatch.setattr(Manifest, "load", lambda folder: next(answers, None) or load(folder))
    assert len(ShrinkCache.open(folder)) == NUM_IMAGES + 2


def test_a_build_removes_nothing_that_is_not_its_own(root: Path, folder: Path) -> None:
    build(folder, root)
    for name in ("index-of-birds", "shard-notes.part", "shard-notes.tar"):
        (folder / name).mkdir()
    write_images(root, range(20, 22))
    build(folder, root, prune=True)
    assert {"index-of-birds", "shard-notes.part", "shard-notes.tar"} <= {path.name for path in folder.iterdir()}


def test_rows_are_found_like_a_dictionary_finds_them() -> None:
    generator = np.random.default_rng(3)
    rows = np.zeros(200, PATH_ROW)
    rows["hash"], rows["check"] = generator.integers(0, 40, 200), generator.integers(0, 9, 200)
    rows = shrink_tables._unique(rows)
    places = {(int(row["hash"]), int(row["check"])): place for place, row in enumerate(rows)}
    assert len(places) == len(rows)
    wanted = generator.integers(0, 45, (500, 2)).astype(np.uint64)
    found = find_rows(rows, wanted[:, 0], wanted[:, 1])
    assert found.tolist() == [places.get((int(high), int(low)), -1) for high, low in wanted]
    assert find_rows(rows[:0], wanted[:, 0], wanted[:, 1]).tolist() == [-1] * 500


# What is refused


def test_bad_folders_are_refused_by_name(root: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"holds no shrink cache; make one with `python -m scripts.build_cache`"):
        ShrinkCache.open(folder)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers/letter.txt").write_text("dear reader")
    with pytest.raises(CacheError, match=r"papers is not a shrink cache and not empty \(it holds letter.txt\)"):
        build(tmp_path / "papers", root)
    assert [path.name for path in (tmp_path / "papers").iterdir()] == ["letter.txt"]
    (tmp_path / "photos/index-of-birds").mkdir(parents=True)
    with pytest.raises(CacheError, match=r"it holds index-of-birds"):
        build(tmp_path / "photos", root)
    with pytest.raises(CacheError, match=r"inside data.roots"):
        build(root / "cache", root)
    assert not (root / "cache").exists()
    with pytest.raises(CacheError, match=r"letter\.txt is a file; name a folder"):
        build(tmp_path / "papers/letter.txt", root)


def test_another_recipe_or_form_is_refused_with_the_setting(root: Path, folder: Path) -> None:
    build(folder, root)
    before = content_of(folder)
    for recipe, said in (
        (CacheRecipe(64, RECIPE.background), f"--size {SIZE}, not 64"),
        (CacheRecipe(SIZE), r"data.background=\[10, 200, 30\], not \[255, 255, 255\]"),
        (CacheRecipe(SIZE, RECIPE.background, 90), "--quality 95, not 90"),
    ):
        with pytest.raises(CacheError, match=f"was made with {said}; name another folder"):
            build(folder, root, recipe=recipe)
    with pytest.raises(CacheError, match="made with tar shards, not --loose"):
        build(folder, root, form="loose")
    assert content_of(folder) == before


def test_recipes_give_different_keys() -> None:
    digest = hashlib.sha256(b"content").digest()
    recipes = [RECIPE, CacheRecipe(SIZE), CacheRecipe(64, RECIPE.background), CacheRecipe(SIZE, RECIPE.background, 90)]
    assert len({recipe.key_of(digest) for recipe in recipes}) == len(recipes)
    assert RECIPE.key_of(digest) == CacheRecipe(SIZE, (10, 200, 30)).key_of(digest)
    assert RECIPE.key_of(digest) != RECIPE.key_of(hashlib.sha256(b"other").digest())


def test_a_cache_that_cannot_serve_the_recipe_is_refused(root: Path, folder: Path) -> None:
    build(folder, root)
    cache = ShrinkCache.open(folder)
    cache.require(SIZE, RECIPE.background)
    cache.require(SIZE - 1, RECIPE.background)
    with pytest.raises(
        CacheError, match=rf"are {SIZE} px, data.image_size=64 needs at least as much; build .* --size 64"
    ):
        cache.require(64, RECIPE.background)
    with pytest.raises(CacheError, match=r"px, buckets of data.image_size=64 have sides up to 80; build .* --size 80"):
        cache.require(80, RECIPE.background, 64)
    with pytest.raises(CacheError, match=r"background \[10, 200, 30\], data.background is \[0, 0, 0\]"):
        cache.require(SIZE, (0, 0, 0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 2}, "format_version 2, this program reads up to 1"),
        ({"kind": "diary"}, "another kind"),
        ({"form": "clay"}, "another kind"),
        ({"recipe": {"image_size": 48}}, "background"),
        ({"recipe": {"image_size": 48, "background": [1, 2, 3], "mood": 1}}, "mood"),
        ({"index": ""}, "not built to its end"),
    ],
)
def test_a_strange_manifest_is_refused(root: Path, folder: Path, change: dict[str, object], said: str) -> None:
    build(folder, root)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    with pytest.raises((FormatError, CacheError), match=said):
        ShrinkCache.open(folder)


def test_two_builds_at_a_time_are_refused(root: Path, folder: Path) -> None:
    started, go_on = threading.Event(), threading.Event()

    def pause(_: BuildProgress) -> None:
        started.set()
        go_on.wait(30)

    thread = threading.Thread(target=build_cache, args=(folder, indexed(root), OPTIONS, pause))
    thread.start()
    try:
        assert started.wait(30)
        with pytest.raises(CacheError, match=rf"is being built: in use by process {os.getpid()}"):
            build(folder, root)
    finally:
        go_on.set()
        thread.join()
    assert len(ShrinkCache.open(folder)) == NUM_IMAGES


@pytest.mark.parametrize("changes", [{"shard_bytes": 0}, {"shard_images": 0}, {"num_workers": -1}])
def test_impossible_options_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(CacheError, match="a shard needs at least 1"):
        dataclasses.replace(OPTIONS, **changes)  # type: ignore[arg-type]
    with pytest.raises(CacheError, match=r"quality 1\.\.100"):
        CacheRecipe(SIZE, quality=0)


def test_the_number_of_workers_is_known() -> None:
    assert 1 <= shrink_build.default_num_workers() <= (os.cpu_count() or 1)
