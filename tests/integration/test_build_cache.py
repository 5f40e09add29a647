"""The shrink cache from the command line, in worker processes, under signals, and behind the loader."""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from Configuration_System import load_config
from dataset_loader import LoadOptions
from scripts.build_cache import main
from tagger.data.image_reader import ImageReader
from tagger.data.index import open_index
from tagger.data.shrink_build import BuildOptions, build_cache
from tagger.data.shrink_cache import CacheError, CacheRecipe, ShrinkCache
from tests.tiny_cache import NUM_IMAGES, OPTIONS, content_of, images_of, indexed, write_images
from tests.tiny_dataset import epoch_of, loaders, path_of, rows_of, write_dataset

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE = ROOT / "configs" / "unified_config.yaml"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_images(tmp_path / "images")
    return tmp_path / "images"


def words(root: Path, folder: Path, *more: str) -> list[str]:
    """The command's words for the cache that OPTIONS describes."""
    settings = [f"data.roots=[{root}]", f"data.index_dir={root.parent / 'index'}", "data.background=[10,200,30]"]
    return [str(RECIPE), *settings, "--folder", str(folder), "--size", "48", "--shard-mb", "0.012", *more]


# The command


def test_the_command_builds_says_what_it_did_and_can_be_repeated(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images_of(root)[0].write_bytes(b"not a picture")
    assert main(words(root, tmp_path / "cache", "--workers", "0")) == 0
    said = capsys.readouterr().out
    assert f"of {NUM_IMAGES} images 0 were there, {NUM_IMAGES - 1} made, 0 known by content, 1 refused" in said
    assert f"refused, not an image: 1 (for example {images_of(root)[0]})" in said and "refused.json" in said
    assert main([*words(root, tmp_path / "cache", "--workers", "0", "--prune", "--verify")]) == 0
    assert f"{NUM_IMAGES - 1} were there, 0 made" in capsys.readouterr().out
    build_cache(tmp_path / "direct", indexed(root), OPTIONS)
    assert content_of(tmp_path / "direct") == content_of(tmp_path / "cache")


@pytest.mark.parametrize(("fit", "size"), [("letterbox", 64), ("buckets", 80)])
def test_the_command_makes_by_itself_the_size_that_training_asks_for(
    root: Path, tmp_path: Path, fit: str, size: int
) -> None:
    settings = [f"data.roots=[{root}]", f"data.index_dir={tmp_path / 'index'}", "data.image_size=64", f"data.fit={fit}"]
    folder = tmp_path / "cache"
    assert main([str(RECIPE), *settings, f"data.cache_dir={folder}", "--workers", "0"]) == 0
    assert ShrinkCache.open(folder).recipe.image_size == size
    section = load_config(RECIPE, [*settings, f"data.cache_dir={folder}"], environment={})
    options = LoadOptions.from_config(section.data, section.model.resolved_patch_size)
    assert options.cache is not None and options.preprocess.longest_side == size


def test_the_command_refuses_in_one_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(RECIPE), f"data.roots=[{root}]", f"data.index_dir={tmp_path / 'index'}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: no folder for the cache; give --folder, for example --folder .tagsmith/cache"
    )
    build_cache(tmp_path / "cache", indexed(root), OPTIONS)
    assert main(words(root, tmp_path / "cache", "--quality", "80")) == 2
    assert "was made with --quality 95, not 80; name another folder" in capsys.readouterr().err
    assert main(words(root / "absent", tmp_path / "other")) == 2
    assert "absent" in capsys.readouterr().err


# Processes and signals


@pytest.mark.slow
def test_workers_give_the_same_files_as_one_process(root: Path, tmp_path: Path) -> None:
    write_images(root, range(NUM_IMAGES, 60))
    images_of(root)[5].write_bytes(b"\xff\xd8\xff")
    (images_of(root)[7]).write_bytes(images_of(root)[2].read_bytes())
    index = indexed(root)
    build_cache(tmp_path / "one", index, OPTIONS)
    assert main(words(root, tmp_path / "three", "--workers", "3")) == 0
    assert content_of(tmp_path / "one") == content_of(tmp_path / "three")
    assert not psutil.Process().children(recursive=True) or all(
        "resource_tracker" in " ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)
    )


def start(root: Path, folder: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "scripts.build_cache", *words(root, folder, "--workers", str(workers))]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def wait_for_shards(folder: Path, number: int, process: subprocess.Popen[bytes]) -> None:
    while len(list(folder.glob("shard-*.tar"))) < number and process.poll() is None:
        time.sleep(0.001)


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived the build"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9_at_random_points_then_resume_gives_the_same_cache(root: Path, tmp_path: Path, workers: int) -> None:
    write_images(root, range(NUM_IMAGES, 300))
    build_cache(tmp_path / "whole", indexed(root), OPTIONS)
    draw, folder = random.Random(workers), tmp_path / "cache"
    for _ in range(6 if workers == 0 else 3):
        process = start(root, folder, workers)
        have = len(list(folder.glob("shard-*.tar")))
        wait_for_shards(folder, have + draw.randrange(1, 8), process)
        time.sleep(draw.random() * 0.02)
        children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        process.kill()
        process.communicate()
        wait_until_gone(children)
    process = start(root, folder, workers)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert content_of(folder) == content_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a console group of its own gets no Ctrl-C on Windows")
@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_signal_ends_the_build_and_its_workers_cleanly(
    root: Path, tmp_path: Path, number: signal.Signals, code: int, name: str
) -> None:
    write_images(root, range(NUM_IMAGES, 400))
    folder = tmp_path / "cache"
    process = start(root, folder, 2)
    wait_for_shards(folder, 3, process)
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    os.killpg(process.pid, number)  # the whole group, as a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors.decode()
    assert errors.decode().splitlines()[-1] == f"stopped by {name}; what is committed stays, start again to go on"
    wait_until_gone(children)
    cache = ShrinkCache.open(folder)
    assert 0 < len(cache) < 400
    assert not list(folder.glob("*.part")) and not (folder / "build.lock").exists()


@pytest.mark.slow
def test_a_worker_that_dies_is_one_clear_line(root: Path, tmp_path: Path) -> None:
    write_images(root, range(NUM_IMAGES, 400))
    folder = tmp_path / "cache"
    process = start(root, folder, 2)
    wait_for_shards(folder, 2, process)
    workers = [c for c in psutil.Process(process.pid).children() if "resource_tracker" not in " ".join(c.cmdline())]
    workers[0].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "start again with fewer --workers than 2" in errors.decode().splitlines()[-1]
    assert len(ShrinkCache.open(folder)) > 0


# The loader


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "set")
    return tmp_path / "set"


def cached(dataset: Path, size: int = 32) -> Path:
    folder = dataset.parent / f"cache-{size}"
    index = open_index([dataset], dataset.parent / "index", extra_fields=["categories"])
    build_cache(folder, index, BuildOptions(CacheRecipe(size), num_workers=0))
    return folder


def test_the_loader_serves_the_copies_and_says_so(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = cached(dataset)
    direct, _, _ = loaders(dataset)
    train, validation, _ = loaders(dataset, data__cache_dir=str(folder))
    assert f"shrink cache {folder} (32 px) serves 60 of 60 images" in caplog.messages
    for (batch, position), (other, other_position) in zip(epoch_of(train), epoch_of(direct), strict=True):
        assert position == other_position
        for name, tensor in vars(batch).items():
            if name == "images":
                difference = (tensor.int() - other.images.int()).abs().float().mean()
                assert 0 < difference < 8  # drawn noise of a few pixels, JPEG's hardest case
            else:
                assert torch.equal(tensor, vars(other)[name]), name
    epoch_of(validation)
    assert train.ledger.num_missed_cache == validation.ledger.num_missed_cache == 0
    assert not [message for message in caplog.messages if "from their files" in message]


def test_pixels_come_from_the_cache_and_stale_ones_from_the_file(
    dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = cached(dataset)
    rows = open_index([dataset], dataset.parent / "index", extra_fields=["categories"])
    stale, missing = rows.image_path(3), rows.image_path(4)
    shutil.copy(rows.image_path(5), stale)
    reader = ImageReader(rows, ShrinkCache.open(folder))
    assert reader.read(3).content == stale.read_bytes() and reader.read(3).missed_cache
    copy = reader.read(4).content
    assert copy != missing.read_bytes() and copy.startswith(b"\xff\xd8\xff") and not reader.read(4).missed_cache
    assert reader.describe_cache().endswith("serves 59 of 60 images; the rest are read from their files")
    caplog.set_level(logging.INFO)
    train, validation, _ = loaders(dataset, data__cache_dir=str(folder))
    loader = train if 3 in train._source.sampler.rows else validation
    for epoch in range(3):
        epoch_of(loader, epoch)
    num_missed = loader.ledger.num_missed_cache
    assert num_missed > 0
    assert (
        caplog.messages[-1]
        == f"{num_missed} images of validation so far came from their files, as they are not in the shrink cache"
    )


def test_a_deleted_source_is_refused_though_its_copy_is_there(dataset: Path) -> None:
    folder = cached(dataset)
    _, validation, _ = loaders(dataset, data__cache_dir=str(folder))
    path = path_of(validation, int(validation._source.sampler.rows[0]))
    path.unlink()
    assert len(rows_of(epoch_of(validation))) == validation.num_rows - 1
    assert [(refusal.path, refusal.reason) for refusal in validation.refusals] == [(str(path), "missing")]


def test_a_large_set_is_judged_by_a_sample(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tagger.data import image_reader

    monkeypatch.setattr(image_reader, "_MAX_LOOKED_AT", 20)
    index = open_index([dataset], dataset.parent / "index", extra_fields=["categories"])
    reader = ImageReader(index, ShrinkCache.open(cached(dataset)))
    assert reader.describe_cache().endswith("serves 100.00 % of 20 images looked at, of 60")


def test_a_cache_that_is_absent_or_too_small_stops_the_start(dataset: Path) -> None:
    with pytest.raises(CacheError, match="holds no shrink cache"):
        loaders(dataset, data__cache_dir=str(dataset.parent / "absent"))
    folder = cached(dataset, 24)
    with pytest.raises(CacheError, match=r"are 24 px, data.image_size=32 needs at least as much"):
        loaders(dataset, data__cache_dir=str(folder))
    with pytest.raises(CacheError, match=r"data.background is \[1, 2, 3\]"):
        loaders(dataset, data__cache_dir=str(cached(dataset)), data__background=[1, 2, 3])


def test_the_same_epoch_gives_the_same_bytes_in_any_number_of_threads(dataset: Path) -> None:
    folder = str(cached(dataset))
    one, _, _ = loaders(dataset, data__cache_dir=folder, data__num_threads=1)
    many, _, _ = loaders(dataset, data__cache_dir=folder, data__num_threads=5)
    for (batch, _), (other, _) in zip(epoch_of(one, 1), epoch_of(many, 1), strict=True):
        assert torch.equal(batch.images, other.images) and torch.equal(batch.row_ids, other.row_ids)
