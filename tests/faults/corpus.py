"""The hostile files, each with its exact expected outcome, in one table: `CASES`.

Images are at most 32 pixels a side and go through index and loader at 32 pixels, so that nothing is resampled and
served pixels can be compared with golden ones, which come from the formulas of the formats and not from a decoder.
"""

import os
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, features

from tests.faults.images import (
    BACKGROUND,
    TURNED,
    adam7,
    alpha_ramp,
    encode,
    exif,
    over,
    patch,
    photo,
    png,
    sixteen_bits,
    without_segment,
)

Pixels = NDArray[np.uint8]
SIDE = 32


@dataclass(frozen=True)
class Served:
    """The image is in the batch, upright, [H, W, 3], each sample within `tolerance` of the golden one."""

    golden: Pixels
    tolerance: int = 0


@dataclass(frozen=True)
class Refused:
    """The loader leaves the image out for this reason; `recorded`: the quarantine keeps evidence of it."""

    reason: str
    recorded: bool = True


@dataclass(frozen=True)
class NotARow:
    """The index gives no row: `where` names the list of its report that holds the file, `kind` the reason."""

    where: str
    kind: str = ""


@dataclass(frozen=True)
class Row:
    """The index has a row with these tags."""

    tags: tuple[str, ...]


Outcome = Served | Refused | NotARow | Row


@dataclass(frozen=True)
class Case:
    """A hostile file: `make(folder)` writes it there under the stem "case" (annotations: as `annotations.json`)."""

    name: str
    make: Callable[[Path], None]
    outcome: Outcome


def image(
    name: str, content: bytes, outcome: Outcome, file: str = "case.png", sidecar: bytes = b'{"tags":["x"]}'
) -> Case:
    """A file of these bytes with a good sidecar."""

    def make(folder: Path) -> None:
        (folder / file).write_bytes(content)
        (folder / "case.json").write_bytes(sidecar)

    return Case(name, make, outcome)


def special(name: str, create: Callable[[Path], None], outcome: Outcome) -> Case:
    """An entry `case.png` that is no regular file, with a good sidecar."""

    def make(folder: Path) -> None:
        (folder / "case.json").write_bytes(b'{"tags":["x"]}')
        create(folder / "case.png")

    return Case(name, make, outcome)


def sidecar(name: str, content: bytes, outcome: Outcome) -> Case:
    """A good image with a sidecar of these bytes."""
    return image(f"sidecar {name}", encode(photo(), "PNG"), outcome, sidecar=content)


def annotation(name: str, path: str, outcome: Outcome) -> Case:
    """An annotation file that names this path, beside one good entry."""

    def make(folder: Path) -> None:
        import json

        entries = [{"filename": "good.png", "tags": ["y"]}, {"filename": path, "tags": ["x"]}]
        (folder / "annotations.json").write_text(json.dumps(entries))

    return Case(f"path {name}", make, outcome)


PHOTO = np.asarray(photo())
CYAN_INK = np.zeros((16, 16, 4), np.uint8)
CYAN_INK[..., 0] = 255
ADOBE = b"\xff\xee\x00\x0eAdobe"


def damaged_or_not() -> list[Case]:
    jpeg, gif = encode(photo(), "JPEG", quality=100, subsampling=0), encode(photo().quantize(16), "GIF")
    good_png, webp = encode(photo(), "PNG"), encode(photo(), "WebP", lossless=True)
    whole = Served(PHOTO)
    near = Served(PHOTO, 6)
    cases: list[Case] = []
    # What Pillow calls a file whose header is cut off differs by format; a PNG less its last bytes has all its pixels.
    other = {("webp", 10): "damaged WebP", ("webp", 50): "damaged WebP", ("webp", 99): "damaged WebP"}
    other[("gif", 10)] = "damaged GIF"
    for share in (10, 50, 99):
        for kind, content in (("jpeg", jpeg), ("png", good_png), ("webp", webp), ("gif", gif)):
            refused = Refused(other.get((kind, share), "truncated"))
            outcome = whole if (kind, share) == ("png", 99) else refused
            cases.append(
                image(f"{kind} cut at {share} %", content[: len(content) * share // 100], outcome, f"case.{kind}")
            )
    zip_file = b"PK\x03\x04" + bytes(40) + b"PK\x05\x06" + bytes(18)
    middle = jpeg.index(b"\xff\xda") + 200
    return [
        *cases,
        image("bomb png", png(8, 2, bytes(1 << 16), 60_000, 60_000), Refused("too many pixels")),
        image(
            "bomb webp",
            patch(encode(photo(), "WebP", exif=exif(1)), 24, b"\xff\xff\x00" * 2),
            Refused("too many pixels"),
        ),
        image(
            "bomb bmp",
            patch(encode(photo(), "BMP"), 18, struct.pack("<ii", 60_000, 60_000)),
            Refused("too many pixels"),
        ),
        image(
            "bomb gif",
            b"GIF89a"
            + b"\x60\xea" * 2
            + b"\x80\0\0"
            + bytes(6)
            + b","
            + bytes(4)
            + b"\x60\xea" * 2
            + b"\0\x02\x02\x4c\x01\0;",
            Refused("too many pixels"),
        ),
        image("bomb jpeg", patch(jpeg, jpeg.index(b"\xff\xc0") + 5, b"\xff\xff" * 2), Refused("too many pixels")),
        image("zero bytes", b"", Refused("empty file")),
        image("only zeros", bytes(5000), Refused("not an image")),
        image("a web page", b"<!doctype html><title>Not found</title>", Refused("not an image"), "case.jpg"),
        image("an svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', Refused("not an image")),
        image("a photoshop file", b"8BPS\x00\x01" + bytes(100), Refused("not an image")),
        image("jpeg named png", jpeg, near, "case.png"),
        image("png named jpg", good_png, whole, "case.jpg"),
        image("webp named gif", webp, whole, "case.gif"),
        image("polyglot png and zip", good_png + zip_file, whole),
        image("polyglot jpeg and pdf", jpeg + b"%PDF-1.4 ...", near, "case.jpg"),
        image(
            "polyglot gif and script", b"GIF89a/*" + bytes(20) + b"*/=1;alert(1)", Refused("damaged GIF"), "case.gif"
        ),
        image("polyglot webp and junk", webp + b"<script>", whole, "case.webp"),
        image("png without end", good_png[:-12], whole),
        image("png header checksum", patch(good_png, 29, b"\0\0\0\0"), Refused("damaged PNG")),
        image("png pixels checksum", patch(good_png, len(good_png) - 16, b"\0\0\0\0"), whole),
        image("png pixels damaged", patch(good_png, len(good_png) // 2, b"\xff" * 20), Refused("damaged PNG")),
        image("png without width", png(8, 2, b"", 0, 5), Refused("no pixels")),
        image(
            "jpeg without height",
            patch(jpeg, jpeg.index(b"\xff\xc0") + 5, b"\0\0"),
            Refused("damaged JPEG"),
            "case.jpg",
        ),
        image("jpeg that ends early", jpeg[:middle] + b"\xff\xd9", Refused("damaged JPEG"), "case.jpg"),
        # Without Huffman tables the standard ones are meant, as in the frames of a film.
        image("jpeg without huffman tables", without_segment(jpeg, 0xC4), near, "case.jpg"),
        image("jpeg without quantisation", without_segment(jpeg, 0xDB), Refused("damaged JPEG"), "case.jpg"),
        image(
            "tiff of floats",
            encode(Image.new("F", (4, 4)), "TIFF"),
            Refused("samples of more than 16 bits"),
            "case.tif",
        ),
        image(
            "tiff with an endless directory",
            b"II*\0\x08\0\0\0\xff\xff" + bytes(40),
            Refused("damaged TIFF"),
            "case.tif",
        ),
    ]


def converted() -> list[Case]:
    plain, ramp = photo(), alpha_ramp()
    rgba = Image.fromarray(np.dstack([PHOTO, ramp]), "RGBA")
    grey = np.asarray(plain.convert("L"))
    grey_rgb = grey[..., None].repeat(3, 2)
    inks = encode(Image.fromarray(CYAN_INK, "CMYK"), "JPEG", quality=100, subsampling=0)
    cyan = np.full((16, 16, 3), (0, 255, 255), np.uint8)
    palette = plain.quantize(16)
    indices, colours = np.asarray(palette), np.array(palette.getpalette()[:48], np.uint8).reshape(-1, 3)
    first = Image.new("RGB", (20, 20), (255, 0, 0))
    later: dict[str, Any] = {"save_all": True, "append_images": [Image.new("RGB", (20, 20), (0, 0, 255))]}
    red = np.full((20, 20, 3), (255, 0, 0), np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    deep = np.linspace(0, 65535, 24 * 32).reshape(24, 32).round().astype(np.uint16)
    deep8 = np.rint(deep / 257).astype(np.uint8)[..., None].repeat(3, 2)
    levels = bytes(range(0, 256, 16))
    cases = [
        image("cmyk jpeg, adobe", inks, Served(cyan, 2), "case.jpg"),
        image("cmyk jpeg, no marker", without_segment(inks, 0xEE), Served(cyan, 2), "case.jpg"),
        # Stored (0, 255, 255, 255) read as YCbCr + K: RGB (178, 0, 225) is 255 less the inverted inks; K is no ink.
        image(
            "ycck jpeg, adobe",
            patch(inks, inks.index(ADOBE) + 15, b"\x02"),
            Served(np.full((16, 16, 3), (77, 255, 30), np.uint8), 3),
            "case.jpg",
        ),
        image("cmyk tiff", encode(Image.fromarray(CYAN_INK, "CMYK"), "TIFF"), Served(cyan), "case.tif"),
        image("16-bit grey png", encode(Image.fromarray(deep), "PNG"), Served(deep8)),
        image("16-bit grey tiff", encode(Image.fromarray(deep), "TIFF"), Served(deep8), "case.tif"),
        image("16-bit rgb png", sixteen_bits(PHOTO), Served(PHOTO)),
        image("16-bit rgba png", sixteen_bits(np.asarray(rgba)), Served(over(PHOTO, ramp), 1)),
        image("16-bit grey and alpha png", sixteen_bits(np.dstack([grey, ramp])), Served(over(grey_rgb, ramp), 1)),
        image("palette png", encode(palette, "PNG"), Served(colours[indices])),
        image(
            "palette and one transparent",
            encode(palette, "PNG", transparency=3),
            Served(over(colours[indices], np.where(indices == 3, 0, 255))),
        ),
        image(
            "palette and levels",
            encode(palette, "PNG", transparency=levels),
            Served(over(colours[indices], np.frombuffer(levels, np.uint8)[indices])),
        ),
        image(
            "palette gif, transparent",
            encode(palette, "GIF", transparency=3),
            Served(over(colours[indices], np.where(indices == 3, 0, 255))),
            "case.gif",
        ),
        image(
            "grey and alpha png",
            encode(Image.fromarray(np.dstack([grey, ramp]), "LA"), "PNG"),
            Served(over(grey_rgb, ramp)),
        ),
        image("rgba png", encode(rgba, "PNG"), Served(over(PHOTO, ramp))),
        image("rgba webp", encode(rgba, "WebP", lossless=True, exact=True), Served(over(PHOTO, ramp)), "case.webp"),
        image("rgba tiff", encode(rgba, "TIFF"), Served(over(PHOTO, ramp)), "case.tif"),
        image(
            "rgb png, a transparent colour",
            png(8, 2, b"\0" + bytes((1, 2, 3, 9, 9, 9)), 2, 1, struct.pack(">3H", 9, 9, 9)),
            Served(np.array([[(1, 2, 3), BACKGROUND]], np.uint8)),
        ),
        image(
            "grey png of 1 bit",
            png(1, 0, b"\0\xa0", 4, 1),
            Served(np.array([[255, 0, 255, 0]], np.uint8)[..., None].repeat(3, 2)),
        ),
        image("interlaced png", adam7(PHOTO), Served(PHOTO)),
        image("grey jpeg", encode(plain.convert("L"), "JPEG", quality=100), Served(grey_rgb, 2), "case.jpg"),
        image(
            "progressive jpeg",
            encode(plain, "JPEG", quality=100, subsampling=0, progressive=True),
            Served(PHOTO, 6),
            "case.jpg",
        ),
        image("animated gif", encode(first, "GIF", **later), Served(red), "case.gif"),
        image("animated webp", encode(first, "WebP", lossless=True, **later), Served(red), "case.webp"),
        image("animated png", encode(first, "PNG", **later), Served(red)),
        image("pages of tiff", encode(first, "TIFF", **later), Served(red), "case.tif"),
        # A profile is not applied: a damaged or foreign one must not move a pixel either.
        image("icc profile png", encode(plain, "PNG", icc_profile=profile), Served(PHOTO)),
        image(
            "icc profile jpeg",
            encode(plain, "JPEG", quality=100, subsampling=0, icc_profile=b"not a profile"),
            Served(PHOTO, 6),
            "case.jpg",
        ),
    ]
    for orientation, turn in TURNED.items():
        content = encode(plain, "JPEG", quality=100, subsampling=0, exif=exif(orientation))
        cases.append(image(f"exif orientation {orientation} jpeg", content, Served(turn(PHOTO), 6), "case.jpg"))
    cases.append(image("exif orientation 9", encode(plain, "PNG", exif=exif(9)), Served(PHOTO)))
    for kind, orientation in (("PNG", 6), ("WebP", 8)):
        options = {"lossless": True} if kind == "WebP" else {}
        content = encode(plain, kind, exif=exif(orientation), **options)
        cases.append(
            image(
                f"exif orientation {orientation} {kind}",
                content,
                Served(TURNED[orientation](PHOTO)),
                f"case.{kind.lower()}",
            )
        )
    if features.check("avif"):
        cases.append(
            image("avif", encode(plain, "AVIF", quality=100, subsampling="4:4:4"), Served(PHOTO, 6), "case.avif")
        )
    return cases


def bind_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def case_collision(folder: Path) -> None:
    for file in ("case.png", "case.PNG"):
        (folder / file).write_bytes(encode(photo(), "PNG"))
    (folder / "case.json").write_bytes(b'{"tags":["x"]}')


def linked_file(path: Path) -> None:
    (path.parent.parent / "elsewhere.bin").write_bytes(encode(photo(), "PNG"))
    path.symlink_to(path.parent.parent / "elsewhere.bin")


def linked_parent(path: Path) -> None:
    path.symlink_to(path.parent, target_is_directory=True)


def odd_name(folder: Path) -> None:
    (folder / "case \n\u202e%s'\".png").write_bytes(encode(photo(), "PNG"))
    (folder / "case \n\u202e%s'\".json").write_bytes(b'{"tags":["x"]}')


def paths() -> list[Case]:
    skipped = NotARow("skipped", "not regular files")
    cases = [
        special("link to itself", lambda path: path.symlink_to(path), skipped),
        special("link to nothing", lambda path: path.symlink_to(path.parent / "gone.png"), skipped),
        special("link to the folder it is in", linked_parent, NotARow("skipped", "links to folders")),
        special("link to a file elsewhere", linked_file, Served(PHOTO)),
        special("a folder named like an image", lambda path: path.mkdir(), NotARow("sidecars_without_image")),
        annotation("that leaves the folder", "../secret.png", NotARow("rejected", "path outside the image folder")),
        annotation("that leaves it later", "a/../../secret.png", NotARow("rejected", "path outside the image folder")),
        annotation("that is absolute", "/etc/passwd.png", NotARow("rejected", "path outside the image folder")),
        annotation(
            "that is absolute on windows", "C:\\secret.png", NotARow("rejected", "path outside the image folder")
        ),
        annotation(
            "on another machine", "\\\\host\\share\\x.png", NotARow("rejected", "path outside the image folder")
        ),
        annotation("with a NUL", "good\0.png", NotARow("rejected", "missing image")),
        annotation("to a file that is not there", "gone.png", NotARow("rejected", "missing image")),
        annotation("that comes twice", "./good.png", NotARow("rejected", "image named twice")),
    ]
    if hasattr(os, "mkfifo"):
        cases += [
            special("fifo", os.mkfifo, skipped),
            special("socket", bind_socket, skipped),
            Case("path with odd characters", odd_name, Served(PHOTO)),
            Case("path that differs in case alone", case_collision, NotARow("rejected", "ambiguous image")),
        ]
    return cases


def sidecars() -> list[Case]:
    def fifo_sidecar(folder: Path) -> None:
        (folder / "case.png").write_bytes(encode(photo(), "PNG"))
        os.mkfifo(folder / "case.json")

    def huge(folder: Path) -> None:
        (folder / "case.png").write_bytes(encode(photo(), "PNG"))
        with (folder / "case.json").open("wb") as stream:
            stream.write(b'{"tags": ["x"], "note": "')
            stream.truncate(100 << 20)

    def rejected(kind: str) -> NotARow:
        return NotARow("rejected", kind)

    texts: Sequence[tuple[str, bytes, Outcome]] = (
        ("with a key twice", b'{"tags":["a"],"tags":["x"]}', rejected("a key given twice")),
        ("with NaN", b'{"tags":["x"],"score":NaN}', rejected("invalid JSON")),
        ("with a byte-order mark", b'\xef\xbb\xbf{"tags":["x"]}', Row(("x",))),
        ("in UTF-16", '{"tags":["x"]}'.encode("utf-16"), rejected("not UTF-8 text")),
        ("in Latin-1", '{"tags":["caf\xe9"]}'.encode("latin-1"), rejected("not UTF-8 text")),
        ("with half a surrogate", b'{"tags":["\\ud800"]}', rejected("invalid JSON")),
        ("of depth 100,000", b'{"tags":' + b"[" * 100_000 + b"]" * 100_000 + b"}", rejected("nested too deeply")),
        ("that is empty", b"", rejected("empty file")),
        ("cut off", b'{"tags":["x"', rejected("invalid JSON")),
        ("with text behind it", b'{"tags":["x"]} {}', rejected("invalid JSON")),
        ("that is a list", b'["x"]', rejected("not a JSON object")),
        ("that is null", b"null", rejected("not a JSON object")),
        ("without tags", b'{"tag":["x"]}', rejected("no 'tags' key")),
        ("with no tag", b'{"tags":[]}', rejected("no tags")),
        ("with a number for tags", b'{"tags":5}', rejected("'tags' is not a list or a string")),
        ("with a tag that is a number", b'{"tags":["x",5]}', rejected("a tag is not a string")),
        ("with a tag that is a list", b'{"tags":["x",["y"]]}', rejected("a tag is not a string")),
        ("with a rating of a wrong type", b'{"tags":["x"],"rating":[1]}', Row(("x",))),
        ("with control characters", b'{"tags":["x\\u0000y"]}', Row(("x y",))),
        ("with a filename that leaves the folder", b'{"tags":["x"],"filename":"../../etc/passwd"}', Row(("x",))),
    )
    cases = [sidecar(name, content, outcome) for name, content, outcome in texts]
    cases.append(Case("sidecar of 100 MB", huge, rejected("too large")))
    if hasattr(os, "mkfifo"):
        cases.append(Case("sidecar that is a fifo", fifo_sidecar, NotARow("images_without_sidecar")))
    return cases


CASES: tuple[Case, ...] = (*damaged_or_not(), *converted(), *paths(), *sidecars())
