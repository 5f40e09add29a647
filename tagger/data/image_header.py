"""What the first bytes of an image say: its format, its size, and how it has to be turned. No pixel is decoded.

The format is told from the bytes, never from a name. Refuses, with DecodeError, other formats and headers that are cut
off or contradict themselves. `check_size` is the pixel cap that every decoder asks before it reserves memory.
"""

import struct
from collections.abc import Iterator
from types import ModuleType
from typing import Final

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

# The classes themselves, because Image.open imports every plugin it knows when the first ones do not recognise a file,
# and because its own pixel cap is a global that warns.
PILLOW_PLUGINS: Final[dict[str, type[ImageFile.ImageFile]]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
_OPTIONAL: Final[dict[str, ModuleType]] = {"WebP": WebPImagePlugin, "AVIF": AvifImagePlugin}
FORMATS: Final = tuple(PILLOW_PLUGINS)

_EXIF_PREFIX = b"Exif\x00\x00"
_ORIENTATION_TAG = 0x0112
_PNG_HEADER_END = 33  # signature, and the IHDR chunk with its length, name and checksum
# Frame headers of every JPEG coding process; C4, C8 and CC in this range are tables.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class RefusedImage(ValueError):
    """An image that is left out. `reason` is short and the same for like faults, so that refusals can be counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail


class DecodeError(RefusedImage):
    """The bytes are not an image that can be decoded wholly."""


def sniff_format(content: bytes) -> str:
    """One of FORMATS from the first bytes; DecodeError when they are of none."""
    if content.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if content.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "WebP"
    if content.startswith(b"BM"):
        return "BMP"
    if content.startswith((b"II*\x00", b"MM\x00*")):
        return "TIFF"
    if content[4:8] == b"ftyp" and content[8:12] in (b"avif", b"avis"):
        return "AVIF"
    if not content:
        raise DecodeError("empty file")
    raise DecodeError("not an image", f"first bytes {content[:8].hex(' ')}; known are {', '.join(FORMATS)}")


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise DecodeError for an image without pixels or with more than `max_pixels`."""
    if width < 1 or height < 1:
        raise DecodeError("no pixels", f"{width} x {height}")
    if width * height > max_pixels:
        raise DecodeError("too many pixels", f"{width} x {height}, the limit is {max_pixels}")


def broken(kind: str, error: Exception) -> DecodeError:
    """What a parser's exception means to the caller: Pillow's raise nearly any type on hostile bytes."""
    detail = " ".join(str(error).split())[:300] or type(error).__name__
    return DecodeError("truncated" if "truncat" in detail.lower() else f"damaged {kind}", detail)


def check_supported(kind: str) -> None:
    """Raise DecodeError for a format that the installed Pillow was built without."""
    if kind in _OPTIONAL and not _OPTIONAL[kind].SUPPORTED:
        raise DecodeError(f"{kind} is not supported", "the installed Pillow was built without it")


def exif_orientation(exif: bytes) -> int:
    """The orientation 1..8 in an EXIF block (with or without its 'Exif' prefix); 1 where it is absent or broken."""
    tiff = exif.removeprefix(_EXIF_PREFIX)
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(num_entries):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, directory + 2 + 12 * entry)
            if tag == _ORIENTATION_TAG:
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


def jpeg_orientation(content: bytes) -> int:
    """The orientation in the EXIF block in front of a JPEG's first scan; 1 where there is none."""
    for marker, start, end in _jpeg_segments(content):
        if marker == 0xE1 and content.startswith(_EXIF_PREFIX, start):
            return exif_orientation(content[start:end])
    return 1


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of the segments' bodies in front of the first scan."""
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker in (0xD9, 0xDA):
            return
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            at += 2
            continue
        end = at + 2 + max(int.from_bytes(content[at + 2 : at + 4], "big"), 2)
        yield marker, at + 4, end
        at = end


def png_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of the chunks of a PNG file, IEND being the last; ends early where the file does."""
    at = 8
    while at + 12 <= len(content):
        name, start = content[at + 4 : at + 8], at + 8
        end = start + int.from_bytes(content[at : at + 4], "big")
        if end + 4 > len(content):
            return
        yield name, start, end
        if name == b"IEND":
            return
        at = end + 4


def webp_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of the chunks of a WebP file (RFC 9649, section 2.3); ends early where the file does."""
    at = 12
    stop = min(len(content), 8 + int.from_bytes(content[4:8], "little"))
    while at + 8 <= stop:
        start = at + 8
        end = start + int.from_bytes(content[at + 4 : start], "little")
        if end > stop:
            return
        yield content[at : at + 4], start, end
        at = end + (end & 1)


def webp_canvas(content: bytes) -> tuple[int, int]:
    """(width, height) in the header of a WebP file (RFC 9649, sections 2.5 to 2.7)."""
    chunk = content[12:16]
    if len(content) < 30:
        raise DecodeError("truncated", f"a WebP file of {len(content)} bytes")
    if chunk == b"VP8X":
        return 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(content[27:30], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(content[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", content, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise DecodeError("damaged WebP", f"unknown first chunk {chunk!r}")
