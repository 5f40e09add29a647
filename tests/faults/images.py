"""Image bytes that no well-meaning program writes, and the formulas of what they show."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
BACKGROUND = (10, 200, 90)

# What each EXIF orientation means: from the pixels as stored to the upright picture.
TURNED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda p: np.rot90(p, 1),
}


def photo() -> Image.Image:
    """24 x 32, smooth, with a corner that tells every turn from every other."""
    y, x = np.mgrid[0:24, 0:32].astype(np.float64)
    planes = np.stack([120 + 100 * np.sin(x / 9 + c) * np.cos(y / 11 - c) for c in range(3)], axis=-1)
    planes[:8, :8] = (230, 40, 50)
    return Image.fromarray(planes.astype(np.uint8))


def alpha_ramp() -> Pixels:
    """24 x 32 levels of transparency, none to all."""
    return np.linspace(0, 255, 24 * 32).reshape(24, 32).round().astype(np.uint8)


def over(colour: Any, alpha: Any) -> Pixels:
    """The compositing formula in float64, over BACKGROUND."""
    share = np.asarray(alpha, np.float64)[..., None] / 255
    mixed = np.asarray(colour) * share + np.array(BACKGROUND) * (1 - share)
    return np.rint(mixed).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def patch(content: bytes, at: int, change: bytes) -> bytes:
    return content[:at] + change + content[at + len(change) :]


def without_segment(jpeg: bytes, marker: int) -> bytes:
    """A JPEG less all its segments of one marker."""
    while (at := jpeg.find(bytes((0xFF, marker)))) >= 0:
        jpeg = jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]
    return jpeg


def png(
    depth: int, colour: int, rows: bytes, width: int, height: int, transparency: bytes = b"", *, interlace: int = 0
) -> bytes:
    """A PNG file from its raw rows, each with its filter byte."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    extra = chunk(b"tRNS", transparency) if transparency else b""
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + body + chunk(b"IEND", b"")


def sixteen_bits(samples: Pixels) -> bytes:
    """A 16-bit PNG of uint8 [H, W, 2, 3 or 4] samples, each scaled by 257."""
    height, width, channels = samples.shape
    rows = (samples.astype(np.uint32) * 257).astype(">u2")
    return png(16, {2: 4, 3: 2, 4: 6}[channels], b"".join(b"\0" + row.tobytes() for row in rows), width, height)


def adam7(samples: Pixels) -> bytes:
    """An interlaced PNG of uint8 [H, W, 3] samples."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = b"".join(b"\0" + row.tobytes() for x, y, dx, dy in passes for row in samples[y::dy, x::dx] if row.size)
    return png(8, 2, rows, samples.shape[1], samples.shape[0], interlace=1)
