"""Width and height of an image from its header, without decoding a pixel.

The format is told from the first bytes. JPEG, PNG, WebP, GIF and BMP are read here, the rest by Pillow, which opens a
file without decoding it (an AVIF it reads whole). Refuses, with HeaderError, other formats and headers that are
damaged or give no pixels. An EXIF block behind the pixels of a PNG is not looked for, since that would read the whole
file.
"""

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import AvifImagePlugin, ImageFile, TiffImagePlugin

from tagger.data.decode import DecodeError, exif_orientation, sniff_format

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# Bytes of a file from an offset on: fewer than asked for where it ends.
ReadAt = Callable[[int, int], bytes]

_FIRST_BYTES = 16 * 1024
_MAX_EXIF_BYTES = 1 << 20
_MAX_PARTS = 4096
_MAX_SIDE = (1 << 31) - 1
_EXIF_PREFIX = b"Exif\x00\x00"
# Start of a frame: the segments of a JPEG that hold its size (C4, C8 and CC between them are other tables).
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}


class HeaderError(ValueError):
    """A header that gives no size. `reason` reads "kind: detail"; the kind is the same for all faults of a sort."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class FileHeader:
    """What an image file says of itself: upright width and height in pixels, size in bytes and time in ns of the file.

    `reason` says why there is no size; width and height are then 0.
    """

    width: int
    height: int
    file_size: int
    mtime_ns: int
    reason: str | None = None


def read_header(path: str | Path) -> FileHeader:
    """The header of a file. Raises OSError when it cannot be read; a header that is damaged comes as a `reason`."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        facts = os.fstat(handle)
        first = os.read(handle, _FIRST_BYTES)

        def read_at(offset: int, length: int) -> bytes:
            if offset + length <= len(first) or len(first) >= facts.st_size:
                return first[offset : offset + length]
            os.lseek(handle, offset, os.SEEK_SET)
            return os.read(handle, length)

        try:
            width, height = parse_header(read_at, facts.st_size)
        except HeaderError as error:
            return FileHeader(0, 0, facts.st_size, facts.st_mtime_ns, error.reason)
        return FileHeader(width, height, facts.st_size, facts.st_mtime_ns)
    finally:
        os.close(handle)


def parse_header(read_at: ReadAt, file_size: int) -> tuple[int, int]:
    """(width, height) of the upright image. Raises HeaderError; MemoryError and what `read_at` raises pass through."""
    try:
        kind = sniff_format(read_at(0, 32))
    except DecodeError as error:
        detail = " ".join(str(error).removeprefix(error.reason).strip(" ()").split())
        raise HeaderError(f"{error.reason}: {detail}" if detail else error.reason) from error
    try:
        if kind in _PARSERS:
            width, height, orientation = _PARSERS[kind](read_at)
        else:
            width, height, orientation = _ask_pillow(kind, BufferedReader(_Stream(read_at, file_size)))
    except (HeaderError, OSError, MemoryError):
        raise
    except Exception as error:
        # struct.error for a header that is cut off; Pillow's parsers raise nearly any type on hostile bytes.
        raise HeaderError(f"damaged {kind}: {' '.join(str(error).split())[:200] or type(error).__name__}") from error
    if not (0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE):
        raise HeaderError(f"no pixels: {kind} of {width} x {height}")
    return (height, width) if orientation >= 5 else (width, height)


def _jpeg(read_at: ReadAt) -> tuple[int, int, int]:
    """ITU-T T.81, annex B: segments up to the first scan."""
    size: tuple[int, int] | None = None
    orientation: int | None = None
    at = 2
    for _ in range(_MAX_PARTS):
        head = read_at(at, 4)
        if len(head) < 4 or head[0] != 0xFF:
            break
        marker, length = head[1], int.from_bytes(head[2:], "big")
        if marker == 0xFF:
            at += 1
            continue
        if marker in (0xD9, 0xDA):
            break
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            at += 2
            continue
        if marker in _FRAME_MARKERS and size is None:
            height, width = struct.unpack(">HH", read_at(at + 5, 4))
            size = width, height
        elif marker == 0xE1 and orientation is None and read_at(at + 4, 6) == _EXIF_PREFIX:
            orientation = exif_orientation(read_at(at + 4, length - 2))
        at += 2 + max(length, 2)
    if size is None:
        raise HeaderError("damaged JPEG: no frame header")
    return *size, orientation or 1


def _png(read_at: ReadAt) -> tuple[int, int, int]:
    """PNG specification, third edition, section 5: chunks up to the first of the pixels."""
    head = read_at(8, 16)
    if head[4:8] != b"IHDR":
        raise HeaderError("damaged PNG: no IHDR chunk")
    width, height = struct.unpack(">II", head[8:16])
    for name, start, length in _chunks(read_at, 8, ">", 4):
        if name in (b"IDAT", b"IEND"):
            break
        if name == b"eXIf":
            return width, height, exif_orientation(read_at(start, min(length, _MAX_EXIF_BYTES)))
    return width, height, 1


def _webp(read_at: ReadAt) -> tuple[int, int, int]:
    """RFC 9649, sections 2.5 to 2.7. Where the header announces EXIF, chunks are passed over until it comes."""
    head = read_at(12, 18)
    if len(head) < 18:
        raise HeaderError(f"damaged WebP: a file of {12 + len(head)} bytes")
    if head[:4] == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 14)
        return width & 0x3FFF, height & 0x3FFF, 1
    if head[:4] == b"VP8L":
        bits = int.from_bytes(head[9:13], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), 1
    if head[:4] != b"VP8X":
        raise HeaderError(f"damaged WebP: unknown first chunk {head[:4]!r}")
    orientation = 1
    if head[8] & 0x08:
        for name, start, length in _chunks(read_at, 12, "<", 0):
            if name == b"EXIF":
                orientation = exif_orientation(read_at(start, min(length, _MAX_EXIF_BYTES)))
                break
    return 1 + int.from_bytes(head[12:15], "little"), 1 + int.from_bytes(head[15:18], "little"), orientation


def _chunks(read_at: ReadAt, at: int, order: str, checksum_bytes: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, length) of chunks from `at` on: those of PNG (big-endian, checksum) or of RIFF (padded)."""
    for _ in range(_MAX_PARTS):
        head = read_at(at, 8)
        if len(head) < 8:
            return
        if order == ">":
            length, name = int.from_bytes(head[:4], "big"), head[4:]
        else:
            name, length = head[:4], int.from_bytes(head[4:], "little")
        yield name, at + 8, length
        at += 8 + length + (checksum_bytes or length & 1)


def _gif(read_at: ReadAt) -> tuple[int, int, int]:
    """GIF89a specification: the logical screen, or the first frame where that reaches beyond."""
    width, height, flags = struct.unpack("<HHB", read_at(6, 5))
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    for _ in range(_MAX_PARTS):
        kind = read_at(at, 1)
        if kind == b",":
            left, top, frame_width, frame_height = struct.unpack("<HHHH", read_at(at + 1, 8))
            return max(width, left + frame_width), max(height, top + frame_height), 1
        if kind != b"!":
            break
        at += 2
        for _ in range(_MAX_PARTS):
            length = read_at(at, 1)
            at += 1 + (length[0] if length else 0)
            if length in (b"", b"\0"):
                break
    raise HeaderError("damaged GIF: no frame")


def _bmp(read_at: ReadAt) -> tuple[int, int, int]:
    """The information headers of OS/2 (12 bytes) and of Windows (40 to 124); a negative height means top to bottom."""
    (length,) = struct.unpack("<I", read_at(14, 4))
    if length == 12:
        return *struct.unpack("<HH", read_at(18, 4)), 1
    if length not in (40, 52, 56, 64, 108, 124):
        raise HeaderError(f"damaged BMP: unknown header of {length} bytes")
    width, height = struct.unpack("<ii", read_at(18, 8))
    return width, abs(height), 1


_PARSERS: dict[str, Callable[[ReadAt], tuple[int, int, int]]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WebP": _webp,
    "GIF": _gif,
    "BMP": _bmp,
}


class _Stream(RawIOBase):
    """A file for Pillow, which jumps about in a TIFF instead of reading it whole."""

    def __init__(self, read_at: ReadAt, file_size: int) -> None:
        self._read_at = read_at
        self._file_size = file_size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file_size}[whence])
        return self._at

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        content = self._read_at(self._at, len(view))
        view[: len(content)] = content
        self._at += len(content)
        return len(content)


def _ask_pillow(kind: str, stream: BufferedReader) -> tuple[int, int, int]:
    with _PLUGINS[kind](stream) as image:
        exif = image.info.get("exif")
        # Pillow turns TIFF images itself and gives their size as turned.
        orientation = exif_orientation(exif) if isinstance(exif, bytes) and kind != "TIFF" else 1
        return image.width, image.height, orientation
