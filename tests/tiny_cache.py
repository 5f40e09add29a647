"""A shrink cache of few images, for tests, and what its copies must be."""

import dataclasses
from pathlib import Path

import simplejpeg
from PIL import Image

from tagger.data.decode import decode_image
from tagger.data.index import MetadataIndex, open_index
from tagger.data.shrink_build import BuildOptions, BuildReport, build_cache
from tagger.data.shrink_cache import CacheRecipe, ShrinkCache
from tagger.preprocess import Preprocess
from tests.tiny_dataset import photograph

SIZE = 48
RECIPE = CacheRecipe(SIZE, (10, 200, 30))
# Three or four images a shard.
OPTIONS = BuildOptions(RECIPE, shard_bytes=12_000, num_workers=0)
NUM_IMAGES = 12


def write_image(path: Path, number: int, *, width: int = 90, height: int = 70) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photograph(number, height, width)).save(path, quality=92)
    path.with_suffix(".json").write_text('{"tags": "a_tag"}')


def write_images(root: Path, numbers: range = range(NUM_IMAGES)) -> None:
    for number in numbers:
        write_image(root / f"{'ab'[number % 2]}/{number:03}.{('jpg', 'png')[number % 2]}", number)


def indexed(root: Path) -> MetadataIndex:
    return open_index([root], root.parent / "index")


def build(folder: Path, root: Path, **changes: object) -> BuildReport:
    return build_cache(folder, indexed(root), dataclasses.replace(OPTIONS, **changes))  # type: ignore[arg-type]


def read(cache: ShrinkCache, path: Path) -> bytes | None:
    facts = path.stat()
    return cache.read(str(path), facts.st_size, facts.st_mtime_ns)


def images_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix in {".jpg", ".png"})


def expected_copy(path: Path) -> bytes:
    """What the definition says, step by step, without the code that builds caches."""
    pixels = decode_image(path.read_bytes(), background=RECIPE.background, max_pixels=10**9)
    if max(pixels.shape[:2]) > SIZE:
        square, (height, width) = Preprocess(SIZE).apply(pixels)
        top, left = (SIZE - height) // 2, (SIZE - width) // 2
        pixels = square[:, top : top + height, left : left + width].permute(1, 2, 0).contiguous().numpy()
    return bytes(simplejpeg.encode_jpeg(pixels, quality=95, colorspace="RGB", colorsubsampling="444"))


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
