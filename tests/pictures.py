"""Pictures for tests of near-duplicates: unlike each other at every scale, and copies of them as people make them."""

import io

import numpy as np
from PIL import Image, ImageEnhance


def scene(number: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Smooth colours and some boxes; another number is another picture."""
    draws = np.random.default_rng(number)
    pixels = np.asarray(
        Image.fromarray(draws.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    ).copy()
    for _ in range(4):
        x, y = draws.integers(0, size[0] - 30), draws.integers(0, size[1] - 30)
        pixels[y : y + draws.integers(8, 30), x : x + draws.integers(8, 30)] = draws.integers(0, 256, 3)
    return Image.fromarray(pixels)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def worn_copy(image: Image.Image) -> bytes:
    """Resized, slightly brightened and recompressed."""
    smaller = image.resize((image.width * 7 // 10, image.height * 7 // 10), Image.Resampling.BILINEAR)
    return encode(ImageEnhance.Brightness(smaller).enhance(1.05), "JPEG", quality=75)
