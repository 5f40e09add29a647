"""The shapes of the aspect buckets hold what they promise, measured over a fine grid of aspects."""

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagger.data.buckets import aspect_shapes, aspects_of, nearest_shape
from tagger.preprocess import Preprocess

EVEN_MIX = np.exp(np.linspace(np.log(0.5), np.log(2.0), 4001))


def useful_share(image_size: int, patch_size: int, aspects: np.ndarray) -> float:
    """Mean share of the square's pixels that hold content."""
    preprocess = Preprocess.create(image_size, "buckets", patch_size)
    sizes = [preprocess.content_size(100_000, round(100_000 * aspect)) for aspect in aspects]
    return float(np.mean([height * width for height, width in sizes])) / image_size**2


@pytest.mark.parametrize(
    ("image_size", "patch_size"), [(224, 16), (224, 14), (256, 16), (384, 16), (448, 16), (512, 16), (518, 14)]
)
def test_at_least_96_percent_of_the_tokens_are_useful_on_an_even_mix(image_size: int, patch_size: int) -> None:
    assert useful_share(image_size, patch_size, EVEN_MIX) >= 0.96


def test_the_documented_shares() -> None:
    """The table of docs/configuration.md."""
    sizes = (64, 96, 128, 144, 176, 224, 384, 448)
    found = [round(100 * useful_share(size, 16, EVEN_MIX), 1) for size in sizes]
    assert found == [89.5, 90.1, 93.9, 93.7, 97.2, 97.1, 98.8, 99.1]
    letterbox = Preprocess(image_size=448)
    sizes = [letterbox.content_size(100_000, round(100_000 * aspect)) for aspect in EVEN_MIX]
    assert 0.71 < np.mean([height * width for height, width in sizes]) / 448**2 < 0.73


def test_a_square_of_few_patches_says_what_its_bars_cost(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for side in range(11, 40):
        Preprocess.create(side * 16, "buckets", 16)
    Preprocess.create(128, "letterbox", 16)
    assert not caplog.records
    for side in range(3, 10):
        caplog.clear()
        preprocess = Preprocess.create(side * 8, "buckets", 8)
        (line,) = [record.getMessage() for record in caplog.records]
        share = useful_share(side * 8, 8, EVEN_MIX)
        assert f"{side} patches a side" in line and "data.image_size=88" in line and f"{100 * share:.0f} % of" in line
        assert abs(preprocess.useful_share() - share) < 0.002


@pytest.mark.parametrize(("image_size", "patch_size"), [(96, 16), (224, 16), (384, 16), (448, 16), (1024, 16)])
def test_stretch_is_at_most_5_percent_and_nothing_is_cropped(image_size: int, patch_size: int) -> None:
    preprocess = Preprocess.create(image_size, "buckets", patch_size)
    for aspect in EVEN_MIX[::7]:
        height, width = preprocess.content_size(100_000, round(100_000 * aspect))
        stretch = (width / height) / aspect
        assert 0.95 / (1 + 1.5 / min(height, width)) <= stretch <= (1 + 1.5 / min(height, width)) / 0.95


@given(st.integers(3, 90), st.sampled_from([1, 7, 14, 16]))
def test_shapes_are_about_twenty_within_the_budget_and_symmetric(side: int, patch_size: int) -> None:
    shapes = aspect_shapes(side * patch_size, patch_size)
    assert 3 <= len(shapes) <= 21 and len(shapes) % 2 == 1
    assert shapes[len(shapes) // 2] == (side * patch_size, side * patch_size)
    assert [(width, height) for height, width in reversed(shapes)] == list(shapes)
    aspects = [width / height for height, width in shapes]
    assert aspects == sorted(set(aspects)) and aspects[-1] <= 2 / 0.95
    for height, width in shapes:
        assert height % patch_size == width % patch_size == 0
        assert height * width <= (side * patch_size) ** 2


@given(st.integers(1, 60_000), st.integers(1, 60_000))
def test_an_image_goes_to_the_bucket_of_nearest_log_aspect(width: int, height: int) -> None:
    shapes = aspect_shapes(448, 16)
    (found,) = nearest_shape(shapes, aspects_of(np.array([width]), np.array([height])))
    distances = [abs(np.log(width / height) - np.log(shape[1] / shape[0])) for shape in shapes]
    assert distances[found] <= min(distances) + 1e-12
    assert Preprocess.create(448, "buckets", 16).shape_of(height, width) == shapes[found]


def test_an_unknown_size_counts_as_square() -> None:
    shapes = aspect_shapes(448, 16)
    aspects = aspects_of(np.array([0, 0, 700], np.uint16), np.array([0, 300, 0], np.uint16))
    assert [shapes[i] for i in nearest_shape(shapes, aspects)] == [(448, 448)] * 3


@pytest.mark.parametrize(("image_size", "patch_size"), [(32, 16), (50, 16), (16, 16)])
def test_a_square_without_a_second_shape_is_refused(image_size: int, patch_size: int) -> None:
    with pytest.raises(ValueError, match=f"image_size={image_size}.*at least {3 * patch_size}"):
        aspect_shapes(image_size, patch_size)
