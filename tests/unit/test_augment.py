"""Augmentation on the batch: what each operation does to pixels, and that draws belong to images, not to batches."""

import math
import typing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tagger.data.augment import BatchAugment, Op, _Draws

OPERATIONS = ("rotation", "shift", "scale", "brightness", "contrast", "saturation", "blur", "erasing")
STRENGTHS = dict(zip(OPERATIONS, (15.0, 0.1, 0.2, 0.3, 0.3, 0.3, 1.5, 0.2), strict=True))
FILL = (255, 200, 10)


def _keys(count: int) -> NDArray[np.uint64]:
    return np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def _noise(count: int, height: int = 24, width: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def _plain(count: int, colour: tuple[int, int, int], height: int = 24, width: int = 24) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8).reshape(1, 3, 1, 1).repeat(count, 1, height, width)


def _only(name: str, strength: float, probability: float = 1.0) -> BatchAugment:
    return BatchAugment(**{name: Op(probability, strength)}, fill=FILL)


def _everything(probability: float = 0.6) -> BatchAugment:
    return BatchAugment(**{name: Op(probability, STRENGTHS[name]) for name in OPERATIONS}, fill=FILL)


def _spot(x: int, y: int, height: int = 41, width: int = 41) -> Tensor:
    """Black with one bright 3 x 3 spot about (x, y)."""
    image = torch.zeros(1, 3, height, width, dtype=torch.uint8)
    image[:, :, y - 1 : y + 2, x - 1 : x + 2] = 255
    return image


def _centre_of_light(images: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    light = images[:, 0].double().numpy()
    total = light.sum(axis=(1, 2))
    x = (light.sum(axis=1) * np.arange(light.shape[2])).sum(axis=1) / total
    y = (light.sum(axis=2) * np.arange(light.shape[1])).sum(axis=1) / total
    return x, y


# Whose draws


def test_an_image_comes_out_the_same_in_any_batch_and_order() -> None:
    images, keys = _noise(40), _keys(40)
    together = _everything()(images, keys)
    alone = torch.cat([_everything()(images[i : i + 1], keys[i : i + 1]) for i in range(40)])
    assert torch.equal(together, alone)
    order = np.random.default_rng(0).permutation(40)
    assert torch.equal(_everything()(images[order], keys[order]), together[order])


def test_the_same_bits_as_int64_are_the_same_keys() -> None:
    keys = _keys(16)
    assert (keys.view(np.int64) < 0).any()
    as_tensor = torch.from_numpy(keys.view(np.int64))
    assert torch.equal(_everything()(_noise(16), keys), _everything()(_noise(16), as_tensor))


def test_another_key_is_another_draw() -> None:
    images = _noise(1).expand(64, -1, -1, -1)
    changed = _everything(1.0)(images, _keys(64))
    assert len(torch.unique(changed.flatten(1), dim=0)) == 64


def test_an_operation_switched_on_leaves_the_draws_of_the_others() -> None:
    images, keys = _plain(32, (90, 90, 90)), _keys(32)
    alone = _only("brightness", 0.3)(images, keys)
    # A plain grey picture shows neither blur nor saturation, only which brightness was drawn.
    beside = BatchAugment(brightness=Op(1.0, 0.3), blur=Op(1.0, 2.0), saturation=Op(1.0, 0.5), fill=FILL)(images, keys)
    assert (alone.int() - beside.int()).abs().max() <= 1


def test_the_input_is_never_written_to() -> None:
    images = _noise(16)
    before = images.clone()
    _everything()(images, _keys(16))
    assert torch.equal(images, before)


def test_draws_are_the_same_on_every_platform_and_in_every_version() -> None:
    """Golden; a change here changes every resumed run. To regenerate, print the two expressions."""
    draws = _Draws(np.array([1, 2**63 + 5], dtype=np.uint64))
    assert draws.uniform("rotation", 0).tolist() == [0.03282683027262634, 0.9891360798702108]
    assert draws.uniform("erasing", 4).tolist() == [0.2408973605665068, 0.2694467547223529]


# When nothing happens


@pytest.mark.parametrize("name", OPERATIONS)
def test_zero_strength_and_zero_probability_return_the_batch_itself(name: str) -> None:
    images = _noise(8)
    assert _only(name, 0.0)(images, _keys(8)) is images
    assert _only(name, STRENGTHS[name], probability=0.0)(images, _keys(8)) is images


def test_everything_off_returns_the_batch_itself() -> None:
    images = _noise(8)
    assert BatchAugment()(images, _keys(8)) is images


@pytest.mark.parametrize("name", OPERATIONS)
def test_tiny_strength_is_nearly_the_identity(name: str) -> None:
    images = _noise(8)
    changed = _only(name, 1e-4)(images, _keys(8))
    assert changed is not images
    assert (changed.int() - images.int()).abs().max() <= 2


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_acts_on_its_share_of_the_images(name: str) -> None:
    images = _noise(1).expand(1500, -1, -1, -1)
    strength = 8.0 if name == "blur" else STRENGTHS[name]  # blur of under 0.2 pixels does not show in 8 bits
    changed = _only(name, strength, probability=0.3)(images, _keys(1500))
    share = (changed != images).flatten(1).any(1).double().mean().item()
    assert abs(share - 0.3) < 0.04  # standard error 0.012; a draw too small to show may hide a few


# Geometry


@pytest.mark.parametrize(("height", "width"), [(41, 41), (33, 49)])
def test_geometry_equals_torch_affine_grid_on_the_drawn_matrix(height: int, width: int) -> None:
    augment = BatchAugment(rotation=Op(1.0, 30.0), shift=Op(1.0, 0.2), scale=Op(1.0, 0.3), fill=FILL)
    images, keys = _noise(12, height, width), _keys(12)
    matrix = torch.from_numpy(augment._draw_geometry(_Draws(keys), height, width).parameters[:, :6]).reshape(12, 2, 3)
    grid = F.affine_grid(matrix, [12, 3, height, width], align_corners=False)
    fill = torch.tensor(FILL).reshape(1, 3, 1, 1)
    wanted = F.grid_sample(images.double() - fill, grid.double(), align_corners=False) + fill
    assert (augment(images, keys).double() - wanted).abs().max() < 0.51


@pytest.mark.parametrize(("height", "width"), [(41, 41), (31, 61)])
def test_shift_moves_content_right_and_down_by_a_share_of_the_side(height: int, width: int) -> None:
    image = _spot(width // 2, height // 2, height, width)
    augment = BatchAugment(shift=Op(1.0, 0.25), fill=(0, 0, 0))
    keys = _keys(64)
    x, y = _centre_of_light(augment(image.expand(64, -1, -1, -1), keys))
    right, down = x - width // 2, y - height // 2
    assert 0.2 * width < np.abs(right).max() <= 0.25 * width + 0.01
    assert 0.2 * height < np.abs(down).max() <= 0.25 * height + 0.01
    assert (right > 1).any() and (right < -1).any() and abs(np.corrcoef(right, down)[0, 1]) < 0.4
    parameters = augment._draw_geometry(_Draws(keys), height, width).parameters
    np.testing.assert_allclose(right, -parameters[:, 2] * width / 2, atol=0.05)
    np.testing.assert_allclose(down, -parameters[:, 5] * height / 2, atol=0.05)


@pytest.mark.parametrize(("height", "width"), [(41, 41), (41, 61)])
def test_rotation_turns_about_the_centre_by_at_most_its_strength(height: int, width: int) -> None:
    middle_x, middle_y = width // 2, height // 2
    image = _spot(middle_x + 15, middle_y, height, width)
    augment = BatchAugment(rotation=Op(1.0, 40.0), fill=(0, 0, 0))
    x, y = _centre_of_light(augment(image.expand(64, -1, -1, -1), _keys(64)))
    np.testing.assert_allclose(np.hypot(x - middle_x, y - middle_y), 15.0, atol=0.15)
    angle = np.degrees(np.arctan2(y - middle_y, x - middle_x))
    assert 35 < angle.max() < 40.5 and -40.5 < angle.min() < -35


def test_scale_enlarges_and_shrinks_evenly_in_the_logarithm() -> None:
    image = _spot(20 + 10, 20)
    augment = BatchAugment(scale=Op(1.0, 0.5), fill=(0, 0, 0))
    x, y = _centre_of_light(augment(image.expand(256, -1, -1, -1), _keys(256)))
    factor = np.log((x - 20) / 10)
    assert 0.45 < factor.max() < 0.52 and -0.52 < factor.min() < -0.45
    assert abs(factor.mean()) < 0.06
    np.testing.assert_allclose(y, 20, atol=0.05)


def test_what_comes_into_view_has_the_fill_colour() -> None:
    images = _plain(64, (0, 0, 0))
    shrunk = BatchAugment(scale=Op(1.0, 0.7), rotation=Op(1.0, 5.0), fill=FILL)(images, _keys(64))
    corners = shrunk[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    fill = torch.tensor(FILL, dtype=torch.uint8).reshape(3, 1)
    filled = (corners == fill).all(dim=1).all(dim=1)
    assert 0.3 < filled.double().mean().item() < 0.6  # half of the draws shrink
    assert (shrunk[:, :, 12, 12] == 0).all()


def test_a_picture_of_the_fill_colour_stays_as_it_is() -> None:
    augment = BatchAugment(
        rotation=Op(1, 90.0), shift=Op(1, 0.5), scale=Op(1, 0.5), blur=Op(1, 3.0), erasing=Op(1, 0.5), fill=FILL
    )
    images = _plain(16, FILL)
    assert torch.equal(augment(images, _keys(16)), images)


# Colour


def _luma(images: Tensor) -> Tensor:
    return (images * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).reshape(1, 3, 1, 1)).sum(1, keepdim=True)


def test_colour_equals_the_three_operations_in_turn_in_float64() -> None:
    images, keys = _noise(20), _keys(20)
    # Pixels kept far from 0 and 255, so that nothing is clamped on the way.
    images = images // 3 + 80
    augment = BatchAugment(brightness=Op(0.8, 0.2), contrast=Op(0.8, 0.3), saturation=Op(0.8, 0.4))
    drawn = torch.from_numpy(augment._draw_colour(_Draws(keys)).parameters).double().reshape(20, 3, 1, 1, 1)
    # (b c s, b c (1 - s), b (1 - c)) determines the three factors.
    by_both = drawn[:, 0] + drawn[:, 1]
    brightness = by_both + drawn[:, 2]
    contrast, saturation = by_both / brightness, drawn[:, 0] / by_both
    wanted = images.double() * brightness
    wanted = contrast * wanted + (1 - contrast) * _luma(wanted).mean(dim=(2, 3), keepdim=True)
    wanted = saturation * wanted + (1 - saturation) * _luma(wanted)
    assert (augment(images, keys).double() - wanted).abs().max() < 0.51
    for factor, strength in ((brightness, 0.2), (contrast, 0.3), (saturation, 0.4)):
        assert (factor - 1).abs().max() <= strength + 1e-6
        assert (factor - 1).abs().max() > 0.7 * strength
        assert ((factor - 1).abs() < 1e-6).any(), "the images that drew nothing keep the factor 1"


def test_brightness_multiplies_and_clamps() -> None:
    changed = _only("brightness", 0.5)(_plain(200, (100, 40, 250)), _keys(200))[:, :, 0, 0].double()
    assert changed[:, 0].min() >= 50 and changed[:, 0].max() <= 150 and changed[:, 0].std() > 20
    assert changed[:, 2].max() == 255
    assert ((changed[:, 1] / changed[:, 0] - 0.4).abs() < 0.02).all()


def test_saturation_leaves_grey_alone_and_contrast_leaves_plain_pictures_alone() -> None:
    grey = _noise(8)[:, :1].expand(-1, 3, -1, -1).contiguous()
    assert (_only("saturation", 0.9)(grey, _keys(8)).int() - grey.int()).abs().max() <= 1
    plain = _plain(8, (120, 120, 120))
    assert (_only("contrast", 0.9)(plain, _keys(8)).int() - plain.int()).abs().max() <= 1


# Blur and erasing


def test_blur_equals_a_gaussian_convolution() -> None:
    scipy_ndimage = pytest.importorskip("scipy.ndimage")
    images, keys = _noise(6), _keys(6)
    augment = _only("blur", 2.0)
    blurred = augment(images, keys).double().numpy()
    sigmas = []
    for image, result, weights in zip(
        images.numpy(), blurred, augment._draw_blur(_Draws(keys)).parameters, strict=True
    ):
        radius = len(weights) // 2
        sigma = math.sqrt(-0.5 / math.log(weights[radius + 1] / weights[radius])) if weights[radius + 1] else 0.01
        sigmas.append(sigma)
        for channel in range(3):
            wanted = scipy_ndimage.gaussian_filter(
                image[channel].astype(np.float64), sigma, mode="nearest", radius=radius
            )
            assert np.abs(result[channel] - wanted).max() < 0.52
    assert max(sigmas) <= 2.0 and max(sigmas) > 1.0 > min(sigmas)


def test_blur_keeps_the_total_light_of_an_inner_spot() -> None:
    blurred = BatchAugment(blur=Op(1.0, 1.0))(_spot(20, 20).expand(8, -1, -1, -1), _keys(8))
    light = blurred[:, 0].double().sum(dim=(1, 2))
    assert ((light / (9 * 255) - 1).abs() < 0.02).all()


def test_erasing_fills_one_rectangle_of_at_most_its_area() -> None:
    images = _plain(300, (0, 0, 0), 40, 60)
    erased = (_only("erasing", 0.3)(images, _keys(300)) == torch.tensor(FILL).reshape(1, 3, 1, 1)).all(1).numpy()
    areas, ratios = [], []
    for mask in erased:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows) == 0:
            continue
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        tall, wide = len(rows), len(columns)
        assert mask.sum() == tall * wide
        # Edges lie between pixels, so each side may show one more than its length.
        assert (tall - 1) * (wide - 1) <= 0.3 * mask.size
        areas.append(tall * wide / mask.size)
        ratios.append((tall / 40) / (wide / 60))
    assert max(areas) > 0.27 and min(areas) < 0.03 and abs(float(np.mean(areas)) - 0.15) < 0.02
    assert max(ratios) > 2 and min(ratios) < 0.5
    reached = erased.any(axis=0)
    assert reached[3:-3, 3:-3].all() and reached[:, [0, -1]].any() and reached[[0, -1]].any()


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"brightness": Op(0.5, 1.5)}, "augment.brightness.strength=1.5 is above 1"),
        ({"rotation": Op(0.5, 200.0)}, "augment.rotation.strength=200.0 is above 180 (degrees)"),
        ({"fill": (0, 0, 256)}, "is not three numbers in 0..255"),
    ],
)
def test_settings_without_a_meaning_are_refused(arguments: dict[str, typing.Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        BatchAugment(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(("probability", "strength"), [(-0.1, 0.1), (1.1, 0.1), (0.5, -1.0), (0.5, math.nan)])
def test_operations_outside_their_range_are_refused(probability: float, strength: float) -> None:
    with pytest.raises(ValueError, match="augmentation"):
        Op(probability, strength)


def test_float_images_and_missing_keys_are_refused() -> None:
    with pytest.raises(ValueError, match=r"float32 \[2, 3, 8, 8\]; expected uint8"):
        _everything()(torch.zeros(2, 3, 8, 8), _keys(2))
    with pytest.raises(ValueError, match="3 keys were passed for 2 images"):
        _everything()(_noise(2), _keys(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_pixels_of_the_cpu_up_to_rounding() -> None:
    """Measures the greatest difference of a pixel between the two devices; 1 of 255 is allowed."""
    images, keys = _noise(64, 96, 96), _keys(64)
    on_cpu = _everything()(images, keys)
    on_cuda = _everything()(images.cuda(), keys).cpu()
    assert (on_cpu.int() - on_cuda.int()).abs().max() <= 1
