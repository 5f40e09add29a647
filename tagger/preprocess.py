"""How pixels become the model's input: one specification for training, validation, prediction and export.

It is saved as `preprocess.json` with every model. Refuses specifications that this version cannot carry out exactly:
a resize that is nearly the same moves every score.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tagger.data.decode_jpeg import DCT_SCALINGS, DctScaling
from tagger.files import FormatError, read_json, write_json

FORMAT_VERSION = 2
INTERPOLATION = "bicubic"
FIT = "letterbox"


@dataclass(frozen=True)
class Preprocess:
    """Letterbox an image into a square and normalise it.

    image_size: side of the square, pixels.
    background: RGB 0..255 of the bars and behind transparency.
    mean, std: per channel, of the range 0..1; the model subtracts and divides, `apply` does not.
    interpolation: torch's antialiased bicubic on uint8. fit: keep the aspect ratio, longest side = image_size.
    decode_scaling: how far a JPEG may be scaled in its decoder (see DecodeOptions); it moves pixels (tight: about
    35 dB), so a model keeps to what it was trained with.
    """

    image_size: int
    background: tuple[int, int, int] = (255, 255, 255)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: str = INTERPOLATION
    fit: str = FIT
    decode_scaling: DctScaling = "safe"

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size={self.image_size} is not above 0; use the side of the square in pixels")
        if len(self.background) != 3 or not all(0 <= channel <= 255 for channel in self.background):
            raise ValueError(f"background={self.background} is not three numbers 0..255; white is (255, 255, 255)")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(value > 0 for value in self.std):
            raise ValueError(f"mean={self.mean}, std={self.std}: each needs three numbers, std above 0")
        if self.interpolation != INTERPOLATION or self.fit != FIT:
            raise ValueError(
                f"interpolation={self.interpolation!r}, fit={self.fit!r}: "
                f"this version carries out {INTERPOLATION!r} with {FIT!r} only; update the program"
            )
        if self.decode_scaling not in DCT_SCALINGS:
            raise ValueError(f"decode_scaling={self.decode_scaling!r} is unknown; use {', '.join(DCT_SCALINGS)}")

    def content_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of an image's content inside the square.

        The shorter side is rounded to the parity of `image_size`, so that the content is centred exactly and
        mirroring the square is mirroring the content; the aspect ratio moves by at most one pixel.
        """
        side = self.image_size
        longest = max(height, width)
        shorter = self._matching_parity(min(height, width) * side / longest)
        return (side, shorter) if height >= width else (shorter, side)

    def _matching_parity(self, length: float) -> int:
        parity = self.image_size % 2
        nearest = 2 * round((length - parity) / 2) + parity
        return min(max(nearest, 2 - parity), self.image_size)

    def apply(self, rgb: NDArray[np.uint8], full_size: tuple[int, int] | None = None) -> tuple[Tensor, tuple[int, int]]:
        """uint8 [H, W, 3] RGB -> (uint8 [3, image_size, image_size], (height, width) of the content).

        full_size: (height, width) of the image before its decoder scaled it; None: `rgb` is the full image.
        """
        square = np.empty((3, self.image_size, self.image_size), dtype=np.uint8)
        size = self.apply_into(rgb, square, full_size=full_size)
        return torch.from_numpy(square), size

    def apply_into(
        self,
        rgb: NDArray[np.uint8],
        square: NDArray[np.uint8],
        *,
        mirror: bool = False,
        full_size: tuple[int, int] | None = None,
    ) -> tuple[int, int]:
        """Write the letterboxed image over every pixel of `square`, uint8 [3, image_size, image_size].

        `mirror` flips the result left to right. `full_size` as in `apply`. Returns (height, width) of the content.
        """
        height, width = self.content_size(*(full_size or rgb.shape[:2]))
        content = _resize(rgb, height, width)
        if mirror:
            content = content[:, :, ::-1]
        top, left = (self.image_size - height) // 2, (self.image_size - width) // 2
        # NumPy, not torch: Tensor.copy_ and fill_ start a team of OpenMP threads in every loader thread.
        for plane, colour in zip(square, self.background, strict=True):
            plane[:top] = colour
            plane[top + height :] = colour
            plane[top : top + height, :left] = colour
            plane[top : top + height, left + width :] = colour
        square[:, top : top + height, left : left + width] = content
        return height, width

    def to_json(self) -> dict[str, object]:
        """What `from_json` reads back to an equal object."""
        return {
            "format_version": FORMAT_VERSION,
            "image_size": self.image_size,
            "fit": self.fit,
            "interpolation": self.interpolation,
            "antialias": True,
            "decode_scaling": self.decode_scaling,
            "background": list(self.background),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, object]) -> "Preprocess":
        """The object that `to_json` described; FormatError says which entry is missing or wrong."""
        found = content.get("format_version")
        if not isinstance(found, int) or not 1 <= found <= FORMAT_VERSION:
            raise FormatError(f"preprocess has format_version {found}, this program reads {FORMAT_VERSION}; update it")
        size = content.get("image_size")
        if not isinstance(size, int) or isinstance(size, bool):
            raise FormatError(f"preprocess: image_size={size!r} is not a whole number")
        red, green, blue = (int(channel) for channel in _triple(content, "background"))
        # Before version 2 nothing was scaled in the decoder.
        scaling = content.get("decode_scaling") if found >= 2 else "off"
        if scaling not in DCT_SCALINGS:
            raise FormatError(f"preprocess: decode_scaling={scaling!r} is not one of {', '.join(DCT_SCALINGS)}")
        try:
            return cls(
                image_size=size,
                background=(red, green, blue),
                mean=_triple(content, "mean"),
                std=_triple(content, "std"),
                interpolation=str(content.get("interpolation")),
                fit=str(content.get("fit")),
                decode_scaling=scaling,
            )
        except ValueError as error:
            raise FormatError(f"preprocess: {error}") from error

    def save(self, path: Path) -> None:
        """Write `preprocess.json` atomically."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> "Preprocess":
        """Read what `save` wrote; FormatError names the file and what is wrong with it."""
        content = read_json(path, "preprocess", FORMAT_VERSION)
        try:
            return cls.from_json(content)
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from error


def _triple(content: Mapping[str, object], key: str) -> tuple[float, float, float]:
    values = content.get(key)
    if (
        not isinstance(values, list | tuple)
        or len(values) != 3
        or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    ):
        raise FormatError(f"preprocess: {key}={values!r} is not three numbers")
    return float(values[0]), float(values[1]), float(values[2])


def _resize(rgb: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] -> uint8 [3, height, width]."""
    if rgb.shape[:2] == (height, width):
        return rgb.transpose(2, 0, 1)
    # One channels-last image takes torch's vectorised path and stays on the calling thread.
    image = torch.from_numpy(rgb).permute(2, 0, 1).unsqueeze(0)
    resized = torch.nn.functional.interpolate(image, size=(height, width), mode=INTERPOLATION, antialias=True)
    content: NDArray[np.uint8] = resized[0].numpy()
    return content
