"""Draw the demo data set: small pictures of simple things with their sidecars, in the forms found in the wild.

The same seed gives the same bytes for a given Pillow version. A complete set with the same parameters is left alone; an
unfinished or different one is drawn anew, beside the old one, which goes only when the new one is whole. Refuses an
output folder that holds anything this command did not write.
"""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import orjson
import PIL
import psutil
from PIL import Image

from scripts.demo_scene import Dice, render, sample_scene, tags_of
from tagger.command import command, held_back, serve_parent
from tagger.errors import InputError
from tagger.files import FormatError, read_json, write_json
from tagger.options import Parser, output_folder, whole
from tagger.stop import SIGNALS

DEFAULT_OUTPUT = Path("data/demo")
DEFAULT_COUNT = 10000
DEFAULT_SEED = 7
MARKER = ".demo-complete"  # no .json at its end, so that nobody takes it for a sidecar
FORMAT_VERSION = 1
DRAWING_VERSION = 5  # raise it when the pictures change: sets drawn before are then drawn anew
IMAGES_PER_FOLDER = 400
IMAGES_A_TASK = 20  # whoever stops the command waits for the ones that have begun

FILE_WEIGHTS = {"jpeg": 0.5, "turned_jpeg": 0.12, "png": 0.17, "webp": 0.12, "alpha_png": 0.06, "alpha_webp": 0.03}
SUFFIXES = {"jpeg": "jpg", "png": "png", "webp": "webp"}
TAG_FORM_WEIGHTS = {"list": 0.6, "commas": 0.25, "spaces": 0.15}
EXIF_ORIENTATION = 0x0112
# How pixels are stored under each EXIF value, so that a viewer that obeys it shows the picture upright.
STORED_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


class DemoError(InputError):
    """An output folder that this command will not touch; the message says what to do."""


@dataclass(frozen=True)
class Marker:
    """What is written into a set when it is complete; `tag_counts` are images per tag."""

    count: int
    seed: int
    drawing_version: int
    pillow: str
    tag_counts: dict[str, int]


@dataclass(frozen=True)
class DemoSet:
    """What stands in `folder` now; `drawn` is False where it was complete already."""

    folder: Path
    num_images: int
    tag_counts: dict[str, int]
    drawn: bool


def make_demo_dataset(output: Path = DEFAULT_OUTPUT, count: int | None = None, seed: int | None = None) -> DemoSet:
    """Draw `count` images into sub-folders of `output`, or find them there. Raises DemoError for a foreign folder.

    A `count` or `seed` of None is that of the set that stands there, else DEFAULT_COUNT or DEFAULT_SEED.
    """
    standing = _read_marker(output)
    if standing is not None:
        count = standing.count if count is None else count
        seed = standing.seed if seed is None else seed
    count = DEFAULT_COUNT if count is None else count
    seed = DEFAULT_SEED if seed is None else seed
    if count < 1:
        raise DemoError(f"--count {count} is not above 0; the usual set has {DEFAULT_COUNT} images")
    if standing is not None and _is_whole(output, standing, count, seed):
        return DemoSet(output, count, standing.tag_counts, drawn=False)
    if standing is None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DemoError(
            f"{output} holds files that this command did not write; name an empty folder with --output, or remove it"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    _sweep(output)
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        marker = Marker(count, seed, DRAWING_VERSION, PIL.__version__, _draw_all(partial, count, seed))
        write_json(partial / MARKER, {"format_version": FORMAT_VERSION, **asdict(marker)})
        _swap_in(partial, output, count, seed)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return DemoSet(output, count, marker.tag_counts, drawn=True)


def _read_marker(folder: Path) -> Marker | None:
    """The marker of a complete set; None where there is none of ours."""
    path = folder / MARKER
    if not path.is_file():
        return None
    content = read_json(path, "marker of the demo data set", FORMAT_VERSION)
    try:
        return Marker(**{field.name: content[field.name] for field in fields(Marker)})
    except KeyError as error:
        raise FormatError(f"marker of the demo data set {path} lacks {error}; remove {folder}") from error


def _is_whole(folder: Path, marker: Marker, count: int, seed: int) -> bool:
    same = (marker.count, marker.seed, marker.drawing_version) == (count, seed, DRAWING_VERSION)
    return same and sum(len(names) for root, _, names in os.walk(folder) if root != str(folder)) == 2 * count


def _sweep(output: Path) -> None:
    """Remove what killed runs of this command left beside the output."""
    for left in output.parent.glob(f".{output.name}.partial-*"):
        owner = left.name.removeprefix(f".{output.name}.partial-").partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)


def _swap_in(partial: Path, output: Path, count: int, seed: int) -> None:
    """Put the finished set in place by renaming. A set that another process finished meanwhile is as good as ours."""
    standing = _read_marker(output)
    if standing is not None and _is_whole(output, standing, count, seed):
        return
    if not output.exists():
        partial.rename(output)
        return
    retired = partial.with_name(f"{partial.name}-old")
    output.rename(retired)
    partial.rename(output)
    shutil.rmtree(retired)


def _draw_all(folder: Path, count: int, seed: int) -> dict[str, int]:
    starts = range(0, count, IMAGES_A_TASK)
    tag_counts: Counter[str] = Counter()
    pool = ProcessPoolExecutor(min(os.cpu_count() or 1, len(starts), 8), initializer=serve_parent)
    try:
        with held_back(*SIGNALS):
            parts = [
                pool.submit(_draw_part, folder, start, min(start + IMAGES_A_TASK, count), seed) for start in starts
            ]
        for part in parts:
            tag_counts.update(part.result())
    finally:
        pool.shutdown(cancel_futures=True)
    return dict(sorted(tag_counts.items(), key=lambda item: (-item[1], item[0])))


def _draw_part(folder: Path, start: int, stop: int, seed: int) -> Counter[str]:
    place = folder / f"part-{start // IMAGES_PER_FOLDER:02d}"
    place.mkdir(exist_ok=True)
    return Counter(tag for index in range(start, stop) for tag in _draw_one(place, index, seed))


def _draw_one(folder: Path, index: int, seed: int) -> tuple[str, ...]:
    key = f"{seed}/{index}"
    dice = Dice(f"{key}/file")
    kind = dice.weighted(FILE_WEIGHTS)
    form = kind.rpartition("_")[2]
    scene = sample_scene(key, transparent=kind.startswith("alpha"))
    tags = tags_of(scene)
    picture = render(scene)
    path = folder / f"demo_{index:05d}.{SUFFIXES[form]}"
    if form == "jpeg":
        exif = Image.Exif()
        if kind == "turned_jpeg":
            orientation = dice.pick(tuple(STORED_TURN))
            picture = picture.transpose(STORED_TURN[orientation])
            exif[EXIF_ORIENTATION] = orientation
        picture.save(path, quality=int(dice.between(82, 96)), exif=exif)
    elif form == "webp":
        # `exact` keeps the colour under transparent pixels, as PNG does.
        picture.save(path, quality=88, method=4, lossless=scene.transparent, exact=True)
    else:
        picture.save(path, compress_level=6)
    path.with_suffix(".json").write_bytes(orjson.dumps(_sidecar(dice, path.name, tags)))
    return tags


def _sidecar(dice: Dice, filename: str, tags: tuple[str, ...]) -> dict[str, object]:
    forms: dict[str, object] = {"list": list(tags), "commas": ", ".join(tags), "spaces": " ".join(tags)}
    sidecar = {"filename": filename, "tags": forms[dice.weighted(TAG_FORM_WEIGHTS)]}
    return {**sidecar, "rating": "general"} if dice.chance(0.5) else sidecar


@command("nothing is left of an unfinished set")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m scripts.make_demo_dataset",
        description="Draw the demo data set, or leave it alone where it stands.",
        epilog="example: python -m scripts.make_demo_dataset --output data/demo --count 10000 --seed 7",
    )
    parser.add_argument(
        "--output", type=output_folder, default=DEFAULT_OUTPUT, help="folder of the set (default: %(default)s)"
    )
    parser.add_argument("--count", type=whole(), help=f"number of images (default: as it stands, or {DEFAULT_COUNT})")
    parser.add_argument(
        "--seed", type=whole(0), help=f"same seed, same bytes (default: as it stands, or {DEFAULT_SEED})"
    )
    options = parser.parse_args(arguments)
    demo = make_demo_dataset(options.output, options.count, options.seed)
    rarest, fewest = min(demo.tag_counts.items(), key=lambda item: item[1])
    verb = "drew" if demo.drawn else "found"
    print(
        f"{verb} {demo.num_images} images with {len(demo.tag_counts)} tags in {demo.folder} "
        f"(rarest tag: {rarest}, {fewest} images)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
