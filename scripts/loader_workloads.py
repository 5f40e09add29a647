"""What `benchmark_loader` measures on: photograph-like JPEGs, the loader people write first, images that only wait.

In a file of its own because loader processes import it.
"""

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tagger.data.batch_job import ImageSource, LoadedImage

WIDTH, HEIGHT = 1224, 816  # 1 MP, 3:2
TAGS = ("beach", "boat", "cloud", "flower", "forest", "hill", "lake", "meadow", "river", "tree")
HELD_OUT = "held_out"


def photograph(seed: int) -> bytes:
    """A JPEG of 1 MP, quality 90, 4:2:0: soft shapes, then detail that is strong in some parts and weak in others."""
    generator = np.random.default_rng(seed)

    def noise(cells: int, channels: int) -> NDArray[np.float32]:
        coarse = generator.integers(0, 256, (cells, cells * 3 // 2, channels), dtype=np.uint8)
        image = Image.fromarray(coarse if channels == 3 else coarse[..., 0])
        pixels = np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float32) - 128
        return pixels if channels == 3 else pixels[..., None]

    strength = np.clip(noise(6, 1) / 128 + 0.5, 0.1, 1)
    pixels = 128 + 0.8 * noise(4, 3) + 0.25 * noise(24, 3)
    for cells, share in ((96, 0.35), (272, 0.3), (816, 0.1)):
        pixels = pixels + strength * share * noise(cells, 1)
    memory = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(memory, "JPEG", quality=90, subsampling="4:2:0")
    return memory.getvalue()


def make_photographs(folder: Path, number: int, distinct: int = 16) -> list[Path]:
    """`number` images with sidecars, of `distinct` contents, and one more that is listed as held out."""
    folder.mkdir(parents=True)
    paths = [folder / f"{i:05}.jpg" for i in range(number)]
    for i, path in enumerate([*paths, folder / f"{HELD_OUT}.jpg"]):
        if i < distinct:
            path.write_bytes(photograph(i))
        else:
            path.hardlink_to(paths[i % distinct])
        tags = [TAGS[i * k % len(TAGS)] for k in (1, 3, 7)]
        path.with_suffix(".json").write_text(json.dumps({"tags": tags}), encoding="utf-8")
    return paths


class PillowDataset(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The loader that people write first: Pillow, bicubic, letterbox, float32, normalised, multi-hot targets."""

    def __init__(self, paths: Sequence[Path], side: int) -> None:
        self._paths = [str(path) for path in paths]
        self._side = side

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, torch.Tensor]:
        with Image.open(self._paths[item]) as opened:
            image = opened.convert("RGB")
        scale = self._side / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        square = Image.new("RGB", (self._side, self._side), (255, 255, 255))
        square.paste(image, ((self._side - image.width) // 2, (self._side - image.height) // 2))
        pixels = np.asarray(square, dtype=np.float32) / 255
        normalised = torch.from_numpy((pixels - 0.5) / 0.5).permute(2, 0, 1).contiguous()
        targets = torch.zeros(len(TAGS))
        targets[[item * k % len(TAGS) for k in (1, 3, 7)]] = 1
        return normalised, targets


@dataclass(frozen=True)
class WaitingImages(ImageSource):
    """Images that take `wait_s` each to load, without the interpreter's lock and without work, as a decoder would."""

    wait_s: float = 0.0

    def load_into(self, row: int, memory: NDArray[np.uint8], *, mirror: bool) -> LoadedImage:  # noqa: ARG002
        time.sleep(self.wait_s)
        memory[:, 0, 0] = row % 256
        return LoadedImage((memory.shape[1], memory.shape[2]), False, False, False)
