import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from tagger.data import decode_lossless
from tagger.data.decode import DecodeError, DecodeOptions, decode, decode_image, describe_decoder
from tagger.data.decode_jpeg import dct_divisor
from tagger.data.decode_pillow import decode_pillow
from tagger.data.image_header import FORMATS
from tagger.preprocess import Preprocess
from tests.unit.test_decode import CAP, EVERY, TEAL, encode, picture, png

ROOT = Path(__file__).resolve().parents[2]


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def psnr(first: NDArray[Any], second: NDArray[Any]) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((first.astype(float) - second.astype(float)) ** 2))))


# Scaling inside the JPEG decoder


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 2048), st.sampled_from(["safe", "tight", "off"]))
def test_the_divisor_is_the_largest_that_leaves_the_margin(height: int, width: int, side: int, scaling: Any) -> None:
    target = Preprocess(image_size=side).content_size(height, width)
    margin = {"safe": 2, "tight": 1, "off": 10**9}[scaling]
    fitting = [k for k in (2, 4, 8) if height / k >= margin * target[0] and width / k >= margin * target[1]]
    assert dct_divisor((height, width), target, scaling) == max(fitting, default=1)


@pytest.mark.parametrize(("scaling", "shape"), [("off", (333, 500)), ("safe", (167, 250)), ("tight", (84, 125))])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_is_decoded_near_its_target(scaling: Any, shape: tuple[int, int], mode: str) -> None:
    content = encode(picture(500, 333).convert(mode), "JPEG", quality=95)
    preprocess = Preprocess(image_size=112, decode_scaling=scaling)
    found = decode(content, DecodeOptions(TEAL, CAP, scaling), preprocess.content_size)
    assert found.pixels.shape == (*shape, 3) and found.full_size == (333, 500) and not found.partial
    image, size = preprocess.apply(found.pixels, found.full_size)
    full, full_size = preprocess.apply(decode_image(content, max_pixels=CAP))
    assert size == full_size == preprocess.content_size(333, 500)
    assert psnr(image.numpy(), full.numpy()) > (27 if scaling == "tight" else 30)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_target_is_of_the_upright_image(orientation: int) -> None:
    content = encode(picture(400, 160), "JPEG", quality=95, exif=exif(orientation))
    turned = orientation >= 5
    size = (400, 160) if turned else (160, 400)
    # The long side allows 1/4 and the short one 1/2: a target taken the wrong way round would show.
    target = (50, 40) if turned else (40, 50)
    found = decode(content, DecodeOptions(max_pixels=CAP), lambda *_: target)
    assert found.full_size == size and found.pixels.shape[:2] == (size[0] // 2, size[1] // 2)
    halved = decode_image(content, max_pixels=CAP).reshape(size[0] // 2, 2, size[1] // 2, 2, 3).mean((1, 3))
    assert psnr(found.pixels, halved) > 27


def test_other_formats_are_never_scaled() -> None:
    for kind, options in EVERY:
        if kind != "JPEG":
            content = encode(picture(80, 60), kind, **options)
            assert decode_image(content, max_pixels=CAP, target=(5, 6)).shape == (60, 80, 3)


# PNG and WebP against Pillow


def rgba() -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (21, 30, 4), dtype=np.uint8), "RGBA")


PLAIN = [
    ("PNG", "RGB", {}),
    ("PNG", "L", {}),
    ("PNG", "RGBA", {}),
    ("PNG", "RGB", {"exif": exif(6)}),
    ("WebP", "RGB", {"quality": 80}),
    ("WebP", "RGB", {"lossless": True, "exif": exif(8)}),
    ("WebP", "RGBA", {"quality": 80}),
    ("WebP", "RGBA", {"lossless": True, "exact": True}),
]
BEYOND = [
    ("PNG", "P", {}),
    ("PNG", "P", {"transparency": 3}),
    ("PNG", "RGB", {"transparency": (1, 2, 3)}),
    ("PNG", "LA", {}),
    ("PNG", "1", {}),
    ("PNG", "I;16", {}),
    ("PNG", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (30, 21))]}),
    ("WebP", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (30, 21))]}),
]


def stored(kind: str, content: bytes) -> tuple[Any, Any]:
    fast = {"PNG": decode_lossless.decode_png, "WebP": decode_lossless.decode_webp}[kind]
    return fast(content, TEAL, CAP), decode_pillow(content, kind, TEAL, CAP)


@pytest.mark.parametrize(("kind", "mode", "options"), PLAIN)
def test_the_fast_decoder_equals_pillow_to_the_bit(kind: str, mode: str, options: dict[str, Any]) -> None:
    fast, slow = stored(kind, encode(rgba().convert(mode), kind, **options))
    np.testing.assert_array_equal(fast[0], slow[0])
    assert fast[1] == slow[1] and fast[0].flags.writeable


@pytest.mark.parametrize(("kind", "mode", "options"), BEYOND)
def test_what_the_fast_decoder_gets_wrong_is_left_to_pillow(kind: str, mode: str, options: dict[str, Any]) -> None:
    image = Image.new(mode, (30, 21)) if mode == "I;16" else rgba().convert(mode)
    fast, _ = stored(kind, encode(image, kind, **options))
    assert fast is None


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(PLAIN), st.integers(1, 3), st.randoms(use_true_random=False), st.booleans())
def test_a_damaged_file_that_the_fast_decoder_takes_is_as_pillow_sees_it(
    plain: tuple[str, str, dict[str, Any]], flips: int, random: Any, cut: bool
) -> None:
    kind, mode, options = plain
    content = bytearray(encode(rgba().convert(mode), kind, **options))
    for _ in range(flips):
        content[random.randrange(26, len(content))] ^= 1 << random.randrange(8)
    if cut:
        del content[random.randrange(30, len(content)) :]
    try:
        fast, slow = stored(kind, bytes(content))
    except Exception:  # Pillow refuses it: then nothing else may take it
        with contextlib.suppress(DecodeError):  # a canvas above the cap
            decoder = {"PNG": decode_lossless.decode_png, "WebP": decode_lossless.decode_webp}[kind]
            assert decoder(bytes(content), TEAL, CAP) is None
        return
    if fast is not None:
        np.testing.assert_array_equal(fast[0], slow[0])


@pytest.mark.parametrize("missing", ["_HAS_SPNG", "_HAS_WEBP"])
def test_a_build_without_a_codec_gives_the_same_pixels(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [encode(rgba(), kind) for kind in ("PNG", "WebP")]
    expected = [decode_image(content, max_pixels=CAP) for content in contents]
    monkeypatch.setattr(decode_lossless, missing, False)
    for content, pixels in zip(contents, expected, strict=True):
        np.testing.assert_array_equal(decode_image(content, max_pixels=CAP), pixels)


# Truncated images, where they are asked for


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("PNG", {}), ("GIF", {"interlace": False}), ("BMP", {})])
def test_partial_images_are_given_only_where_asked_for_and_say_so(kind: str, options: dict[str, Any]) -> None:
    content = encode(picture(200, 150), kind, **options)
    whole = decode_image(content, max_pixels=CAP)
    half = content[: len(content) * 6 // 10]
    with pytest.raises(DecodeError, match="truncated"):
        decode(half, DecodeOptions(max_pixels=CAP))
    found = decode(half, DecodeOptions(max_pixels=CAP, partial=True))
    assert found.partial and found.pixels.shape == whole.shape
    rows = (found.pixels == whole).all((1, 2))
    good = rows[::-1] if kind == "BMP" else rows  # BMP is stored upside down
    assert good[:40].all() and not good[-10:].any()
    assert not decode(content, DecodeOptions(max_pixels=CAP, partial=True)).partial


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"not an image"])
def test_what_has_no_pixels_is_refused_even_in_part(content: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(content, DecodeOptions(max_pixels=CAP, partial=True))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_less_than_half_is_no_partial_image(kind: str, orientation: int) -> None:
    extra = {"interlace": False} if kind == "GIF" else {} if kind == "BMP" else {"exif": exif(orientation)}
    content = encode(picture(200, 150), kind, **extra)
    start = {"JPEG": content.index(b"\xff\xda") if kind == "JPEG" else 0, "PNG": content.find(b"IDAT")}.get(kind, 800)
    for share in (0.02, 0.1, 0.3):
        end = start + int((len(content) - start) * share)
        with pytest.raises(DecodeError, match="truncated"):
            decode(content[:end], DecodeOptions(max_pixels=CAP, partial=True))


def test_asking_for_parts_does_not_lift_the_cap() -> None:
    with pytest.raises(DecodeError, match="too many pixels"):
        decode(encode(picture(), "PNG"), DecodeOptions(max_pixels=100, partial=True))


# The cap


BOMB = """
import sys, tracemalloc, psutil
from tagger.data.decode import DecodeError, decode_image
content = open(sys.argv[1], "rb").read()
try:
    decode_image(b"\\xff\\xd8\\xff", max_pixels=10)  # import what is imported late
except DecodeError:
    pass
process = psutil.Process()
before = process.memory_info().rss
tracemalloc.start()
try:
    decode_image(content, max_pixels=200_000_000)
except DecodeError as error:
    print(error.reason, tracemalloc.get_traced_memory()[1] < 50e6, process.memory_info().rss - before < 50e6)
"""


@pytest.mark.parametrize("kind", ["PNG", "grey PNG", "interlaced PNG", "GIF", "WebP", "BMP"])
def test_a_bomb_is_refused_before_memory_is_reserved(kind: str, tmp_path: Path) -> None:
    side = 60_000
    if kind.endswith("PNG"):
        content = png(8, 0 if "grey" in kind else 2, bytes(1 << 22), side, side)
        if kind.startswith("interlaced"):
            content = content[:28] + b"\x01" + content[29:]
    elif kind == "GIF":
        content = b"GIF89a" + side.to_bytes(2, "little") * 2 + b"\x80\x00\x00" + bytes(6)
        content += b"," + bytes(4) + side.to_bytes(2, "little") * 2 + b"\x00\x02\x02\x4c\x01\x00;"
    elif kind == "BMP":
        plain = encode(picture(), "BMP")
        content = plain[:18] + side.to_bytes(4, "little") * 2 + plain[26:]
    else:
        plain = encode(rgba(), "WebP", exif=exif(1))
        content = plain[:24] + (side - 1).to_bytes(3, "little") * 2 + plain[30:]
    path = tmp_path / "bomb"
    path.write_bytes(content)
    run = subprocess.run(
        [sys.executable, "-c", BOMB, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout.split() == ["too", "many", "pixels", "True", "True"], run.stdout + run.stderr


def test_the_decoder_is_described_with_what_it_refuses() -> None:
    described = {describe_decoder(DecodeOptions(max_pixels=cap, partial=p)) for cap in (1, 2) for p in (True, False)}
    assert len(described) == 4
    assert describe_decoder(DecodeOptions(dct_scaling="off")) == describe_decoder(DecodeOptions(TEAL))


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match="dct_scaling='loose'"):
        DecodeOptions(dct_scaling="loose")  # type: ignore[arg-type]


def test_formats_are_those_with_a_decoder() -> None:
    assert set(FORMATS) == {"JPEG", "PNG", "GIF", "WebP", "BMP", "TIFF", "AVIF"}


def test_bytes_behind_the_last_pixel_of_a_jpeg_cost_nothing() -> None:
    whole = encode(picture(), "JPEG")
    padded = whole[:-2] + bytes(20) + whole[-2:]
    np.testing.assert_array_equal(decode_image(padded, max_pixels=CAP), decode_image(whole, max_pixels=CAP))
