import json
from pathlib import Path

import pytest

from dataset_loader import create_dataloaders, open_dataset
from tests.tiny_dataset import configure, epoch_of, loaders, path_of
from vocabulary import build_vocabulary


def test_mirroring_is_off_at_probability_zero(root: Path) -> None:
    train, _, _ = loaders(root, orientation__mirror_probability=0, orientation__map_path="/nowhere.json")
    assert not any(batch.mirrored.any() for batch, _ in epoch_of(train))
    assert train.mirrored == train.vetoed == 0


def test_validation_is_never_mirrored(root: Path) -> None:
    _, validation, _ = loaders(root, orientation__mirror_probability=1)
    assert not any(batch.mirrored.any() for batch, _ in epoch_of(validation))


def test_the_coin_differs_between_epochs_and_is_counted(root: Path) -> None:
    train, _, _ = loaders(root)
    mirrored = []
    for epoch in range(6):
        batches = epoch_of(train, epoch)
        mirrored.append({row for batch, _ in batches for row in batch.row_ids[batch.mirrored].tolist()})
    assert len(set(map(frozenset, mirrored))) == 6
    assert train.mirrored == sum(map(len, mirrored))
    assert 0.3 < train.mirrored / (6 * train.num_rows) < 0.7


def test_conservative_vetoes_directional_tags_without_a_known_mirror(root: Path) -> None:
    train, _, vocabulary = loaders(root, orientation__mirror_probability=1, orientation__mode="conservative")
    directional = {vocabulary.index("arrow left"), vocabulary.index("arrow right")}
    vetoed = 0
    for batch, _ in epoch_of(train):
        for tags, mirrored in zip(batch.tag_lists(), batch.mirrored.tolist(), strict=True):
            assert mirrored != bool(directional & set(tags))
            vetoed += not mirrored
    assert vetoed == train.vetoed > 0


def test_a_tag_outside_the_vocabulary_still_vetoes(root: Path, tmp_path: Path) -> None:
    orientation_map = tmp_path / "map.json"
    orientation_map.write_text(json.dumps({"skip_flip_tags": ["text"]}))
    config = configure(root, orientation__mirror_probability=1, orientation__map_path=str(orientation_map))
    index = open_dataset(config.data)
    vocabulary = build_vocabulary(index, 1, ignore=["text"])
    assert "text" not in vocabulary
    train, _ = create_dataloaders(config, vocabulary, index)
    for batch, _ in epoch_of(train):
        for row, mirrored in zip(batch.row_ids.tolist(), batch.mirrored.tolist(), strict=True):
            assert mirrored == ("text" not in index.record(row).tags)


def test_a_label_whose_mirror_is_unknown_is_never_lost(root: Path) -> None:
    config = configure(root, orientation__mirror_probability=1)
    index = open_dataset(config.data)
    vocabulary = build_vocabulary(index, 1, ignore=["arrow right"])
    train, _ = create_dataloaders(config, vocabulary, index)
    for batch, _ in epoch_of(train):
        for row, mirrored in zip(batch.row_ids.tolist(), batch.mirrored.tolist(), strict=True):
            assert mirrored == (not {"arrow left", "arrow right"} & set(index.record(row).tags))


def test_lists_override_the_coin(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    never, force = tmp_path / "never.txt", tmp_path / "force.txt"
    never.write_text("\n".join(f"img{number:03}" for number in range(0, 20)))
    force.write_text("\n".join([*(f"img{number:03}" for number in range(20, 40)), "unheard of"]))
    files = {"orientation__never_flip_file": str(never), "orientation__force_flip_file": str(force)}
    train, _, _ = loaders(root, **files)
    assert "unheard of" in caplog.text
    for epoch in range(3):
        for batch, _ in epoch_of(train, epoch):
            for row, mirrored in zip(batch.row_ids.tolist(), batch.mirrored.tolist(), strict=True):
                number = int(path_of(train, row).stem[3:])
                assert number >= 40 or mirrored == (number >= 20)
