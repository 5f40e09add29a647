"""JPEG through libjpeg-turbo: strict, and scaled down inside the decoder where the result is made smaller anyway.

A decoder that scales skips most of the inverse DCT. Only whole powers of two are used: they cost less and lie closer
to the full image than the 3/8 that libjpeg-turbo would pick by itself.
"""

from collections.abc import Callable
from typing import Final, Literal

import numpy as np
import simplejpeg  # type: ignore[import-untyped]
from numpy.typing import NDArray

from tagger.data.image_header import DecodeError, check_size, jpeg_orientation

Pixels = NDArray[np.uint8]
DctScaling = Literal["safe", "tight", "off"]
DCT_SCALINGS: Final[tuple[DctScaling, ...]] = ("safe", "tight", "off")
Fit = Callable[[int, int], tuple[int, int]]

# Decoded size over target size that is left for the resize to filter.
_MARGIN: Final[dict[DctScaling, int]] = {"safe": 2, "tight": 1}
_DIVISORS = (8, 4, 2)
# libjpeg's complaints that mean missing or broken pixels; whatever else strict mode refuses, Pillow may still read.
_LOST_PIXELS = ("Premature end", "Corrupt JPEG data")
# Bytes between the last pixel and the end of the image: a fault that costs nothing.
_HARMLESS = "extraneous bytes before marker 0xd9"


def decode_jpeg(
    content: bytes, max_pixels: int, fit: Fit | None, scaling: DctScaling, *, partial: bool = False
) -> tuple[Pixels, int, tuple[int, int]] | None:
    """(uint8 [h, w, 3] RGB as stored, EXIF orientation, upright (height, width) in full); None: ask Pillow.

    `fit` gives the target (height, width) of an upright size; h, w are the stored size over 1, 2, 4 or 8. `partial`
    takes what there is of a damaged file, grey where there is nothing. Raises DecodeError for one without `partial`.
    """
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content, strict=not partial)
    except ValueError:
        return None
    check_size(width, height, max_pixels)
    orientation = jpeg_orientation(content)
    upright = (width, height) if orientation >= 5 else (height, width)
    divisor = 1 if fit is None else dct_divisor(upright, fit(*upright), scaling)
    smallest = {"min_height": -(-height // divisor), "min_width": -(-width // divisor)} if divisor > 1 else {}
    inks = colorspace in ("CMYK", "YCCK")
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            content, colorspace="CMYK" if inks else "RGB", strict=not partial, **smallest
        )
    except ValueError as error:
        message = str(error)
        if _HARMLESS not in message and any(fault in message for fault in _LOST_PIXELS):
            raise DecodeError("truncated" if "Premature" in message else "damaged JPEG", message) from error
        return None
    return (_inverted_cmyk_to_rgb(pixels) if inks else pixels), orientation, upright


def dct_divisor(size: tuple[int, int], target: tuple[int, int], scaling: DctScaling) -> int:
    """1, 2, 4 or 8: the largest that leaves `size` / divisor at least 2x ("safe") or 1x ("tight") `target`."""
    if scaling == "off":
        return 1
    margin = _MARGIN[scaling]
    for divisor in _DIVISORS:
        if all(length >= divisor * margin * wanted for length, wanted in zip(size, target, strict=True)):
            return divisor
    return 1


def _inverted_cmyk_to_rgb(inks: Pixels) -> Pixels:
    # Four-channel JPEGs store 255 - ink (Adobe's convention, which every writer follows): red = (1 - C) (1 - K).
    products = inks[..., :3].astype(np.uint16) * inks[..., 3:] + 128
    rgb: Pixels = ((products + (products >> 8)) >> 8).astype(np.uint8)
    return rgb
