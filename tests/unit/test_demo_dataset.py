"""The demo data set: true tags, tags that follow a mirror, every kind of file, the same bytes for a seed."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from orientation_handler import OrientationHandler
from scripts.demo_scene import (
    COLOURS,
    SHAPES,
    SIZES,
    TRANSPARENT_SEEN_ON,
    Scene,
    Thing,
    mirrored,
    render,
    sample_scene,
    tags_of,
)
from scripts.make_demo_dataset import MARKER, DemoError, main, make_demo_dataset
from tagger.data.sidecar import parse_sidecar
from tagger.files import FormatError

ROOT = Path(__file__).resolve().parents[2]
NUM_SAMPLE = 150
scene_keys = st.integers(0, 2**32).map(lambda number: f"test/{number}")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "set"
    make_demo_dataset(folder, count=NUM_SAMPLE, seed=3)
    return folder


def sidecars(folder: Path) -> dict[Path, dict[str, object]]:
    return {path: orjson.loads(path.read_bytes()) for path in sorted(folder.rglob("*.json"))}


def tags_in(path: Path) -> set[str]:
    return set(parse_sidecar(path.read_bytes()).tags)


def digest(folder: Path) -> str:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return hashlib.sha256(b"".join(f"{p.relative_to(folder)}".encode() + p.read_bytes() for p in files)).hexdigest()


def plain_scene(*things: Thing, background: tuple[int, int, int] = (240, 240, 235)) -> Scene:
    return Scene(96, 96, (background, background), "vertical", False, 0.0, "plain", things)


def plain_thing(shape: str, *, flipped: bool = False, turn: float = 0.0, x: float = 48.0, size: float = 44.0) -> Thing:
    return Thing(shape, "red", (220, 30, 30), "plain", 0.5, (x, 48.0), size, turn, flipped)


def swapped(tags: tuple[str, ...]) -> tuple[str, ...]:
    handler = OrientationHandler(ROOT / "configs" / "orientation_map.json", "conservative")
    return tuple(sorted(handler.mirror_tag(tag) for tag in tags))


@settings(max_examples=40, deadline=None)
@given(scene_keys, st.booleans())
def test_a_mirrored_scene_has_the_mirrored_tags(key: str, transparent: bool) -> None:
    scene = sample_scene(key, transparent=transparent)
    assert tags_of(mirrored(scene)) == swapped(tags_of(scene))


@settings(max_examples=15, deadline=None)
@given(scene_keys, st.booleans())
def test_a_mirrored_scene_looks_like_the_flipped_picture(key: str, transparent: bool) -> None:
    scene = sample_scene(key, transparent=transparent)
    quiet = Scene(**{**vars(scene), "noise": 0.0})
    ours = np.asarray(on_white(render(mirrored(quiet))), dtype=np.int64)
    theirs = np.asarray(ImageOps.mirror(on_white(render(quiet))), dtype=np.int64)
    # The polygon filler does not treat left and right edges quite alike: a quarter pixel here and there.
    assert np.abs(ours - theirs).mean() < 2.5


def on_white(picture: Image.Image) -> Image.Image:
    if picture.mode != "RGBA":
        return picture
    ground = Image.new("RGB", picture.size, TRANSPARENT_SEEN_ON)
    ground.paste(picture, mask=picture.getchannel("A"))
    return ground


def test_every_demo_image_may_be_mirrored_by_the_shipped_map() -> None:
    handler = OrientationHandler(ROOT / "configs" / "orientation_map.json", "conservative")
    for number in range(100):
        tags = tags_of(sample_scene(f"map/{number}", transparent=False))
        assert handler.may_mirror(tags), tags


@pytest.mark.parametrize(
    ("shape", "flipped", "turn", "tag"),
    [
        ("arrow", False, 0.0, "arrow_right"),
        ("arrow", True, 0.0, "arrow_left"),
        ("arrow", False, -90.0, "arrow_up"),
        ("arrow", False, 90.0, "arrow_down"),
        ("fish", False, 10.0, "facing_right"),
        ("fish", True, -10.0, "facing_left"),
        ("mug", False, 0.0, "handle_right"),
        ("mug", True, 0.0, "handle_left"),
    ],
)
def test_direction_tags_agree_with_the_pixels(shape: str, flipped: bool, turn: float, tag: str) -> None:
    scene = plain_scene(plain_thing(shape, flipped=flipped, turn=turn))
    assert tag in tags_of(scene)
    pixels = np.asarray(render(scene), dtype=np.int64)
    painted = pixels[..., 0] - pixels[..., 1] > 90
    way = tag.rpartition("_")[2]
    profile = np.trim_zeros(painted.sum(axis=1 if way in {"up", "down"} else 0))
    if way in {"left", "up"}:
        profile = profile[::-1]
    # Read along the direction: an arrow ends in a point, a fish in its body, a mug in its handle.
    end = len(profile) // 8
    back, front = profile[:end].sum(), profile[-end:].sum()
    centre = (profile * np.arange(len(profile))).sum() / profile.sum() / (len(profile) - 1)
    assert front < 0.6 * back if shape == "arrow" else centre > 0.5 if shape == "fish" else centre < 0.5


def test_left_of_is_where_the_circle_is() -> None:
    circle, square = plain_thing("circle", x=25.0, size=36.0), plain_thing("square", x=71.0, size=36.0)
    assert "circle_left_of_square" in tags_of(plain_scene(circle, square))
    assert "circle_right_of_square" in tags_of(mirrored(plain_scene(circle, square)))


def test_no_relation_where_it_is_not_plain() -> None:
    circle, square = plain_thing("circle", x=46.0, size=20.0), plain_thing("square", x=50.0, size=20.0)
    assert not {tag for tag in tags_of(plain_scene(circle, square)) if tag.endswith("_of_square")}
    two = (plain_thing("circle", x=20.0), plain_thing("circle", x=80.0), plain_thing("square", x=50.0))
    assert not {tag for tag in tags_of(plain_scene(*two)) if tag.endswith("_of_square")}


@settings(max_examples=30, deadline=None)
@given(scene_keys)
def test_every_thing_can_be_seen(key: str) -> None:
    """Taking any one thing away changes at least half of the pixels that it would cover alone."""
    scene = Scene(**{**vars(sample_scene(key, transparent=False)), "noise": 0.0})
    full = np.asarray(render(scene), dtype=np.int64)
    for position, thing in enumerate(scene.things):
        others = scene.things[:position] + scene.things[position + 1 :]
        without = np.asarray(render(Scene(**{**vars(scene), "things": others})), dtype=np.int64)
        alone = np.asarray(render(Scene(**{**vars(scene), "things": (thing,), "transparent": True})))[..., 3] > 200
        seen = np.abs(full - without).max(axis=2)[alone] > 40
        assert seen.mean() > 0.5, thing


@settings(max_examples=40, deadline=None)
@given(scene_keys)
def test_tags_name_what_the_scene_holds(key: str) -> None:
    scene = sample_scene(key, transparent=False)
    tags = set(tags_of(scene))
    assert tags & SHAPES.keys() == {thing.shape for thing in scene.things}
    assert tags & COLOURS.keys() == {thing.colour for thing in scene.things}
    assert ("overlapping" in tags) <= (len(scene.things) == 2)
    share = [thing.size / min(scene.width, scene.height) for thing in scene.things]
    assert ("large" in tags) == (max(share) >= SIZES["large"][0])
    assert ("small" in tags) == (min(share) <= SIZES["small"][1])


def test_same_seed_same_bytes(demo: Path, tmp_path: Path) -> None:
    make_demo_dataset(tmp_path / "again", count=NUM_SAMPLE, seed=3)
    make_demo_dataset(tmp_path / "other", count=NUM_SAMPLE, seed=4)
    assert digest(tmp_path / "again") == digest(demo)
    assert digest(tmp_path / "other") != digest(demo)


def test_a_larger_set_begins_with_the_smaller_one(demo: Path, tmp_path: Path) -> None:
    make_demo_dataset(tmp_path / "few", count=20, seed=3)
    for path in (tmp_path / "few").rglob("demo_*"):
        assert path.read_bytes() == (demo / path.relative_to(tmp_path / "few")).read_bytes()


def test_sidecars_stand_beside_their_images(demo: Path) -> None:
    found = sidecars(demo)
    assert len(found) == NUM_SAMPLE
    for path, content in found.items():
        image = path.with_name(str(content["filename"]))
        assert image.is_file()
        assert image.stem == path.stem
        assert content.get("rating") in {None, "general"}
        assert tags_in(path)


def test_every_form_of_file_and_sidecar_occurs(demo: Path) -> None:
    kinds: Counter[str] = Counter()
    for path, content in sidecars(demo).items():
        tags = content["tags"]
        kinds["list" if isinstance(tags, list) else "commas" if "," in str(tags) else "spaces"] += 1
        kinds["rated" if "rating" in content else "unrated"] += 1
        with Image.open(path.with_name(str(content["filename"]))) as picture:
            kinds[f"{picture.format} {picture.mode}"] += 1
            kinds["turned"] += picture.getexif().get(0x0112, 1) != 1
            kinds["landscape" if picture.width > picture.height else "other"] += 1
    expected = {"list", "commas", "spaces", "rated", "unrated", "turned", "landscape", "other"}
    expected |= {"JPEG RGB", "PNG RGB", "PNG RGBA", "WEBP RGB", "WEBP RGBA"}
    assert expected == {kind for kind, number in kinds.items() if number}


def test_turned_jpegs_are_upright_for_a_viewer_that_obeys_exif(demo: Path) -> None:
    orientations = set()
    for path in sidecars(demo):
        image = path.with_suffix(".jpg")
        if not image.is_file():
            continue
        with Image.open(image) as picture:
            orientation = picture.getexif().get(0x0112, 1)
            upright = np.asarray(ImageOps.exif_transpose(picture), dtype=np.int64)
        if orientation == 1:
            continue
        orientations.add(orientation)
        scene = sample_scene(f"3/{int(path.stem.rpartition('_')[2])}", transparent=False)
        drawn = np.asarray(render(scene), dtype=np.int64)
        assert upright.shape == drawn.shape
        assert (
            np.abs(upright - drawn).mean() < 14 + scene.noise / 2
        )  # JPEG loses that much; another orientation, several times that
    assert len(orientations) >= 4


def test_hidden_colour_is_loud_under_transparent_pixels(demo: Path) -> None:
    loud = 0
    for path in sidecars(demo):
        for image in path.parent.glob(f"{path.stem}.*g"):
            with Image.open(image) as picture:
                if picture.mode == "RGBA":
                    pixels = np.asarray(picture, dtype=np.int64)
                    hidden = pixels[pixels[..., 3] == 0][:, :3]
                    loud += bool(np.abs(hidden - 255).mean() > 60)
    assert loud


def test_a_complete_set_is_left_alone(demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    assert not make_demo_dataset(demo, count=NUM_SAMPLE, seed=3).drawn
    assert not make_demo_dataset(demo).drawn
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before


def test_an_unfinished_or_different_set_is_drawn_anew(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    whole = make_demo_dataset(folder, count=12, seed=1)
    content = digest(folder)
    next(folder.rglob("*.json")).unlink()
    assert make_demo_dataset(folder, count=12, seed=1).drawn
    assert digest(folder) == content
    assert make_demo_dataset(folder, count=6, seed=1).num_images == 6
    assert len(sidecars(folder)) == 6
    assert whole.tag_counts["solo"] >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_killed_run_leaves_nothing_that_stays(tmp_path: Path) -> None:
    left = tmp_path / ".set.partial-999999999"
    left.mkdir()
    (left / "demo_00000.png").write_bytes(b"torn")
    make_demo_dataset(tmp_path / "set", count=2, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_foreign_folder_is_refused_untouched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(DemoError, match="did not write"):
        make_demo_dataset(tmp_path, count=2)
    assert main(["--output", str(tmp_path), "--count", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_set_of_a_newer_program_is_refused(tmp_path: Path) -> None:
    make_demo_dataset(tmp_path / "set", count=2, seed=1)
    marker = tmp_path / "set" / MARKER
    marker.write_bytes(orjson.dumps({**orjson.loads(marker.read_bytes()), "format_version": 99}))
    with pytest.raises(FormatError, match="format_version 99"):
        make_demo_dataset(tmp_path / "set", count=2, seed=1)


@pytest.mark.slow
def test_the_usual_set_has_a_long_tail_that_can_be_learnt(tmp_path: Path) -> None:
    demo = make_demo_dataset(tmp_path / "set")
    counts = demo.tag_counts
    assert demo.num_images == len(sidecars(tmp_path / "set")) == 10000
    assert 25 <= len(counts) <= 40
    assert min(counts.values()) >= 60
    assert max(counts.values()) >= 10 * min(counts.values())
    found = Counter(tag for path in sidecars(tmp_path / "set") for tag in tags_in(path))
    assert found == counts
