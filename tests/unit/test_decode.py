import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps, features

from tagger.data.decode import FORMATS, DecodeError, decode_image, exif_orientation, sniff_format

Pixels = NDArray[np.uint8]
CAP = 10_000_000
TEAL = (0, 128, 120)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decode(content: bytes, background: tuple[int, int, int] = TEAL, max_pixels: int = CAP) -> Pixels:
    return decode_image(content, background=background, max_pixels=max_pixels)


def picture(width: int = 50, height: int = 34) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    planes = np.stack([127 + 120 * np.sin(x / 7 + c) * np.cos(y / 9 - c) for c in range(3)], axis=-1)
    planes[4:12, 5:20] = (250, 10, 30)
    return Image.fromarray(planes.astype(np.uint8))


def over(colour: Any, alpha: Any, background: tuple[int, int, int] = TEAL) -> Pixels:
    """The compositing formula in float64."""
    share = np.asarray(alpha, np.float64)[..., None] / 255
    return np.rint(np.asarray(colour) * share + np.array(background) * (1 - share)).astype(np.uint8)


# Pillow warns of what it finds in damaged TIFF headers.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

LOSSLESS: list[tuple[str, dict[str, Any]]] = [
    ("PNG", {}),
    ("WebP", {"lossless": True}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_deflate"}),
]
AVIF = [("AVIF", {})] if features.check("avif") else []
EVERY = [*LOSSLESS, ("JPEG", {"quality": 95}), ("JPEG", {"progressive": True}), ("GIF", {}), *AVIF]


@pytest.mark.parametrize(("kind", "options"), LOSSLESS)
def test_lossless_formats_give_their_pixels(kind: str, options: dict[str, Any]) -> None:
    found = decode(encode(picture(), kind, **options))
    assert found.dtype == np.uint8 and found.flags.c_contiguous and found.flags.writeable
    np.testing.assert_array_equal(found, np.asarray(picture()))


@pytest.mark.parametrize(("kind", "options"), EVERY)
def test_every_format_agrees_with_pillow(kind: str, options: dict[str, Any]) -> None:
    content = encode(picture(), kind, **options)
    assert sniff_format(content) == kind
    reference = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.abs(decode(content).astype(int) - reference).max() <= 1


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
def test_jpeg_subsampling_agrees_with_pillow(subsampling: str) -> None:
    content = encode(picture(51, 35), "JPEG", subsampling=subsampling)
    reference = np.asarray(Image.open(io.BytesIO(content)))
    assert np.abs(decode(content).astype(int) - reference).max() <= 1


def test_grey_becomes_three_equal_channels() -> None:
    for kind in ("JPEG", "PNG"):
        content = encode(picture().convert("L"), kind)
        reference = np.asarray(Image.open(io.BytesIO(content)))[..., None].repeat(3, -1)
        assert np.abs(decode(content).astype(int) - reference).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP", "TIFF", *dict(AVIF)])
def test_exif_orientation_is_applied_once(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if kind == "WebP" else {"quality": 95} if kind == "JPEG" else {}
    content = encode(picture(), kind, exif=exif, **options)
    image = Image.open(io.BytesIO(content))
    reference = ImageOps.exif_transpose(image) if kind != "TIFF" else image  # Pillow turns TIFF while loading
    found = decode(content)
    expected = np.asarray(reference.convert("RGB"))
    assert found.shape == expected.shape == ((34, 50, 3) if orientation < 5 else (50, 34, 3))
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert found.flags.c_contiguous


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_read_in_both_byte_orders(order: str) -> None:
    head = b"II*\x00" if order == "<" else b"MM\x00*"
    entries = struct.pack(f"{order}HHIHH", 0x010F, 2, 1, 0, 0) + struct.pack(f"{order}HHIHH", 0x0112, 3, 1, 6, 0)
    block = head + struct.pack(f"{order}I", 8) + struct.pack(f"{order}H", 2) + entries
    assert exif_orientation(block) == 6
    assert exif_orientation(b"Exif\x00\x00" + block) == 6
    assert exif_orientation(block.replace(struct.pack(f"{order}HH", 6, 0), struct.pack(f"{order}HH", 9, 0))) == 1


@given(st.binary(max_size=200))
def test_broken_exif_means_upright(noise: bytes) -> None:
    for head in (b"", b"II*\x00", b"Exif\x00\x00MM\x00*"):
        assert 1 <= exif_orientation(head + noise) <= 8


def test_rgba_is_composited_on_the_background() -> None:
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)
    for kind, options in (("PNG", {}), ("WebP", {"lossless": True, "exact": True}), ("TIFF", {})):
        found = decode(encode(Image.fromarray(samples, "RGBA"), kind, **options))
        np.testing.assert_array_equal(found, over(samples[..., :3], samples[..., 3]))


def test_grey_with_alpha_is_composited_on_the_background() -> None:
    samples = np.random.default_rng(1).integers(0, 256, (20, 30, 2), dtype=np.uint8)
    found = decode(encode(Image.fromarray(samples, "LA"), "PNG"))
    np.testing.assert_array_equal(found, over(samples[..., :1].repeat(3, -1), samples[..., 1]))


def test_palette_with_transparency_is_composited_on_the_background() -> None:
    image = Image.new("P", (4, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    image.putdata([0, 1, 2, 3])
    plain = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]
    np.testing.assert_array_equal(decode(encode(image, "PNG"))[0], plain)
    one = decode(encode(image, "PNG", transparency=1))[0]
    np.testing.assert_array_equal(one, [plain[0], TEAL, *plain[2:]])
    levels = decode(encode(image, "PNG", transparency=bytes([255, 0, 128, 255])))[0]
    np.testing.assert_array_equal(levels, over(plain, [255, 0, 128, 255]))
    gif = decode(encode(image, "GIF", transparency=2))[0]
    np.testing.assert_array_equal(gif, [*plain[:2], TEAL, plain[3]])


def test_a_transparent_colour_is_composited_on_the_background() -> None:
    rgb = Image.new("RGB", (2, 1), (1, 2, 3))
    rgb.putpixel((1, 0), (9, 9, 9))
    np.testing.assert_array_equal(decode(encode(rgb, "PNG", transparency=(9, 9, 9)))[0], [(1, 2, 3), TEAL])
    grey = Image.new("L", (2, 1), 5)
    grey.putpixel((1, 0), 7)
    np.testing.assert_array_equal(decode(encode(grey, "PNG", transparency=7))[0], [(5, 5, 5), TEAL])


def test_cmyk_follows_the_convention_of_each_format() -> None:
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:, :8] = (0, 255, 255, 0)  # red
    inks[:, 8:] = (0, 0, 0, 255)  # black
    image = Image.fromarray(inks, "CMYK")
    for kind, options in (("JPEG", {"quality": 100}), ("TIFF", {})):
        found = decode(encode(image, kind, **options)).astype(int)
        assert np.abs(found[:, :8] - (255, 0, 0)).max() <= 2, kind
        assert np.abs(found[:, 8:]).max() <= 2, kind


def test_cmyk_jpeg_agrees_with_pillow() -> None:
    content = encode(picture().convert("CMYK"), "JPEG", quality=90)
    reference = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.abs(decode(content).astype(int) - reference).max() <= 1


def png(depth: int, colour: int, rows: bytes, width: int, height: int, chunks: bytes = b"") -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    extra = chunk(b"tRNS", chunks) if chunks else b""
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + body + chunk(b"IEND", b"")


def test_16_bit_grey_is_scaled_not_cut_off() -> None:
    samples = np.array([[0, 255, 256, 32768, 40000, 65535]], dtype=np.uint16)
    expected = np.rint(samples / 257)[..., None].repeat(3, -1)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(samples), "PNG")), expected)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(samples), "TIFF")), expected)


def test_16_bit_grey_with_a_transparent_value_is_composited() -> None:
    rows = b"\x00" + struct.pack(">3H", 0, 40000, 65535)
    found = decode(png(16, 0, rows, 3, 1, struct.pack(">H", 40000)))
    np.testing.assert_array_equal(found[0], [(0, 0, 0), TEAL, (255, 255, 255)])


def test_16_bit_colour_and_alpha_are_scaled() -> None:
    rgb = b"\x00" + struct.pack(">6H", 0, 32896, 65535, 65535, 0, 257 * 40)
    assert np.abs(decode(png(16, 2, rgb, 2, 1))[0].astype(int) - [(0, 128, 255), (255, 0, 40)]).max() <= 1
    rgba = b"\x00" + struct.pack(">8H", 65535, 65535, 65535, 0, 65535, 0, 0, 65535)
    np.testing.assert_array_equal(decode(png(16, 6, rgba, 2, 1))[0], [TEAL, (255, 0, 0)])
    grey = b"\x00" + struct.pack(">4H", 65535, 0, 257 * 90, 65535)
    np.testing.assert_array_equal(decode(png(16, 4, grey, 2, 1))[0], [TEAL, (90, 90, 90)])


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_grey_of_few_bits_reaches_white(depth: int) -> None:
    found = decode(png(depth, 0, b"\x00\xff", 8 // depth, 1))
    assert (found == 255).all()


def test_samples_without_a_defined_white_are_refused() -> None:
    for mode in ("I", "F"):
        with pytest.raises(DecodeError, match="more than 16 bits"):
            decode(encode(Image.new(mode, (4, 4)), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WebP", "TIFF", *dict(AVIF)])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (12, 10), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options: dict[str, Any] = {"lossless": True} if kind == "WebP" else {}
    found = decode(encode(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert np.abs(found.astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize(("kind", "options"), EVERY)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_refused_whole(kind: str, options: dict[str, Any], share: float) -> None:
    content = encode(picture(200, 150), kind, **options)
    with pytest.raises(DecodeError):
        decode(content[: int(len(content) * share)])


def test_truncation_is_named_alike_in_most_formats() -> None:
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF"):
        content = encode(picture(200, 150), kind)
        with pytest.raises(DecodeError) as caught:
            decode(content[: len(content) // 2])
        assert caught.value.reason == "truncated", kind


def test_a_truncated_cmyk_jpeg_is_refused() -> None:
    content = encode(picture(200, 150).convert("CMYK"), "JPEG")
    with pytest.raises(DecodeError, match="truncated"):
        decode(content[: len(content) // 2])


def test_a_jpeg_with_a_broken_segment_is_refused() -> None:
    content = encode(picture(200, 150), "JPEG")
    half = len(content) // 2
    with pytest.raises(DecodeError, match="damaged JPEG"):
        decode(content[:half] + b"\xff\xd9")


def test_bytes_after_the_image_do_no_harm() -> None:
    for kind in ("JPEG", "PNG", "GIF", "WebP"):
        content = encode(picture(), kind)
        np.testing.assert_array_equal(decode(content + b"\x00junk" * 5), decode(content))


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    side = 40_000
    rows = zlib.compress(b"\x00" * (1 << 20))
    bomb = png(8, 2, rows, side, side)
    with pytest.raises(DecodeError, match="too many pixels") as caught:
        decode(bomb, max_pixels=200_000_000)
    assert caught.value.reason == "too many pixels"


@pytest.mark.parametrize(("kind", "options"), EVERY)
def test_the_pixel_cap_is_exact_for_every_format(kind: str, options: dict[str, Any]) -> None:
    content = encode(picture(), kind, **options)
    decode(content, max_pixels=50 * 34)
    with pytest.raises(DecodeError, match="too many pixels"):
        decode(content, max_pixels=50 * 34 - 1)


def test_all_forms_of_webp_are_measured_before_decoding() -> None:
    image = picture(123, 45)
    for form in (image, image.convert("RGBA")):
        for options in ({"quality": 80}, {"lossless": True}, {"exif": b"Exif\x00\x00II*\x00"}):
            content = encode(form, "WebP", **options)
            with pytest.raises(DecodeError, match="123 x 45"):
                decode(content, max_pixels=123 * 45 - 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"<html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "not an image"),
        (b"8BPS\x00\x01", "not an image"),
        (b"P6 2 2 255 ", "not an image"),
        (b"RIFF\x00\x00\x00\x00WAVE", "not an image"),
        (b"RIFF\x00\x00\x00\x00WEBP", "truncated"),
        (b"\x89PNG\r\n\x1a\n", "damaged PNG"),
        (b"\xff\xd8\xff", "damaged JPEG"),
    ],
)
def test_what_is_no_image_is_refused_with_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(content)
    assert caught.value.reason == reason


def test_the_name_of_a_format_is_in_its_first_bytes_only() -> None:
    assert set(FORMATS) == {"JPEG", "PNG", "GIF", "WebP", "BMP", "TIFF", "AVIF"}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_are_decoded_or_refused(data: st.DataObject) -> None:
    kind, options = data.draw(st.sampled_from(EVERY))
    content = bytearray(encode(picture(24, 16), kind, **options))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode(bytes(content), max_pixels=100_000)
    except DecodeError as error:
        assert error.reason and len(str(error)) < 500
    else:
        assert found.ndim == 3 and found.shape[2] == 3 and found.dtype == np.uint8
