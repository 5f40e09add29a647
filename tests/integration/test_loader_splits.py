"""Images whose names repeat in folders, behind the loader: which of them are held out, and a resume that notices."""

import json
from pathlib import Path

import numpy as np
import pytest

from dataset_loader import DataLoader
from tagger.data.position import PositionError
from tagger.data.split import Split, SplitError
from tests.tiny_dataset import NUM_IMAGES, draw, epoch_of, loaders


def copy_under_one_name(root: Path, same: Path) -> None:
    for number, path in enumerate(sorted(root.rglob("*.json"))):
        (same / f"{number}").mkdir(parents=True)
        draw(number).save(same / f"{number}" / "image.png")
        sidecar = {**json.loads(path.read_bytes()), "filename": "image.png"}
        (same / f"{number}" / "image.json").write_text(json.dumps(sidecar))


def test_names_that_all_images_share_are_split_by_path(root: Path, tmp_path: Path) -> None:
    same = tmp_path / "same"
    copy_under_one_name(root, same)
    with pytest.raises(SplitError, match=r"for validation; .* only 1 distinct name, .* set data\.split_key=path"):
        loaders(same)
    train, validation, _ = loaders(same, data__split_key="path")
    assert train.num_rows + validation.num_rows == NUM_IMAGES and 4 <= validation.num_rows <= 20
    mirrored = np.concatenate([batch.mirrored.numpy() for epoch in range(4) for batch, _ in epoch_of(train, epoch)])
    assert 0.2 < mirrored.mean() < 0.8
    assert not mirrored[:8].all() and mirrored[:8].any(), "one coin for all images of one name"


def test_another_split_key_is_another_split_to_a_resume(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, _, _ = loaders(root)
    position = epoch_of(before)[0][1]
    train, _, _ = loaders(root, data__split_key="path")
    with pytest.raises(PositionError, match="images"):
        train.seek(position)
    train.seek(train.carry_over(position))
    assert train.batches_remaining == len(train) and "the images to train on are not those" in caplog.text


def test_files_of_one_name_that_change_places_are_noticed_by_path(root: Path) -> None:
    """By stems alone a position could not tell these two orders apart."""
    train, _, _ = loaders(root, data__split_key="path")
    rows, keys = train._source.sampler.rows, np.arange(NUM_IMAGES, dtype=np.uint64)
    names = np.zeros(NUM_IMAGES, dtype=np.uint64)
    splits = [Split(train.split.parts, k) for k in (keys, names, keys[::-1].copy())]
    by_path, by_name, other = (DataLoader(train.dataset, rows, 8, train.options, seed=1, split=s) for s in splits)
    with pytest.raises(PositionError, match="images or split"):
        other.seek(epoch_of(by_path)[0][1])
    by_name.seek(epoch_of(by_name)[0][1])


def test_another_list_of_paths_is_noticed_where_all_names_are_one(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    same, listing = tmp_path / "same", tmp_path / "val.txt"
    copy_under_one_name(root, same)
    listing.write_text("3/image\n5/image\n")
    before, _, _ = loaders(same, data__val_list=str(listing))
    position = epoch_of(before)[0][1]
    listing.write_text("3/image\n6/image\n")
    train, _, _ = loaders(same, data__val_list=str(listing))
    assert train.num_rows == before.num_rows
    with pytest.raises(PositionError, match="images or split"):
        train.seek(position)
    train.seek(train.carry_over(position))
    assert train.batches_remaining == len(train) and "the images to train on are not those" in caplog.text
