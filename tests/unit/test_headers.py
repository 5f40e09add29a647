"""Image sizes from headers: those of the decoder, for every format and orientation; nothing else for broken files."""

import os
import pickle
import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from tagger.data import header_columns
from tagger.data.decode import FORMATS, DecodeError, decode_image
from tagger.data.header_columns import ImageHeaders
from tagger.data.headers import HeaderError, parse_header, read_header
from tagger.data.index import open_index
from tagger.files import FormatError

# Pillow's word on damaged TIFF files.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")

PICTURE = Image.effect_noise((31, 17), 60).convert("RGB")


def _encode(kind: str, *, orientation: int = 1, picture: Image.Image = PICTURE, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = BytesIO()
    picture.save(stream, "WEBP" if kind == "WebP" else kind, **({"exif": exif} if orientation > 1 else {}), **options)
    return stream.getvalue()


def _size(content: bytes) -> tuple[int, int]:
    return parse_header(lambda offset, length: content[offset : offset + length], len(content))


SAMPLES = {kind: _encode(kind, orientation=6 if kind in ("JPEG", "PNG", "WebP", "TIFF") else 1) for kind in FORMATS}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", FORMATS)
def test_the_size_is_that_of_the_decoded_image(kind, orientation):
    content = _encode(kind, orientation=orientation)
    height, width, _ = decode_image(content, max_pixels=10_000).shape
    assert _size(content) == (width, height)
    assert {width, height} == {31, 17}


def _late_webp_exif() -> bytes:
    return _encode("WebP", orientation=6, lossless=True)


@pytest.mark.parametrize(
    "content",
    [
        _encode("JPEG", picture=PICTURE.convert("CMYK")),
        _encode("JPEG", progressive=True, icc_profile=bytes(60_000)),
        _encode("PNG", picture=PICTURE.quantize(4), transparency=0),
        _encode("PNG", picture=PICTURE.convert("I;16")),
        _encode("WebP", lossless=True),
        _encode("WebP", picture=PICTURE.convert("RGBA")),
        _late_webp_exif(),
        _encode("WebP", save_all=True, append_images=[PICTURE.rotate(180)]),
        _encode("GIF", save_all=True, append_images=[PICTURE.rotate(180)], comment=b"c" * 600, loop=0),
        _encode("BMP", picture=PICTURE.convert("P")),
    ],
)
def test_variants_have_the_decoders_size(content):
    height, width, _ = decode_image(content, max_pixels=10_000).shape
    assert _size(content) == (width, height)


def test_a_gif_frame_beyond_the_screen_makes_it_larger():
    content = bytearray(_encode("GIF"))
    content[6:10] = struct.pack("<HH", 3, 2)
    assert _size(bytes(content)) == (31, 17)


def test_a_bitmap_may_stand_on_its_head():
    content = bytearray(_encode("BMP"))
    content[22:26] = struct.pack("<i", -17)
    assert _size(bytes(content)) == (31, 17)


def test_headers_far_into_a_file_are_found_without_reading_it(tmp_path):
    content = _encode("JPEG", orientation=8)
    filler = b"".join(b"\xff\xe2" + struct.pack(">H", 65_535) + bytes(65_533) for _ in range(8))
    path = tmp_path / "far.jpg"
    path.write_bytes(content[:2] + filler + content[2:])
    found = read_header(path)
    assert (found.width, found.height, found.reason) == (17, 31, None)
    assert (found.file_size, found.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)


def test_a_text_chunk_before_the_exif_of_a_png_is_passed_over(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("note", "x" * 50_000)
    path = tmp_path / "a.png"
    path.write_bytes(_encode("PNG", orientation=5, pnginfo=text))
    assert (read_header(path).width, read_header(path).height) == (17, 31)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"just text", "not an image"),
        (SAMPLES["JPEG"][:20], "damaged JPEG: no frame header"),
        (SAMPLES["PNG"][:20], "damaged PNG"),
        (SAMPLES["WebP"][:20], "damaged WebP: a file of 20 bytes"),
        (SAMPLES["GIF"][:9], "damaged GIF"),
        (SAMPLES["BMP"][:20], "damaged BMP"),
        (SAMPLES["TIFF"][:6], "damaged TIFF"),
        (SAMPLES["AVIF"][:40], "damaged AVIF"),
        (SAMPLES["PNG"].replace(struct.pack(">II", 31, 17), bytes(8)), "no pixels: PNG of 0 x 0"),
    ],
)
def test_a_broken_header_has_its_reason(content, reason):
    with pytest.raises(HeaderError) as caught:
        _size(content)
    assert caught.value.reason.startswith(reason) and "\n" not in caught.value.reason


@given(
    st.sampled_from(sorted(SAMPLES)),
    st.integers(0, 400),
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 255)), max_size=6),
)
def test_no_damage_escapes_as_another_error(kind, length, changes):
    content = bytearray(SAMPLES[kind][:length])
    for position, value in changes:
        if position < len(content):
            content[position] = value
    try:
        width, height = _size(bytes(content))
    except HeaderError as error:
        assert error.reason
    else:
        assert width > 0 and height > 0


@given(st.sampled_from([SAMPLES[kind][:16] for kind in sorted(SAMPLES)]), st.binary(max_size=120))
def test_no_bytes_behind_a_signature_escape_as_another_error(start, rest):
    try:
        assert min(_size(start + rest)) > 0
    except HeaderError as error:
        assert error.reason


# Over an index


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.with_suffix(".json").write_bytes(b'{"tags": "x"}')


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, kind in enumerate(FORMATS):
        _write(tmp_path / "set" / f"{number}.png", _encode(kind))
    _write(tmp_path / "set/wide.png", _encode("PNG", picture=Image.new("1", (70_000, 1))))
    _write(tmp_path / "set/broken.png", b"\x89PNG\r\n\x1a\n")
    return tmp_path / "set"


def _count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    read = header_columns.read_header
    monkeypatch.setattr(header_columns, "read_header", lambda path: names.append(path.name) or read(path))
    return names


def test_headers_are_read_when_asked_for_and_only_where_files_change(root, monkeypatch):
    index_dir = root.parent / "index"
    assert open_index([root], index_dir).headers is None
    names = _count_reads(monkeypatch)
    headers = open_index([root], index_dir, headers=True).headers
    assert sorted(names) == sorted(path.name for path in root.glob("*.png"))
    assert headers.widths.tolist() == [31] * 7 + [0, 70_000] and headers.widths.dtype == np.uint32
    assert headers.heights.tolist() == [17] * 7 + [0, 1] and not headers.widths.flags.writeable
    assert headers.broken == {7: "damaged PNG: no IHDR chunk"} and headers.num_broken == 1
    names.clear()
    assert open_index([root], index_dir, headers=True).headers.path == headers.path and not names

    (root / "0.png").write_bytes(_encode("JPEG", picture=PICTURE.rotate(90, expand=True)))  # the same sidecar
    (root / "wide.json").unlink()
    _write(root / "a new one.png", _encode("GIF"))
    headers = open_index([root], index_dir, headers=True).headers
    assert sorted(names) == ["0.png", "a new one.png"]
    assert headers.widths.tolist() == [17, *[31] * 7, 0] and headers.widths.dtype == np.uint16
    assert headers.broken == {8: "damaged PNG: no IHDR chunk"}


def test_headers_outlive_updates_that_do_not_ask_for_them(root, monkeypatch):
    index_dir = root.parent / "index"
    open_index([root], index_dir, headers=True)
    for name in ("b", "c"):
        _write(root / f"{name}.png", _encode("BMP"))
        assert open_index([root], index_dir).headers is None
    names = _count_reads(monkeypatch)
    index = open_index([root], index_dir, headers=True)
    assert sorted(names) == ["b.png", "c.png"] and len(index.headers.widths) == len(index) == 11
    anew = open_index([root], root.parent / "anew", headers=True).headers
    assert np.array_equal(anew.widths, index.headers.widths) and anew.broken == index.headers.broken


def test_an_image_that_cannot_be_read_is_looked_for_again(root, monkeypatch):
    index_dir = root.parent / "index"
    read = header_columns.read_header

    def refuse(path):
        if path.name == "2.png":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(header_columns, "read_header", refuse)
    first = open_index([root], index_dir, headers=True).headers
    assert first.broken[2] == "unreadable: Permission denied" and first.widths[2] == 0
    assert open_index([root], index_dir, headers=True).headers.path == first.path
    monkeypatch.setattr(header_columns, "read_header", read)
    assert open_index([root], index_dir, headers=True).headers.widths[2] == 31


def test_headers_travel_to_another_process_with_their_index(root):
    index = open_index([root], root.parent / "index", headers=True)
    again = pickle.loads(pickle.dumps(index))
    assert again.headers.path == index.headers.path and again.headers.widths.tolist() == index.headers.widths.tolist()


def test_damaged_headers_are_refused_by_path_and_read_anew(root):
    index = open_index([root], root.parent / "index", headers=True)
    os.truncate(index.headers.path / "widths.npy", 130)
    with pytest.raises(FormatError, match=r"image headers .* is damaged: widths\.npy"):
        ImageHeaders.load(index.headers.path)
    assert open_index([root], root.parent / "index", headers=True).headers.widths[0] == 31


def test_all_columns_of_a_row_take_120_bytes(tmp_path):
    for number in range(300):
        tags = ", ".join(f"tag{number * 31 % 97 + step}" for step in range(36))
        _write(tmp_path / "set" / f"{number:06}.png", SAMPLES["PNG"])
        (tmp_path / "set" / f"{number:06}.json").write_text(f'{{"tags": "{tags}", "rating": "g"}}')
    index = open_index([tmp_path / "set"], tmp_path / "index", headers=True)
    arena = index.path / "paths.npy"
    names = {"tag_counts"}  # one a tag, not one a row
    columns = [path for path in index.path.rglob("*.npy") if path != arena and path.stem not in names]
    assert sum(path.stat().st_size - 128 for path in columns) / 300 <= 120


def test_a_decoder_and_a_header_agree_on_what_is_no_image():
    for content in (b"", b"just text", b"GIF88a......"):
        with pytest.raises(DecodeError) as decode_error:
            decode_image(content, max_pixels=10)
        with pytest.raises(HeaderError) as header_error:
            _size(content)
        assert header_error.value.reason.startswith(decode_error.value.reason)
