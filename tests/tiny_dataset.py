"""A small data set that tests write, and loaders over it."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from Configuration_System import FullConfig
from dataset_loader import DataLoader, Position, create_dataloaders, open_dataset
from tagger.batch import Batch
from vocabulary import TagVocabulary, build_vocabulary

NUM_IMAGES = 60
TAGS = (
    ("arrow", "arrow left"),
    ("arrow", "arrow right"),
    ("circle",),
    ("sign", "text"),
    ("square", "circle", "square"),
)


def draw(number: int) -> Image.Image:
    """A picture that no mirroring or neighbour could be mistaken for."""
    pixels = np.random.default_rng(number).integers(0, 256, (5, 4 + number % 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((24 + number % 7, 20 + number % 11), Image.Resampling.BICUBIC)


def write_dataset(root: Path) -> None:
    for number in range(NUM_IMAGES):
        folder = root / ("even" if number % 2 == 0 else "odd/deeper")
        folder.mkdir(parents=True, exist_ok=True)
        stem, suffix = f"img{number:03}", ("jpg", "png", "webp")[number % 3]
        draw(number).save(folder / f"{stem}.{suffix}")
        sidecar = {"filename": f"{stem}.{suffix}", "tags": TAGS[number % 5], "rating": "gs"[number % 2]}
        (folder / f"{stem}.json").write_text(json.dumps({**sidecar, "categories": ["shape"]}))


def configure(root: Path, **overrides: object) -> FullConfig:
    """Settings of one test: `section__key=value`."""
    config = FullConfig()
    settings: dict[str, object] = {
        "data__roots": [str(root)],
        "data__index_dir": str(root.parent / "index"),
        "data__image_size": 32,
        "data__val_fraction": 0.2,
        "data__num_threads": 3,
        "data__extra_fields": ["categories"],
        "training__batch_size": 8,
        "training__seed": 5,
        "orientation__map_path": None,
        "orientation__mode": "balanced",
    }
    for name, value in {**settings, **overrides}.items():
        section, _, key = name.partition("__")
        assert hasattr(getattr(config, section), key)
        setattr(getattr(config, section), key, value)
    return config


def loaders(root: Path, **overrides: object) -> tuple[DataLoader, DataLoader, TagVocabulary]:
    config = configure(root, **overrides)
    index = open_dataset(config.data)
    vocabulary = build_vocabulary(index, 1)
    return *create_dataloaders(config, vocabulary, index), vocabulary


def epoch_of(loader: DataLoader, epoch: int = 0) -> list[tuple[Batch, Position]]:
    loader.set_epoch(epoch)
    return list(loader)


def assert_same(found: Sequence[tuple[Batch, Position]], expected: Sequence[tuple[Batch, Position]]) -> None:
    assert len(found) == len(expected)
    for (batch, position), (other, other_position) in zip(found, expected, strict=True):
        assert position == other_position
        for name, tensor in vars(batch).items():
            assert torch.equal(tensor, vars(other)[name]), name


def rows_of(batches: Sequence[tuple[Batch, Position]]) -> list[int]:
    return [row for batch, _ in batches for row in batch.row_ids.tolist()]


def path_of(loader: DataLoader, row: int) -> Path:
    return loader.dataset.index.image_path(row)
