"""Aspect buckets, other sampling and several ranks, through the loader and through a whole run."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_direct
import validation_loop
from dataset_loader import DataLoader
from scripts import predict
from tagger.artifact import load_artifact
from tagger.data.decode import decode_image
from tagger.data.position import PositionError
from tagger.preprocess import Preprocess
from tests.tiny_dataset import NUM_IMAGES, assert_same, epoch_of, loaders, path_of, rows_of, write_dataset

BUCKETS = {"data__fit": "buckets", "model__patch_size": 4, "data__val_fraction": 0.3, "training__batch_size": 4}
PREPROCESS = Preprocess.create(32, "buckets", 4)
SIZES = ((40, 20), (20, 40), (30, 30), (25, 40), (90, 20), (20, 70))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny set with pictures of very different aspects."""
    root = tmp_path_factory.mktemp("drawn")
    write_dataset(root)
    for path in sorted(root.rglob("*.*")):
        if path.suffix != ".json":
            with Image.open(path) as image:
                image.resize(SIZES[int(path.stem[3:]) % 6]).save(path)
    return root


@pytest.fixture
def root(drawn: Path, tmp_path: Path) -> Path:
    return shutil.copytree(drawn, tmp_path / "set")


def pixels_of(loader: DataLoader, row: int) -> np.ndarray:
    return decode_image(path_of(loader, row).read_bytes(), max_pixels=10**6)


def test_a_training_batch_has_one_shape_and_holds_what_the_files_hold(root: Path) -> None:
    train, _, _ = loaders(root, **BUCKETS)
    shapes = set()
    for batch, _ in [pair for epoch in range(3) for pair in epoch_of(train, epoch)]:
        shape = tuple(batch.images.shape[2:])
        shapes.add(shape)
        assert batch.images.shape[:2] == (4, 3) and shape in PREPROCESS.shapes
        for place, row in enumerate(batch.row_ids.tolist()):
            expected = np.empty((3, *shape), np.uint8)
            mirrored = bool(batch.mirrored[place])
            size = PREPROCESS.apply_into(pixels_of(train, row), expected, mirror=mirrored)
            np.testing.assert_array_equal(batch.images[place].numpy(), expected)
            assert tuple(batch.valid_sizes[place].tolist()) == size
    assert len(shapes) > 2


def test_an_epoch_serves_each_row_at_most_once(root: Path) -> None:
    train, validation, _ = loaders(root, **BUCKETS)
    held_out = set(rows_of(epoch_of(validation)))
    for epoch in range(3):
        served = rows_of(epoch_of(train, epoch))
        assert len(served) == len(set(served)) == train.num_rows // 4 * 4
        assert not set(served) & held_out


def test_validation_sees_every_image_as_prediction_does(root: Path) -> None:
    _, validation, _ = loaders(root, **BUCKETS)
    batches = epoch_of(validation)
    assert len(batches) == len(validation) and len({batch.images.shape[2:] for batch, _ in batches}) > 2
    assert sorted(rows_of(batches)) == np.flatnonzero(~validation._source.held_out).tolist()
    for batch, _ in batches:
        for place, row in enumerate(batch.row_ids.tolist()):
            image, size = PREPROCESS.apply(pixels_of(validation, row))
            assert torch.equal(batch.images[place], image)
            assert tuple(batch.valid_sizes[place].tolist()) == size


@pytest.mark.parametrize("sampling", ["uniform", "weighted", "class_aware"])
@pytest.mark.parametrize("fit", ["letterbox", "buckets"])
def test_any_number_of_threads_and_a_resume_give_the_same_bytes(root: Path, fit: str, sampling: str) -> None:
    settings = {**BUCKETS, "data__fit": fit, "data__sampling": sampling}
    train, _, _ = loaders(root, **settings)
    whole = epoch_of(train, 2)
    assert len(whole) == train.num_rows // 4
    other, _, _ = loaders(root, **settings, data__num_threads=1)
    assert_same(epoch_of(other, 2), whole)
    for consumed in (1, 4, len(whole)):
        position = json.loads(json.dumps(whole[consumed - 1][1]))
        other.seek(position)
        assert other.batches_remaining == len(whole) - consumed
        assert_same(list(other), whole[consumed:])


def test_stand_ins_are_the_same_for_any_threads_and_after_resume(root: Path) -> None:
    train, _, _ = loaders(root, **BUCKETS)
    broken = set(train._source.sampler.rows[:12].tolist())
    other, _, _ = loaders(root, **BUCKETS, data__num_threads=1)
    for row in broken:
        path_of(train, row).write_bytes(b"not a picture")
    whole = epoch_of(train, 1)
    assert whole and not set(rows_of(whole)) & broken
    other.seek(whole[1][1])
    assert_same(list(other), whole[2:])


def test_another_batch_size_goes_back_to_a_boundary_and_says_so(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, _, _ = loaders(root, **BUCKETS)
    position = epoch_of(train)[3][1]
    resumed, _, _ = loaders(root, **{**BUCKETS, "training__batch_size": 3})
    resumed.seek(position)
    assert resumed.batches_remaining == len(resumed)
    assert "16 images of it come a second time" in caplog.text


def test_ranks_share_each_step(root: Path) -> None:
    train, _, _ = loaders(root, **{**BUCKETS, "training__batch_size": 6, "orientation__mirror_probability": 0})
    source = train._source
    ranks = [
        DataLoader(
            train.dataset,
            source.sampler.rows,
            3,
            train.options,
            split=train.split,
            seed=source.sampler.seed,
            rank=rank,
            world_size=2,
        )
        for rank in range(2)
    ]
    for (whole, position), *parts in zip(epoch_of(train, 1), *map(epoch_of, ranks, (1, 1)), strict=True):
        assert torch.equal(torch.cat([batch.images for batch, _ in parts]), whole.images)
        assert torch.equal(torch.cat([batch.row_ids for batch, _ in parts]), whole.row_ids)
        assert [found for _, found in parts] == [position, position]


def test_a_position_of_other_sampling_is_refused_by_name(root: Path) -> None:
    train, _, _ = loaders(root)
    weighted, _, _ = loaders(root, data__sampling="weighted")
    with pytest.raises(PositionError, match=r"data\.sampling \(hash\) 0 there"):
        weighted.seek(epoch_of(train)[0][1])
    with pytest.raises(PositionError, match=r"data\.sampling \(hash\) \d+ there, 0 here"):
        train.seek(epoch_of(weighted)[0][1])
    position = epoch_of(loaders(root, **BUCKETS)[0])[0][1]
    for change in ({"whole": 10**6}, {"whole": -1}):
        with pytest.raises(PositionError, match="outside"):
            loaders(root, **BUCKETS)[0].seek(position | change)
    del position["whole"]
    with pytest.raises(PositionError, match="not a position"):
        train.seek(position)


def test_unknown_sizes_are_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, _, _ = loaders(root)
    assert "not known" not in caplog.text
    for row in (3, 4):
        path_of(train, row).write_bytes(b"not a picture")
    loaders(root, **BUCKETS)
    assert "the size of 2 of 60 images is not known" in caplog.text


def test_sizes_are_those_of_the_upright_image_and_0_where_unknown(root: Path) -> None:
    train, _, _ = loaders(root)
    index = train.dataset.index
    exif = Image.Exif()
    exif[0x0112] = 6
    jpegs = [row for row in range(NUM_IMAGES) if index.image_path(row).suffix == ".jpg"]
    Image.new("RGB", (50, 30)).save(index.image_path(jpegs[0]), exif=exif)
    index.image_path(jpegs[1]).write_bytes(b"\xff\xd8\xff")
    sizes = train.dataset.sizes
    assert sizes.dtype == np.uint32 and sizes.shape == (NUM_IMAGES, 2)
    for row in range(NUM_IMAGES):
        if row == jpegs[1]:
            assert sizes[row].tolist() == [0, 0]
        else:
            height, width, _ = pixels_of(train, row).shape
            assert sizes[row].tolist() == [width, height]


def test_a_run_with_buckets_trains_goes_on_validates_and_predicts(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    unified = Path(__file__).resolve().parents[2] / "configs" / "unified_config.yaml"
    words = [
        f"data.roots=[{drawn}]",
        f"data.index_dir={tmp_path / 'index'}",
        f"run.output_dir={tmp_path}",
        "run.name=whole",
        "data.image_size=32",
        "data.fit=buckets",
        "data.val_fraction=0.3",
        "vocabulary.min_frequency=1",
        "model.preset=vit_tiny",
        "model.patch_size=4",
        "model.embed_dim=32",
        "model.depth=2",
        "model.num_heads=2",
        "model.mask_padding=true",
        "training.device=cpu",
        "training.batch_size=4",
        *(f"augment.{name}={{probability: 1, strength: 0.2}}" for name in ("rotation", "shift", "erasing", "blur")),
    ]
    assert train_direct.main(["--config", str(unified), *words, "training.num_epochs=1"]) == 0
    assert train_direct.main(["--config", str(unified), *words, "training.num_epochs=2", "--resume", "latest"]) == 0
    run = tmp_path / "whole"
    results = json.loads((run / "results.json").read_text())
    assert results["status"] == "completed" and results["steps"] % 2 == 0
    assert load_artifact(run / "model").preprocess == PREPROCESS
    best = results["best"]["value"]

    assert validation_loop.main(["--run", str(run)]) == 0
    assert json.loads((run / "evaluation.json").read_text())["val/mAP"] == pytest.approx(best, abs=1e-4)
    capsys.readouterr()
    sheet = tmp_path / "sheet.png"
    assert predict.main([str(run), str(drawn), "--sheet", str(sheet), "--batch-size", "4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= NUM_IMAGES and sheet.exists()


@pytest.mark.parametrize("settings", [{}, BUCKETS], ids=["square", "buckets"])
def test_a_position_of_other_images_is_carried_over_to_the_start_or_the_end_of_its_epoch(
    root: Path, settings: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    before, _, _ = loaders(root, **settings)
    train, _, _ = loaders(root, **settings, data__sampling="weighted")
    epoch = epoch_of(before, 1)
    train.seek(train.carry_over(epoch[0][1]))
    assert train.batches_remaining == len(train)
    assert_same(list(train), epoch_of(train, 1))
    train.seek(train.carry_over(epoch[-1][1]))
    assert train.batches_remaining == 0
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert [line.partition(": epoch 2 ")[2][:10] for line in warnings] == ["starts aga", "was over, "]
    own = epoch_of(train)[0][1]
    assert train.carry_over(own) == own and len([r for r in caplog.records if r.levelname == "WARNING"]) == 2
    for change in ({"seed": 6, "rows": 7}, {"samples": -1, "rows": 7}, {"samples": 8, "rows": 7}, {"step": 1}):
        with pytest.raises(PositionError):
            train.carry_over(own | change)
