"""Image bytes -> upright uint8 RGB pixels, the same for training, validation and prediction.

The format is told from the first bytes, never from the name. JPEG goes to libjpeg-turbo in strict mode, the rest to
one named Pillow plugin each. Refuses, with DecodeError, other formats, images above a pixel cap (before decoding),
and truncated or damaged files: partial pixels never leave this module.
"""

import struct
from io import BytesIO
from types import ModuleType
from typing import Final

import numpy as np
import simplejpeg  # type: ignore[import-untyped]
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

Pixels = NDArray[np.uint8]

# The classes themselves, because Image.open imports every plugin it knows when the first ones do not recognise a file,
# and because its own pixel cap is a global that warns.
_PLUGINS: Final[dict[str, type[ImageFile.ImageFile]]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
_OPTIONAL: Final[dict[str, ModuleType]] = {"WebP": WebPImagePlugin, "AVIF": AvifImagePlugin}
FORMATS: Final = tuple(_PLUGINS)

_EXIF_PREFIX = b"Exif\x00\x00"
_ORIENTATION_TAG = 0x0112
# libjpeg's complaints that mean missing or broken pixels; whatever else strict mode refuses, Pillow may still read.
_LOST_PIXELS = ("Premature end", "Corrupt JPEG data")


class RefusedImage(ValueError):
    """An image that is left out. `reason` is short and the same for like faults, so that refusals can be counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


class DecodeError(RefusedImage):
    """The bytes are not an image that can be decoded wholly."""


def decode_image(content: bytes, *, background: tuple[int, int, int] = (255, 255, 255), max_pixels: int) -> Pixels:
    """The image in a file's bytes as a writable, contiguous uint8 [H, W, 3] RGB array.

    EXIF orientation is applied, transparency composited on `background`, 16-bit samples are scaled to 8, an animation
    gives its first frame. Colour profiles are not applied. Raises DecodeError; MemoryError passes through.
    """
    kind = sniff_format(content)
    try:
        pixels = _decode_jpeg(content, max_pixels) if kind == "JPEG" else None
        if pixels is None:
            pixels = _decode_pillow(content, kind, background, max_pixels)
    except (DecodeError, MemoryError):
        raise
    except Exception as error:
        # Pillow's parsers raise nearly any type on hostile bytes; all of them mean the same to the caller.
        detail = " ".join(str(error).split()) or type(error).__name__
        reason = "truncated" if "truncat" in detail.lower() else f"damaged {kind}"
        raise DecodeError(reason, detail) from error
    return np.ascontiguousarray(pixels)


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


def _decode_jpeg(content: bytes, max_pixels: int) -> Pixels | None:
    """None where Pillow should try: variants that libjpeg-turbo's simple interface does not take."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    _check_size(width, height, max_pixels)
    inks = colorspace in ("CMYK", "YCCK")
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(content, colorspace="CMYK" if inks else "RGB")
    except ValueError as error:
        message = str(error)
        if any(fault in message for fault in _LOST_PIXELS):
            raise DecodeError("truncated" if "Premature" in message else "damaged JPEG", message) from error
        return None
    if inks:
        pixels = _inverted_cmyk_to_rgb(pixels)
    return _upright(pixels, exif_orientation(_jpeg_exif(content)))


def _inverted_cmyk_to_rgb(inks: Pixels) -> Pixels:
    # Four-channel JPEGs store 255 - ink (Adobe's convention, which every writer follows): red = (1 - C) (1 - K).
    products = inks[..., :3].astype(np.uint16) * inks[..., 3:] + 128
    rgb: Pixels = ((products + (products >> 8)) >> 8).astype(np.uint8)
    return rgb


def _jpeg_exif(content: bytes) -> bytes:
    """The EXIF block in front of the first scan; empty where there is none."""
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker in (0xD9, 0xDA):
            break
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            at += 2
            continue
        length = int.from_bytes(content[at + 2 : at + 4], "big")
        if marker == 0xE1 and content.startswith(_EXIF_PREFIX, at + 4):
            return content[at + 4 : at + 2 + length]
        at += 2 + max(length, 2)
    return b""


def _decode_pillow(content: bytes, kind: str, background: tuple[int, int, int], max_pixels: int) -> Pixels:
    if kind in _OPTIONAL and not _OPTIONAL[kind].SUPPORTED:
        raise DecodeError(f"{kind} is not supported", "the installed Pillow was built without it")
    if kind == "WebP":
        # Its decoder reserves the whole canvas when it opens a file.
        _check_size(*_webp_canvas(content), max_pixels)
    with _PLUGINS[kind](BytesIO(content)) as image:
        _check_size(image.width, image.height, max_pixels)
        image.load()
        exif = image.info.get("exif")
        # Pillow turns TIFF images itself while loading them.
        orientation = exif_orientation(exif) if isinstance(exif, bytes) and kind != "TIFF" else 1
        return _upright(_to_rgb(image, background), orientation)


def _webp_canvas(content: bytes) -> tuple[int, int]:
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


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise DecodeError("no pixels", f"{width} x {height}")
    if width * height > max_pixels:
        raise DecodeError("too many pixels", f"{width} x {height}, the limit is {max_pixels}")


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Pixels:
    transparency = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        samples = np.asarray(image).astype(np.uint32)
        grey = Image.fromarray(((samples * 255 + 32767) // 65535).astype(np.uint8))
        if not isinstance(transparency, int):
            return np.array(grey.convert("RGB"))
        visible = Image.fromarray(np.where(samples == transparency, 0, 255).astype(np.uint8))
        return _composite(grey, visible, background)
    if image.mode in ("I", "F") or image.mode.startswith(("I;", "F;")):
        raise DecodeError("samples of more than 16 bits", f"Pillow mode {image.mode} has no defined white")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or transparency is not None:
        opaque = image.convert("RGBA")
        return _composite(opaque, opaque.getchannel("A"), background)
    return np.array(image.convert("RGB"))


def _composite(image: Image.Image, alpha: Image.Image, background: tuple[int, int, int]) -> Pixels:
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image.convert("RGB"), mask=alpha)
    return np.array(canvas)


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation: 5 to 8 are transposed, and then each is flipped along the axes that it names."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
