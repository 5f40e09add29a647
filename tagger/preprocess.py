"""How pixels become the model's input: one specification for training, validation, prediction and export.

It is saved as `preprocess.json` with every model. Refuses specifications that this version cannot carry out exactly:
a resize that is nearly the same moves every score.
"""

import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tagger.data.buckets import MIN_SCALE_RATIO, Shape, aspect_shapes, aspects_of, nearest_shape
from tagger.data.decode_jpeg import DCT_SCALINGS, DctScaling
from tagger.files import FormatError, read_json, write_json

FORMAT_VERSION = 2
INTERPOLATION = "bicubic"
_LARGEST_SIDE = 1 << 16
_GOOD_SHARE = 0.96  # of useful tokens; squares of 10 patches a side and more reach it
_EVEN_ASPECTS = np.exp(np.linspace(-np.log(2.0), np.log(2.0), 401))

_log = logging.getLogger(__name__)

Fit = Literal["letterbox", "buckets"]


@dataclass(frozen=True)
class Preprocess:
    """Fit an image into a shape that the model takes; normalising it is the model's part.

    image_size: side of the square, pixels.
    background: RGB 0..255 of the bars and behind transparency.
    mean, std: per channel, of the range 0..1; the model subtracts and divides, `apply` does not.
    interpolation: torch's antialiased bicubic on uint8.
    shapes: (height, width) of the aspect buckets, from the tallest to the widest. An image goes to the one of nearest
    aspect and fills it, one side scaled by at most 5 % more than the other; what lies further from every bucket keeps
    the rest of its form between two bars, since a crop would leave its tags without their picture. Without shapes: a
    letterbox, which keeps every aspect and puts the bars inside the square.
    decode_scaling: how far a JPEG may be scaled in its decoder (see DecodeOptions); it moves pixels (tight: about
    35 dB), so a model keeps to what it was trained with.
    """

    image_size: int
    background: tuple[int, int, int] = (255, 255, 255)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: str = INTERPOLATION
    shapes: tuple[Shape, ...] = ()
    decode_scaling: DctScaling = "safe"

    @classmethod
    def create(
        cls,
        image_size: int,
        fit: Fit,
        patch_size: int,
        background: tuple[int, int, int] = (255, 255, 255),
        *,
        decode_scaling: DctScaling = "safe",
    ) -> "Preprocess":
        """What `fit` means for a model of `patch_size`; ValueError where a square is too small for buckets.

        Logs how much of the tokens buckets of a small square leave to bars.
        """
        shapes = aspect_shapes(image_size, patch_size) if fit == "buckets" else ()
        preprocess = cls(image_size, background, shapes=shapes, decode_scaling=decode_scaling)
        if shapes and (share := preprocess.useful_share()) < _GOOD_SHARE:
            _log.info(
                "data.fit=buckets: a square of %d patches a side has %d shapes, so that %.0f %% of the tokens show the "
                "image; data.image_size=%d or a smaller model.patch_size gives %.0f %% and more",
                image_size // patch_size, len(shapes), 100 * share, 11 * patch_size, 100 * _GOOD_SHARE,
            )  # fmt: skip
        return preprocess

    def useful_share(self) -> float:
        """Share of the square's tokens that show the image, for aspects spread evenly over 1:2 .. 2:1, 0..1."""
        sizes = [self.content_size(100_000, round(100_000 * aspect)) for aspect in _EVEN_ASPECTS]
        return float(np.mean([height * width for height, width in sizes])) / self.image_size**2

    @property
    def fit(self) -> Fit:
        """How an image takes its shape."""
        return "buckets" if self.shapes else "letterbox"

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size={self.image_size} is not above 0; use the side of the square in pixels")
        if len(self.background) != 3 or not all(0 <= channel <= 255 for channel in self.background):
            raise ValueError(f"background={self.background} is not three numbers 0..255; white is (255, 255, 255)")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(value > 0 for value in self.std):
            raise ValueError(f"mean={self.mean}, std={self.std}: each needs three numbers, std above 0")
        if self.interpolation != INTERPOLATION:
            raise ValueError(
                f"interpolation={self.interpolation!r}: this version carries out {INTERPOLATION!r} only; "
                "update the program"
            )
        if self.decode_scaling not in DCT_SCALINGS:
            raise ValueError(f"decode_scaling={self.decode_scaling!r} is unknown; use {', '.join(DCT_SCALINGS)}")
        aspects = [width / height for height, width in self.shapes if min(height, width) > 0]
        ascending = all(left < right for left, right in itertools.pairwise(aspects))
        if len(aspects) != len(self.shapes) or not ascending or max(map(max, self.shapes), default=1) > _LARGEST_SIDE:
            raise ValueError(f"shapes={self.shapes} are not (height, width) from the tallest to the widest")

    @property
    def longest_side(self) -> int:
        """Pixels of the longest side of all shapes: a smaller image is always enlarged."""
        return max(map(max, self.shapes), default=self.image_size)

    def shape_of(self, height: int, width: int) -> Shape:
        """(height, width) in which the model sees an image of height x width pixels."""
        if not self.shapes:
            return self.image_size, self.image_size
        aspect = aspects_of(np.array([width]), np.array([height]))
        return self.shapes[int(nearest_shape(self.shapes, aspect)[0])]

    def content_size(self, height: int, width: int, shape: Shape | None = None) -> tuple[int, int]:
        """(height, width) of an image's content inside `shape` (None: its own).

        The side that does not fill the shape is rounded to that side's parity, so that the content is centred exactly
        and mirroring the whole is mirroring the content; the aspect ratio moves by at most one pixel more.
        """
        rows, columns = shape or self.shape_of(height, width)
        stretch = 1 / MIN_SCALE_RATIO if self.shapes else 1.0
        if height * columns >= width * rows:
            return rows, _matching_parity(width * rows / height * stretch, columns)
        return _matching_parity(height * columns / width * stretch, rows), columns

    def apply(self, rgb: NDArray[np.uint8], full_size: tuple[int, int] | None = None) -> tuple[Tensor, tuple[int, int]]:
        """uint8 [h, w, 3] RGB -> (uint8 [3, *shape_of(H, W)], (height, width) of the content).

        full_size: (H, W) of the image before its decoder scaled it; None: `rgb` is the full image.
        """
        place = np.empty((3, *self.shape_of(*(full_size or rgb.shape[:2]))), dtype=np.uint8)
        size = self.apply_into(rgb, place, full_size=full_size)
        return torch.from_numpy(place), size

    def apply_into(
        self,
        rgb: NDArray[np.uint8],
        place: NDArray[np.uint8],
        *,
        mirror: bool = False,
        full_size: tuple[int, int] | None = None,
    ) -> tuple[int, int]:
        """Write the image, uint8 [H, W, 3] RGB, over every pixel of `place`, uint8 [3, *shape].

        The shape may be another than the image's own, as beside other images of a batch: the same rule fits it in.
        `mirror` flips the result left to right. `full_size` as in `apply`. Returns (height, width) of the content.
        """
        rows, columns = place.shape[1], place.shape[2]
        full = full_size or (rgb.shape[0], rgb.shape[1])
        height, width = self.content_size(full[0], full[1], (rows, columns))
        content = _resize(rgb, height, width)
        if mirror:
            content = content[:, :, ::-1]
        top, left = (rows - height) // 2, (columns - width) // 2
        # NumPy, not torch: Tensor.copy_ and fill_ start a team of OpenMP threads in every loader thread.
        for plane, colour in zip(place, self.background, strict=True):
            plane[:top] = colour
            plane[top + height :] = colour
            plane[top : top + height, :left] = colour
            plane[top : top + height, left + width :] = colour
        place[:, top : top + height, left : left + width] = content
        return height, width

    def shrink(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 [H, W, 3] -> contiguous uint8 [h, w, 3]: the content that `apply` gives, without its bars.

        An image that fits into the square as it is stays as it is.
        """
        if max(rgb.shape[:2]) <= self.image_size:
            return np.ascontiguousarray(rgb)
        height, width = self.content_size(rgb.shape[0], rgb.shape[1])
        return np.ascontiguousarray(_resize(rgb, height, width).transpose(1, 2, 0))

    def to_json(self) -> dict[str, object]:
        """What `from_json` reads back to an equal object."""
        return {
            "format_version": FORMAT_VERSION,
            "image_size": self.image_size,
            "fit": self.fit,
            **({"shapes": [list(shape) for shape in self.shapes]} if self.shapes else {}),
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
            raise FormatError(
                f"preprocess has format_version {found}, this program reads up to {FORMAT_VERSION}; update it"
            )
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
                shapes=_shapes(content),
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


def _shapes(content: Mapping[str, object]) -> tuple[Shape, ...]:
    fit, shapes = content.get("fit"), content.get("shapes")
    if fit == "letterbox" and shapes is None:
        return ()
    if fit == "letterbox":
        raise FormatError("preprocess: fit='letterbox' with shapes; they belong to fit='buckets'")
    if fit != "buckets":
        raise FormatError(f"preprocess: fit={fit!r} is not known to this version; update the program")
    if not isinstance(shapes, list) or not shapes or not all(_is_shape(shape) for shape in shapes):
        raise FormatError(f"preprocess: shapes={shapes!r} are not pairs [height, width] of whole numbers above 0")
    return tuple((shape[0], shape[1]) for shape in shapes)


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)


def _matching_parity(length: float, side: int) -> int:
    """The whole number nearest to a length, within 1 .. side, that leaves equal bars on both ends of a side."""
    parity = side % 2
    nearest = 2 * round((length - parity) / 2) + parity
    return min(max(nearest, 2 - parity), side)


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
