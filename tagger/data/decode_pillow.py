"""Every format through one named Pillow plugin: what faster decoders do not take, and the judge of their refusals.

Handles what Pillow's own `convert("RGB")` gets wrong: 16-bit grey is scaled, not cut off, and transparency is
composited on the background.
"""

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from tagger.data.decode_lossless import Colour, composite
from tagger.data.image_header import (
    PILLOW_PLUGINS,
    DecodeError,
    check_size,
    check_supported,
    exif_orientation,
    webp_canvas,
)

Pixels = NDArray[np.uint8]

_ROW_BY_ROW = ("PNG", "GIF", "BMP")


def decode_pillow(
    content: bytes, kind: str, background: Colour, max_pixels: int, *, partial: bool = False
) -> tuple[Pixels, int]:
    """(uint8 [H, W, 3] RGB, EXIF orientation still to be undone). Raises DecodeError and whatever Pillow raises.

    `partial` takes the rows in front of the end of a truncated file, in the formats that Pillow decodes row by row
    (_ROW_BY_ROW); the others are refused as without it.
    """
    check_supported(kind)
    if kind == "WebP":
        # Its decoder reserves the whole canvas when it opens a file.
        check_size(*webp_canvas(content), max_pixels)
    with PILLOW_PLUGINS[kind](BytesIO(content)) as image:
        check_size(image.width, image.height, max_pixels)
        _load(image, partial=partial and kind in _ROW_BY_ROW)
        exif = image.info.get("exif")
        # Pillow turns TIFF images itself while loading them.
        orientation = exif_orientation(exif) if isinstance(exif, bytes) and kind != "TIFF" else 1
        return _to_rgb(image, background), orientation


def _load(image: ImageFile.ImageFile, *, partial: bool) -> None:
    try:
        image.load()
    except OSError as error:
        if not partial or "truncat" not in str(error):
            raise
        # Pillow's own switch for this is a global, which would let truncated files through in every thread. What was
        # decoded is in the image already; without tiles there is nothing left that `load` could stumble over.
        image.tile = []
        image.load()


def _to_rgb(image: Image.Image, background: Colour) -> Pixels:
    transparency = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        samples = np.asarray(image).astype(np.uint32)
        grey = Image.fromarray(((samples * 255 + 32767) // 65535).astype(np.uint8))
        if not isinstance(transparency, int):
            return np.array(grey.convert("RGB"))
        visible = Image.fromarray(np.where(samples == transparency, 0, 255).astype(np.uint8))
        return composite(grey, visible, background)
    if image.mode in ("I", "F") or image.mode.startswith(("I;", "F;")):
        raise DecodeError("samples of more than 16 bits", f"Pillow mode {image.mode} has no defined white")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or transparency is not None:
        opaque = image.convert("RGBA")
        return composite(opaque, opaque.getchannel("A"), background)
    return np.array(image.convert("RGB"))
