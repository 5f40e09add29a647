import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from tagger.files import FormatError
from tagger.preprocess import Preprocess

MAGENTA = (255, 0, 255)


def picture(height: int, width: int) -> NDArray[np.uint8]:
    """Smooth colours with a hard edge: what resizing filters disagree on."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    planes = [127 + 120 * np.sin(x / 9 + c) * np.cos(y / 11 - c) for c in range(3)]
    image = np.stack(planes, axis=-1)
    image[height // 3 : height // 2, width // 4 : width // 2] = (250, 10, 30)
    return image.astype(np.uint8)


def content_of(square: torch.Tensor, size: tuple[int, int]) -> NDArray[np.uint8]:
    side = square.shape[1]
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    return square[:, top : top + size[0], left : left + size[1]].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (333, 333), (500, 90), (20, 30)])
def test_resize_agrees_with_pillow_bicubic(height: int, width: int) -> None:
    image = picture(height, width)
    square, size = Preprocess(image_size=112).apply(image)
    reference = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
    difference = np.abs(content_of(square, size).astype(int) - reference.astype(int))
    assert difference.max() <= 1


def test_the_content_is_centred_on_the_background() -> None:
    square, size = Preprocess(image_size=64, background=MAGENTA).apply(np.zeros((50, 100, 3), np.uint8))
    assert size == (32, 64)
    assert square.shape == (3, 64, 64)
    bars = torch.cat([square[:, :16], square[:, 48:]], dim=1)
    assert all((bars[c] == MAGENTA[c]).all() for c in range(3))
    assert (square[:, 16:48] == 0).all()


def test_every_pixel_of_the_place_is_written() -> None:
    preprocess = Preprocess(image_size=32, background=MAGENTA)
    image = picture(40, 23)
    clean, dirty = np.zeros((3, 32, 32), np.uint8), np.full((3, 32, 32), 77, np.uint8)
    assert preprocess.apply_into(image, clean) == preprocess.apply_into(image, dirty)
    np.testing.assert_array_equal(clean, dirty)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40))
def test_mirroring_the_square_is_mirroring_the_content(height: int, width: int, side: int) -> None:
    preprocess = Preprocess(image_size=side, background=MAGENTA)
    image = picture(height, width)
    plain, mirrored = np.empty((3, side, side), np.uint8), np.empty((3, side, side), np.uint8)
    assert preprocess.apply_into(image, plain) == preprocess.apply_into(image, mirrored, mirror=True)
    np.testing.assert_array_equal(plain[:, :, ::-1], mirrored)


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 1024))
def test_the_aspect_ratio_is_kept_to_a_pixel(height: int, width: int, side: int) -> None:
    found = Preprocess(image_size=side).content_size(height, width)
    assert max(found) == side
    assert min(found) >= 1
    assert all((side - length) % 2 == 0 for length in found)
    scale = side / max(height, width)
    for length, exact in zip(found, (height * scale, width * scale), strict=True):
        assert abs(length - exact) <= 1 or length <= 2


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    image = picture(48, 48)
    square, size = Preprocess(image_size=48).apply(image)
    assert size == (48, 48)
    np.testing.assert_array_equal(square.permute(1, 2, 0).numpy(), image)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.booleans())
def test_mirroring_a_bucket_is_mirroring_the_content(height: int, width: int, elsewhere: bool) -> None:
    preprocess = Preprocess.create(35, "buckets", 5, MAGENTA)
    image = picture(height, width)
    shape = preprocess.shapes[0] if elsewhere else preprocess.shape_of(height, width)
    plain, mirrored = np.empty((3, *shape), np.uint8), np.empty((3, *shape), np.uint8)
    size = preprocess.apply_into(image, plain)
    assert size == preprocess.apply_into(image, mirrored, mirror=True) == preprocess.content_size(height, width, shape)
    np.testing.assert_array_equal(plain[:, :, ::-1], mirrored)
    if not elsewhere:
        alone, alone_size = preprocess.apply(image)
        np.testing.assert_array_equal(alone.numpy(), plain)
        assert alone_size == size


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([224, 384, 448]))
def test_a_bucket_is_filled_or_one_side_is_and_nothing_is_stretched_by_more_than_5_percent(
    height: int, width: int, image_size: int
) -> None:
    preprocess = Preprocess.create(image_size, "buckets", 16)
    shape = preprocess.shape_of(height, width)
    found = preprocess.content_size(height, width)
    assert all(1 <= length <= side and (side - length) % 2 == 0 for length, side in zip(found, shape, strict=True))
    assert found[0] == shape[0] or found[1] == shape[1]
    down, across = found[0] / height, found[1] / width
    pixel = 1.0 / (min(found) - 1) if min(found) > 2 else np.inf  # rounding to the parity moves it by one at most
    assert min(down, across) / max(down, across) >= 0.95 / (1 + pixel)


def test_a_bucketed_image_is_pillows_bicubic_of_the_whole_image() -> None:
    image = picture(300, 410)
    preprocess = Preprocess.create(112, "buckets", 16)
    content, size = preprocess.apply(image)
    assert tuple(content.shape[1:]) == size == preprocess.shape_of(300, 410) == (96, 128)
    reference = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
    assert np.abs(content.permute(1, 2, 0).numpy().astype(int) - reference.astype(int)).max() <= 1


def test_an_image_beyond_every_bucket_is_kept_whole_between_bars() -> None:
    preprocess = Preprocess.create(112, "buckets", 16, MAGENTA)
    content, size = preprocess.apply(np.zeros((100, 1000, 3), np.uint8))
    assert content.shape == (3, *preprocess.shapes[-1])
    assert size[1] == content.shape[2]
    assert size[0] == pytest.approx(size[1] * 0.1 / 0.95, abs=1)
    top = (content.shape[1] - size[0]) // 2
    assert (content[0, :top] == 255).all() and (content[:, top : top + size[0]] == 0).all()


def test_buckets_round_trip_and_are_refused_by_older_programs(tmp_path: Path) -> None:
    buckets = Preprocess.create(448, "buckets", 16, MAGENTA)
    buckets.save(tmp_path / "preprocess.json")
    assert Preprocess.load(tmp_path / "preprocess.json") == buckets
    assert buckets.to_json()["format_version"] == 2  # refused by programs that letterbox everything
    letterbox = Preprocess(image_size=448).to_json()
    assert letterbox["fit"] == "letterbox" and "shapes" not in letterbox


def test_json_round_trip_gives_an_equal_object(tmp_path: Path) -> None:
    preprocess = Preprocess(image_size=384, background=MAGENTA, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert Preprocess.from_json(preprocess.to_json()) == preprocess
    preprocess.save(tmp_path / "preprocess.json")
    assert Preprocess.load(tmp_path / "preprocess.json") == preprocess


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "format_version 3"),
        ({"format_version": None}, "format_version None"),
        ({"image_size": "448"}, "image_size"),
        ({"image_size": 0}, "image_size=0"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"std": [0.5, 0.5, 0.0]}, "std"),
        ({"background": [0, 0, 256]}, "background"),
        ({"interpolation": "lanczos"}, "lanczos"),
        ({"fit": "stretch"}, "stretch"),
        ({"decode_scaling": "loose"}, "decode_scaling='loose'"),
        ({"decode_scaling": None}, "decode_scaling=None"),
        ({"fit": "buckets"}, "shapes=None"),
        ({"fit": "buckets", "shapes": []}, "shapes="),
        ({"fit": "buckets", "shapes": [[32, 32, 3]]}, "pairs"),
        ({"fit": "buckets", "shapes": [[32, 0]]}, "pairs"),
        ({"fit": "buckets", "shapes": [[32, 48], [48, 32]]}, "from the tallest to the widest"),
        ({"fit": "letterbox", "shapes": [[32, 32]]}, "fit='letterbox'"),
    ],
)
def test_a_specification_that_cannot_be_followed_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Preprocess.from_json(Preprocess(image_size=32).to_json() | change)


def test_a_refused_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "preprocess.json"
    Preprocess(image_size=32).save(path)
    path.write_text(path.read_text().replace("bicubic", "nearest"))
    with pytest.raises(FormatError, match=r"preprocess\.json.*nearest"):
        Preprocess.load(path)


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Preprocess(image_size=32).image_size = 64  # type: ignore[misc]


COUNT_THREADS = """
import threading
from pathlib import Path
import numpy as np
from tagger.preprocess import Preprocess

found = []

def work():
    def threads():
        return len(list(Path("/proc/self/task").iterdir()))
    before = threads()
    image = np.zeros((1500, 2000, 3), np.uint8)
    Preprocess(image_size=1024).apply_into(image, np.empty((3, 1024, 1024), np.uint8), mirror=True)
    found.append(threads() - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
print(found)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_a_loader_thread_starts_no_team_of_its_own() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "4", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", COUNT_THREADS], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[0]"
