"""Image bytes -> upright uint8 RGB pixels, the same for training, validation and prediction.

The format is told from the first bytes, never from the name. JPEG goes to libjpeg-turbo, plain PNG and WebP to spng and
libwebp, the rest to one named Pillow plugin each, all of them strict. Refuses, with DecodeError, other formats, images
above a pixel cap (before decoding), and truncated or damaged files; partial pixels are given only where they are asked
for, and then say so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from tagger.data.decode_jpeg import DCT_SCALINGS, DctScaling, Fit, decode_jpeg
from tagger.data.decode_lossless import Colour, decode_png, decode_webp
from tagger.data.decode_pillow import decode_pillow
from tagger.data.image_header import FORMATS, DecodeError, RefusedImage, broken, exif_orientation, sniff_format

__all__ = [
    "FORMATS",
    "DecodeError",
    "DecodeOptions",
    "Decoded",
    "RefusedImage",
    "decode",
    "decode_image",
    "describe_decoder",
    "exif_orientation",
    "sniff_format",
]

Pixels = NDArray[np.uint8]

# Goes up when bytes that were refused before may be decoded now: what an older decoder refused is then tried again.
DECODER_VERSION = 2

# Share of the rows of a partial image that may be missing.
_MOST_MISSING = 0.5

_FAST: dict[str, Callable[[bytes, Colour, int], tuple[Pixels, int] | None]] = {"PNG": decode_png, "WebP": decode_webp}


@dataclass(frozen=True)
class DecodeOptions:
    """How images are decoded.

    background: RGB 0..255 behind transparency. max_pixels: cap of width x height, checked before decoding.
    dct_scaling: JPEG scaled by 2, 4 or 8 inside its decoder, where at least 2x ("safe") or 1x ("tight") the target is
    left; "off": never. partial: truncated files give what there is of them, if that is half of their rows.
    """

    background: Colour = (255, 255, 255)
    max_pixels: int = 200_000_000
    dct_scaling: DctScaling = "safe"
    partial: bool = False

    def __post_init__(self) -> None:
        if self.dct_scaling not in DCT_SCALINGS:
            raise ValueError(f"dct_scaling={self.dct_scaling!r} is unknown; use {', '.join(DCT_SCALINGS)}")


@dataclass(frozen=True)
class Decoded:
    """An upright image.

    pixels: uint8 [H, W, 3] RGB, writable and contiguous. full_size: (height, width) before any scaling in the decoder;
    the geometry of a resize must follow it. partial: pixels are missing, grey or black in their place.
    """

    pixels: Pixels
    full_size: tuple[int, int]
    partial: bool


def describe_decoder(options: DecodeOptions) -> str:
    """What decides whether bytes are refused: this module, its libraries, and the options that refuse."""
    libraries = (f"{name}-{version(name)}" for name in ("simplejpeg", "imagecodecs", "pillow"))
    return " ".join((str(DECODER_VERSION), *libraries, f"max_pixels={options.max_pixels} partial={options.partial}"))


def decode_image(
    content: bytes,
    *,
    background: Colour = (255, 255, 255),
    max_pixels: int,
    target: tuple[int, int] | None = None,
    dct_scaling: DctScaling = "safe",
    partial: bool = False,
) -> Pixels:
    """`decode` for callers that know the target (height, width) of the upright image, or want it in full (None)."""
    fit = None if target is None else lambda *_: target
    return decode(content, DecodeOptions(background, max_pixels, dct_scaling, partial), fit).pixels


def decode(content: bytes, options: DecodeOptions, fit: Fit | None = None) -> Decoded:
    """The image in a file's bytes.

    `fit` gives the (height, width) that an upright image of (height, width) will be resized to; None decodes in full.
    EXIF orientation is applied, transparency composited, 16-bit samples are scaled to 8, an animation gives its first
    frame. Colour profiles are not applied. Strict decoding is always tried first. Raises DecodeError; MemoryError
    passes through.
    """
    kind = sniff_format(content)
    try:
        return _decode(content, kind, options, fit, partial=False)
    except DecodeError as refusal:
        if not options.partial or refusal.reason == "too many pixels":
            raise
        try:
            return _decode(content, kind, options, fit, partial=True)
        except DecodeError:
            raise refusal from None


def _decode(content: bytes, kind: str, options: DecodeOptions, fit: Fit | None, *, partial: bool) -> Decoded:
    try:
        if kind == "JPEG":
            jpeg = decode_jpeg(content, options.max_pixels, fit, options.dct_scaling, partial=partial)
            if jpeg is not None:
                stored, orientation, size = jpeg
                return _finish(stored, orientation, size, partial=partial)
        fast = _FAST[kind](content, options.background, options.max_pixels) if kind in _FAST else None
        stored, orientation = fast or decode_pillow(
            content, kind, options.background, options.max_pixels, partial=partial
        )
    except (DecodeError, MemoryError):
        raise
    except Exception as error:
        raise broken(kind, error) from error
    height, width = stored.shape[:2]
    return _finish(stored, orientation, (width, height) if orientation >= 5 else (height, width), partial=partial)


def _finish(stored: Pixels, orientation: int, full_size: tuple[int, int], *, partial: bool) -> Decoded:
    # Decoders leave the rows that they did not reach all alike: the last ones, or the first ones of a BMP.
    if partial and any((stored == stored[edge]).all((1, 2)).mean() > _MOST_MISSING for edge in (0, -1)):
        raise DecodeError("truncated", "most of it is missing")
    return Decoded(np.ascontiguousarray(_upright(stored, orientation)), full_size, partial)


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation: 5 to 8 are transposed, and then each is flipped along the axes that it names."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
