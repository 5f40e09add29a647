"""Random changes to a batch of uint8 images on its device: geometry, colour, blur and erasing.

Every draw is a function of an image's key alone (which the caller makes from seed, epoch and row), so an image comes
out the same in any batch, process and order, and on CPU and CUDA up to rounding. What changes tags too is done
elsewhere: mirroring in the loader, mixup in the training objective, for which the shares of a batch are drawn here.
Refuses images that are not uint8 and strengths beyond what an operation can mean.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tagger import rng
from tagger.config_checks import AUGMENT_LIMITS, check_strength

Keys = NDArray[np.uint64] | Tensor

_OPERATIONS = tuple(name for name in AUGMENT_LIMITS if name != "mixup")
_MIXUP_STREAM = rng.stable_id("mixup")
_OPERATION_IDS = np.array([rng.stable_id(name) for name in _OPERATIONS], dtype=np.uint64)
_DRAWS = 5  # numbers drawn for each operation
_LUMA = (0.299, 0.587, 0.114)
_ERASING_LOG_ASPECT = math.log(3.0)


@dataclass(frozen=True)
class Op:
    """How often an operation acts (`probability` per image) and how strongly (the unit is the operation's)."""

    probability: float
    strength: float

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"augmentation probability {self.probability} is not in 0..1; use a share, e.g. 0.5")
        if not (self.strength >= 0 and math.isfinite(self.strength)):
            raise ValueError(f"augmentation strength {self.strength} is below 0 or not finite; 0 turns it off")


class _Stage(NamedTuple):
    """One pass over the images of the batch that need it."""

    apply: Callable[[Tensor, Tensor], Tensor]  # (float32 [n, 3, H, W] in 0..255, parameters [n, K]) -> images
    acts: NDArray[np.bool_]  # [B]
    parameters: NDArray[np.float32]  # [B, K]


class _Draws:
    """The random numbers of a batch: for each image, a few for each operation."""

    def __init__(self, keys: NDArray[np.uint64]) -> None:
        hashed = rng.mix(keys[:, None, None], _OPERATION_IDS[None, :, None], np.arange(_DRAWS)[None, None, :])
        self._numbers = rng.uniform(hashed)

    def uniform(self, name: str, draw: int) -> NDArray[np.float64]:
        """[B], 0 <= x < 1; draw 0 decides whether the operation acts."""
        return self._numbers[:, _OPERATIONS.index(name), draw]

    def acts(self, name: str, op: Op | None) -> NDArray[np.bool_]:
        """[B], which images the operation acts on."""
        if op is None or op.strength == 0:
            return np.zeros(len(self._numbers), dtype=np.bool_)
        return self.uniform(name, 0) < op.probability

    def amount(self, name: str, op: Op | None) -> NDArray[np.float64]:
        """[B], in 0..strength, 0 where the operation does not act."""
        strength = op.strength if op is not None else 0.0
        return np.where(self.acts(name, op), strength * self.uniform(name, 1), 0.0)

    def signed(self, name: str, op: Op | None, draw: int = 1) -> NDArray[np.float64]:
        """[B], in ±strength, 0 where the operation does not act."""
        strength = op.strength if op is not None else 0.0
        return np.where(self.acts(name, op), strength * (2.0 * self.uniform(name, draw) - 1.0), 0.0)


@dataclass(frozen=True)
class BatchAugment:
    """The operations in the order in which they act, `None` meaning off; each acts with its own probability.

    rotation    angle uniform in ±strength degrees
    shift       right and down by uniform ±strength of the width and of the height
    scale       content larger by exp(uniform ±strength)
    brightness, contrast, saturation    factor uniform in 1 ± strength (contrast about the image's mean luma)
    blur        Gaussian, standard deviation uniform in 0..strength pixels
    erasing     one rectangle of uniform 0..strength of the area, sides' ratio log-uniform in 1/3..3
    mixup       not done here, see `own_share`; its probability is that of a batch

    Geometry is one bilinear pass. What comes into view, and what is erased, has the colour `fill` (RGB, 0..255), which
    colour operations then change with the rest of the picture, as they do its letterbox padding.
    """

    rotation: Op | None = None
    shift: Op | None = None
    scale: Op | None = None
    brightness: Op | None = None
    contrast: Op | None = None
    saturation: Op | None = None
    blur: Op | None = None
    erasing: Op | None = None
    mixup: Op | None = None
    fill: tuple[int, int, int] = (255, 255, 255)

    def __post_init__(self) -> None:
        for name in AUGMENT_LIMITS:
            op: Op | None = getattr(self, name)
            if op is not None:
                check_strength(name, op.strength)
        if len(self.fill) != 3 or not all(0 <= value <= 255 for value in self.fill):
            raise ValueError(f"fill {self.fill} is not three numbers in 0..255; white is (255, 255, 255)")

    @torch.no_grad()
    def __call__(self, images: Tensor, keys: Keys) -> Tensor:
        """Augmented images, uint8 [B, 3, H, W] on the same device; the input is returned where nothing acts.

        `keys` [B], uint64 or an int64 tensor of the same bits, lie on the host: reading them must not wait for a GPU.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            found = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            raise ValueError(f"images to augment are {found}; expected uint8 [B, 3, H, W]")
        host_keys = _as_uint64(keys)
        if host_keys.shape != (images.shape[0],):
            raise ValueError(f"{host_keys.size} keys were passed for {images.shape[0]} images; pass one for each")
        draws = _Draws(host_keys)
        stages = [stage for stage in self._draw(draws, images.shape[2], images.shape[3]) if stage.acts.any()]
        # Reduced precision would round pixels, and differently from the CPU.
        with torch.autocast(images.device.type, enabled=False):
            return _run(images, stages) if stages else images

    def own_share(self, keys: Keys) -> float:
        """The share that each image of the batch keeps of itself as it is blended with another; 1 where none is.

        From Beta(strength, strength) in batches that mixup acts on: a function of the batch's keys alone.
        """
        if self.mixup is None or self.mixup.strength == 0:
            return 1.0
        of_batch = rng.mix(_MIXUP_STREAM, np.bitwise_xor.reduce(_as_uint64(keys)))
        generator = np.random.Generator(np.random.Philox(key=int(of_batch)))
        if generator.random() >= self.mixup.probability:
            return 1.0
        return float(generator.beta(self.mixup.strength, self.mixup.strength))

    def _draw(self, draws: _Draws, height: int, width: int) -> list[_Stage]:
        return [
            self._draw_geometry(draws, height, width),
            self._draw_colour(draws),
            self._draw_blur(draws),
            self._draw_erasing(draws, height, width),
        ]

    def _draw_geometry(self, draws: _Draws, height: int, width: int) -> _Stage:
        acts = draws.acts("rotation", self.rotation) | draws.acts("shift", self.shift) | draws.acts("scale", self.scale)
        angle = np.deg2rad(draws.signed("rotation", self.rotation))
        shrink = np.exp(-draws.signed("scale", self.scale))
        # Where each output pixel comes from: the forward map turns and enlarges about the centre, then shifts, so its
        # inverse shifts back first. Coordinates run from -1 to 1 along each side, hence 2 and the ratio of the sides.
        right, down = 2.0 * draws.signed("shift", self.shift, 1), 2.0 * draws.signed("shift", self.shift, 2)
        cosine, sine = np.cos(angle) * shrink, np.sin(angle) * shrink
        across, along = sine * (height / width), sine * (width / height)
        x_from = [cosine, -across, across * down - cosine * right]
        y_from = [along, cosine, -along * right - cosine * down]
        return _Stage(_move, acts, _columns([*x_from, *y_from], self.fill))

    def _draw_colour(self, draws: _Draws) -> _Stage:
        operations = {"brightness": self.brightness, "contrast": self.contrast, "saturation": self.saturation}
        acts = np.logical_or.reduce([draws.acts(name, op) for name, op in operations.items()])
        brightness, contrast, saturation = (1.0 + draws.signed(name, op) for name, op in operations.items())
        # Each operation is linear in the pixel, its luma and the image's mean luma, and so is their sequence.
        of_pixel = brightness * contrast * saturation
        of_luma = brightness * contrast * (1.0 - saturation)
        of_mean_luma = brightness * (1.0 - contrast)
        return _Stage(_recolour, acts, _columns([of_pixel, of_luma, of_mean_luma]))

    def _draw_blur(self, draws: _Draws) -> _Stage:
        sigma = draws.amount("blur", self.blur)
        radius = math.ceil(3.0 * self.blur.strength) if self.blur is not None else 0
        taps = np.arange(-radius, radius + 1)
        weights = np.exp(-0.5 * np.square(taps / np.maximum(sigma, 1e-3)[:, None]))
        weights /= weights.sum(axis=1, keepdims=True)
        return _Stage(_blur, draws.acts("blur", self.blur), weights.astype(np.float32))

    def _draw_erasing(self, draws: _Draws, height: int, width: int) -> _Stage:
        area = draws.amount("erasing", self.erasing)
        log_aspect = _ERASING_LOG_ASPECT * (2.0 * draws.uniform("erasing", 2) - 1.0)
        tall = np.minimum(np.sqrt(area * np.exp(log_aspect)), 1.0) * height
        wide = np.minimum(np.sqrt(area * np.exp(-log_aspect)), 1.0) * width
        top = draws.uniform("erasing", 3) * (height - tall)
        left = draws.uniform("erasing", 4) * (width - wide)
        edges = _columns([top, top + tall, left, left + wide], self.fill)
        return _Stage(_erase, draws.acts("erasing", self.erasing), edges)


def _as_uint64(keys: Keys) -> NDArray[np.uint64]:
    if isinstance(keys, Tensor):
        return keys.cpu().numpy().astype(np.int64).view(np.uint64)
    return keys.astype(np.uint64)


def _columns(drawn: list[NDArray[np.float64]], same: tuple[float, ...] = ()) -> NDArray[np.float32]:
    """[B, K]: what was drawn for each image, then what is the same for all."""
    columns = np.stack([*drawn, *(np.full_like(drawn[0], value) for value in same)], axis=1)
    return columns.astype(np.float32)


def _run(images: Tensor, stages: list[_Stage]) -> Tensor:
    """The stages one after the other in float32, over only the images that any of them acts on, rounded once."""
    touched = np.flatnonzero(np.logical_or.reduce([stage.acts for stage in stages]))
    places = [np.flatnonzero(stage.acts[touched]) for stage in stages]
    # Everything that was drawn goes to the device in two copies that do not wait for it.
    indices = _send(np.concatenate([touched, *places]), images.device)
    numbers = _send(np.concatenate([stage.parameters[stage.acts].ravel() for stage in stages]), images.device)
    rows, *device_places = indices.split_with_sizes([len(touched), *(len(place) for place in places)])
    sizes = [stage.parameters.shape[1] * len(place) for stage, place in zip(stages, places, strict=True)]

    work = images.index_select(0, rows).to(torch.float32)
    for stage, place, flat in zip(stages, device_places, numbers.split_with_sizes(sizes), strict=True):
        parameters = flat.reshape(len(place), -1)
        if len(place) == len(touched):
            work = stage.apply(work, parameters)
        else:
            work.index_copy_(0, place, stage.apply(work.index_select(0, place), parameters))
    changed = work.round_().clamp_(0, 255).to(torch.uint8)
    return changed if len(touched) == len(images) else images.index_copy(0, rows, changed)


def _send(values: NDArray[np.int64] | NDArray[np.float32], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _move(images: Tensor, parameters: Tensor) -> Tensor:
    # Outside reads as zero, so zero stands for the fill colour; blending at the edge comes out right as well.
    fill = parameters[:, 6:, None, None]
    grid = _sampling_grid(parameters[:, :6], images.shape[2], images.shape[3])
    moved = F.grid_sample(images - fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved.add_(fill)


def _sampling_grid(matrix: Tensor, height: int, width: int) -> Tensor:
    """[n, H, W, 2] of (x, y) to read at; F.affine_grid's result without its matrix product, which TF32 would round."""
    x_from_x, x_from_y, x_shift, y_from_x, y_from_y, y_shift = matrix[:, :, None].unbind(1)
    x = (torch.arange(width, device=matrix.device) * 2 + 1) / width - 1
    y = (torch.arange(height, device=matrix.device) * 2 + 1) / height - 1
    grid = matrix.new_empty(len(matrix), height, width, 2)
    torch.add((x_from_x * x)[:, None, :], (x_from_y * y + x_shift)[:, :, None], out=grid[..., 0])
    torch.add((y_from_x * x)[:, None, :], (y_from_y * y + y_shift)[:, :, None], out=grid[..., 1])
    return grid


def _recolour(images: Tensor, factors: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    luma = (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
    of_pixel, of_luma, of_mean = factors[:, :, None, None].unbind(1)
    offset = of_mean * luma.mean(dim=(1, 2), keepdim=True)
    return torch.addcmul(luma.mul_(of_luma).add_(offset)[:, None], images, of_pixel[:, None])


def _blur(images: Tensor, weights: Tensor) -> Tensor:
    # Weighted sums of shifted images, along x and then y: as fast as a grouped convolution, and never in TF32.
    radius, height, width = weights.shape[1] // 2, images.shape[2], images.shape[3]
    taps = weights[:, :, None, None, None].unbind(1)
    padded = F.pad(images, (radius, radius, 0, 0), mode="replicate")
    across = padded[..., :width] * taps[0]
    for shift, tap in enumerate(taps[1:], start=1):
        across.addcmul_(padded[..., shift : shift + width], tap)
    padded = F.pad(across, (0, 0, radius, radius), mode="replicate")
    blurred = padded[..., :height, :] * taps[0]
    for shift, tap in enumerate(taps[1:], start=1):
        blurred.addcmul_(padded[..., shift : shift + height, :], tap)
    return blurred


def _erase(images: Tensor, parameters: Tensor) -> Tensor:
    rows = torch.arange(images.shape[2], device=images.device) + 0.5
    columns = torch.arange(images.shape[3], device=images.device) + 0.5
    top, bottom, left, right = parameters[:, :4, None].unbind(1)
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    inside = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return torch.where(inside, parameters[:, 4:, None, None], images)
