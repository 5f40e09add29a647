"""Scenes of the demo data set: what is in a picture, its tags, and its pixels.

Every tag is read off the finished scene, never off the dice that made it, so it is true of the picture. The tags of a
mirrored scene are the scene's own with `left` and `right` swapped. Refuses nothing: a scene that would be hard to name
(an object half hidden, a position between left and middle) is not drawn at all.
"""

import colorsys
import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

T = TypeVar("T")
Point = tuple[float, float]
Outline = tuple[Point, ...]
Colour = tuple[int, int, int]

SUPERSAMPLING = 4
TRANSPARENT_SEEN_ON: Colour = (255, 255, 255)

# Weights make the long tail: the commonest shape is drawn four to five times as often as the rarest.
SHAPE_WEIGHTS = {
    "arrow": 6.0,
    "circle": 3.4,
    "square": 3.2,
    "fish": 4.0,
    "mug": 3.8,
    "triangle": 2.8,
    "star": 2.6,
    "heart": 2.4,
    "flower": 2.0,
    "crescent": 1.8,
}
LAYOUT_WEIGHTS = {"solo": 0.58, "pair": 0.09, "overlapping_pair": 0.06, "circle_and_square": 0.22, "trio": 0.05}
SIZE_WEIGHTS = {"large": 0.3, "medium": 0.48, "small": 0.22}
# Shares of the picture's short side. The gaps between sizes keep `large` and `small` beyond dispute.
SIZES: dict[str, Point] = {
    "large": (0.74, 0.88),
    "medium": (0.54, 0.62),
    "small": (0.36, 0.4),
    "pair": (0.44, 0.5),
    "trio": (0.4, 0.44),
}
ARROW_TURNS = {"right": 0.28, "left": 0.28, "up": 0.22, "down": 0.22}
TEXTURE_WEIGHTS = {"plain": 0.46, "striped": 0.2, "dotted": 0.18, "checkered": 0.16}
TEXTURE_MIN_SIZE = 0.5
BACKGROUND_VALUES: dict[str, Point] = {"light": (0.88, 1.0), "mid": (0.52, 0.64), "dark": (0.08, 0.2)}
BACKGROUND_WEIGHTS = {"light": 0.6, "mid": 0.2, "dark": 0.2}
# Weight; hue in degrees, saturation and value as ranges.
COLOURS: dict[str, tuple[float, Point, Point, Point]] = {
    "red": (5.0, (-8, 8), (0.78, 0.95), (0.78, 0.95)),
    "blue": (4.5, (210, 228), (0.75, 0.95), (0.75, 0.95)),
    "green": (4.0, (108, 142), (0.65, 0.9), (0.5, 0.75)),
    "yellow": (3.0, (48, 56), (0.8, 0.95), (0.92, 1.0)),
    "purple": (2.4, (272, 290), (0.6, 0.85), (0.6, 0.85)),
    "black": (2.0, (0, 360), (0.0, 0.2), (0.05, 0.13)),
    "white": (1.8, (0, 360), (0.0, 0.02), (0.97, 1.0)),
}
CANVASES: tuple[tuple[int, int], ...] = ((96, 96), (88, 88), (108, 108), (112, 84), (84, 112), (105, 84), (84, 105))


class Dice:
    """Draws that depend on the key alone; built on `Random.random`, whose stream Python promises to keep."""

    def __init__(self, key: str) -> None:
        self._source = random.Random(key)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._source.random()

    def chance(self, probability: float) -> bool:
        return self._source.random() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self._source.random() * len(options))]

    def weighted(self, weights: dict[str, float]) -> str:
        target = self._source.random() * sum(weights.values())
        for name, weight in weights.items():
            target -= weight
            if target < 0:
                return name
        return next(reversed(weights))  # rounding left a crumb


@dataclass(frozen=True)
class Shape:
    """Outlines in a box of -1..1, y downwards; whatever has a direction heads to +x.

    `parts` are filled (True) or cut out (False) in order; `accents` are drawn on top in their own colour; `max_turn`
    degrees either way leave the thing what it is called.
    """

    parts: tuple[tuple[Outline, bool], ...]
    accents: tuple[tuple[Outline, Colour], ...] = ()
    max_turn: float = 180.0


@dataclass(frozen=True)
class Thing:
    """One object: centre and size in pixels of the picture, turn in degrees clockwise, `flipped` before the turn."""

    shape: str
    colour: str
    rgb: Colour
    texture: str
    pitch: float
    centre: Point
    size: float
    turn: float
    flipped: bool = False


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn; later things lie in front. `noise` is a standard deviation (0..255)."""

    width: int
    height: int
    background: tuple[Colour, Colour]
    gradient: str
    transparent: bool
    noise: float
    noise_key: str
    things: tuple[Thing, ...]


def _oval(x: float, y: float, rx: float, ry: float | None = None) -> Outline:
    angles = [2 * math.pi * i / 48 for i in range(48)]
    return tuple((x + rx * math.cos(a), y + (rx if ry is None else ry) * math.sin(a)) for a in angles)


def _box(left: float, top: float, right: float, bottom: float) -> Outline:
    return (left, top), (right, top), (right, bottom), (left, bottom)


def _star() -> Outline:
    radii = [0.98 if i % 2 == 0 else 0.42 for i in range(10)]
    return tuple((r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii))


def _heart() -> Outline:
    points = []
    for i in range(60):
        t = 2 * math.pi * i / 60
        lobes = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((0.96 * math.sin(t) ** 3, -0.06 * lobes - 0.12))
    return tuple(points)


def _petals() -> tuple[tuple[Outline, bool], ...]:
    turns = [2 * math.pi * i / 6 for i in range(6)]
    petals = tuple((_oval(0.6 * math.cos(t), 0.6 * math.sin(t), 0.36), True) for t in turns)
    return (*petals, (_oval(0, 0, 0.5), True))


SHAPES: dict[str, Shape] = {
    "circle": Shape(((_oval(0, 0, 0.92), True),)),
    "square": Shape(((_box(-0.8, -0.8, 0.8, 0.8), True),), max_turn=14),
    "triangle": Shape(((((0.0, -0.96), (0.96, 0.76), (-0.96, 0.76)), True),), max_turn=20),
    "star": Shape(((_star(), True),), max_turn=18),
    "heart": Shape(((_heart(), True),), max_turn=20),
    "flower": Shape(_petals(), ((_oval(0, 0, 0.28), (104, 66, 34)),)),
    "crescent": Shape(((_oval(0, 0, 0.94), True), (_oval(0.42, -0.06, 0.74), False)), max_turn=30),
    "arrow": Shape(
        ((_box(-0.95, -0.27, 0.15, 0.27), True), (((0.02, -0.76), (0.98, 0.0), (0.02, 0.76)), True)), max_turn=13
    ),
    "fish": Shape(
        ((_oval(0.2, 0, 0.77, 0.54), True), (((-0.35, 0.0), (-0.97, -0.58), (-0.82, 0.0), (-0.97, 0.58)), True)),
        ((_oval(0.6, -0.14, 0.13), (250, 250, 250)), (_oval(0.63, -0.14, 0.07), (20, 20, 24))),
        max_turn=16,
    ),
    "mug": Shape(
        (
            (_oval(0.46, 0.06, 0.48, 0.44), True),
            (_oval(0.46, 0.06, 0.26, 0.22), False),
            (_box(-0.84, -0.7, 0.42, 0.62), True),
            (_oval(-0.21, 0.62, 0.63, 0.18), True),
            (_oval(-0.21, -0.7, 0.63, 0.18), True),
        ),
        ((_oval(-0.21, -0.7, 0.52, 0.11), (74, 52, 40)),),
        max_turn=11,
    ),
}
HEADING_TAGS = {"fish": "facing", "mug": "handle", "arrow": "arrow"}


# ---- drawing lots ----


def sample_scene(key: str, *, transparent: bool) -> Scene:
    """The scene of a key, drawn again until it is clear; a scene on a transparent ground is clear on white.

    Layout and size class are drawn once, so that rejection does not thin out the crowded ones.
    """
    dice = Dice(key)
    layout = dice.weighted(LAYOUT_WEIGHTS)
    sizes = dice.weighted(SIZE_WEIGHTS) if layout == "solo" else "trio" if layout == "trio" else "pair"
    while True:
        scene = _throw_scene(dice, key, transparent, layout, SIZES[sizes])
        if _is_clear(scene) and _has_overlap(scene) == (layout == "overlapping_pair"):
            return scene


def _throw_scene(dice: Dice, key: str, transparent: bool, layout: str, sizes: Point) -> Scene:
    width, height = dice.pick(CANVASES)
    short_side = min(width, height)
    things = []
    shapes = [dice.weighted(SHAPE_WEIGHTS) for _ in range(3)]
    if layout == "circle_and_square":
        shapes = ["circle", "square"] if dice.chance(0.5) else ["square", "circle"]
    for shape, (x, y) in zip(shapes, _places(dice, layout), strict=False):
        pixels = short_side * dice.between(*sizes)
        things.append(_throw_thing(dice, shape, (x * width, y * height), pixels, short_side))
    kind = dice.weighted(BACKGROUND_WEIGHTS)
    first = _mix_colour(dice, (0, 360), (0.04, 0.28), BACKGROUND_VALUES[kind])
    drift = dice.between(-24, 24)
    second = tuple(int(min(255, max(0, channel + drift * dice.between(0.4, 1)))) for channel in first)
    return Scene(
        width=width,
        height=height,
        background=(first, (second[0], second[1], second[2])),
        gradient=dice.pick(("vertical", "horizontal")),
        transparent=transparent,
        noise=0.0 if transparent else dice.between(38, 46) if dice.chance(0.1) else dice.pick((0.0, 0.0, 3.0)),
        noise_key=key,
        things=tuple(things),
    )


def _places(dice: Dice, layout: str) -> list[Point]:
    """Centres as shares of width and height."""
    if layout == "solo":
        bands = {"left": (0.18, 0.36), "middle": (0.43, 0.57), "right": (0.64, 0.82)}
        band = bands[dice.weighted({"left": 0.3, "middle": 0.4, "right": 0.3})]
        return [(dice.between(*band), dice.between(0.2, 0.8))]
    if layout == "circle_and_square":
        return [(dice.between(x - 0.04, x + 0.04), dice.between(0.27, 0.73)) for x in (0.27, 0.73)]
    if layout != "trio":
        angle = dice.between(0, 2 * math.pi)
        apart = dice.between(0.13, 0.2) if layout == "overlapping_pair" else dice.between(0.25, 0.3)
        x, y = apart * math.cos(angle), apart * math.sin(angle)
        shift_x, shift_y = dice.between(-0.08, 0.08), dice.between(-0.08, 0.08)
        return [(0.5 + shift_x + x, 0.5 + shift_y + y), (0.5 + shift_x - x, 0.5 + shift_y - y)]
    corners = [(0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)]
    corners.remove(dice.pick(corners))
    return [(dice.between(x - 0.05, x + 0.05), dice.between(y - 0.05, y + 0.05)) for x, y in corners]


def _throw_thing(dice: Dice, shape: str, centre: Point, size: float, short_side: float) -> Thing:
    colour = dice.weighted({name: recipe[0] for name, recipe in COLOURS.items()})
    turn = dice.between(-SHAPES[shape].max_turn, SHAPES[shape].max_turn)
    flipped = dice.chance(0.5)
    if shape == "arrow":
        way = dice.weighted(ARROW_TURNS)
        flipped = way == "left"
        turn += {"right": 0.0, "left": 0.0, "up": -90.0, "down": 90.0}[way]
    return Thing(
        shape=shape,
        colour=colour,
        rgb=_mix_colour(dice, *COLOURS[colour][1:]),
        texture=dice.weighted(TEXTURE_WEIGHTS) if size >= TEXTURE_MIN_SIZE * short_side else "plain",
        pitch=dice.between(0.62, 0.76) if size < 0.7 * short_side else dice.between(0.5, 0.66),
        centre=centre,
        size=size,
        turn=turn,
        flipped=flipped,
    )


def _mix_colour(dice: Dice, hue: Point, saturation: Point, value: Point) -> Colour:
    mixed = colorsys.hsv_to_rgb(dice.between(*hue) % 360 / 360, dice.between(*saturation), dice.between(*value))
    return round(255 * mixed[0]), round(255 * mixed[1]), round(255 * mixed[2])


# ---- reading a scene ----


def tags_of(scene: Scene) -> tuple[str, ...]:
    """The tags of a scene in alphabetical order."""
    tags: set[str] = {("solo", "pair", "trio")[len(scene.things) - 1]}
    short_side = min(scene.width, scene.height)
    for thing in scene.things:
        tags |= {thing.shape, thing.colour}
        if thing.texture != "plain":
            tags.add(thing.texture)
        if thing.shape in HEADING_TAGS:
            tags.add(f"{HEADING_TAGS[thing.shape]}_{_heading(thing)}")
        if thing.size >= SIZES["large"][0] * short_side:
            tags.add("large")
        if thing.size <= SIZES["small"][1] * short_side:
            tags.add("small")
    if len(scene.things) == 1:
        across = scene.things[0].centre[0] / scene.width
        if abs(across - 0.5) >= 0.13:
            tags.add(f"object_on_{'left' if across < 0.5 else 'right'}")
    gap = _circle_to_square(scene)
    if gap is not None and abs(gap) >= 0.2:
        tags.add(f"circle_{'left' if gap > 0 else 'right'}_of_square")
    if _has_overlap(scene):
        tags.add("overlapping")
    if not scene.transparent and max(max(colour) for colour in scene.background) < 90:
        tags.add("dark_background")
    if scene.noise >= 20:
        tags.add("noisy")
    return tuple(sorted(tags))


def mirrored(scene: Scene) -> Scene:
    """The scene seen in a mirror. Its picture is this one's, flipped (noise aside, which is drawn anew)."""
    first, second = scene.background
    things = tuple(
        replace(
            thing,
            centre=(scene.width - thing.centre[0], thing.centre[1]),
            turn=-thing.turn,
            flipped=not thing.flipped,
        )
        for thing in scene.things
    )
    background = (second, first) if scene.gradient == "horizontal" else (first, second)
    return replace(scene, things=things, background=background)


def _heading(thing: Thing) -> str:
    """Where the thing's +x axis points in the picture."""
    x = math.cos(math.radians(thing.turn)) * (-1 if thing.flipped else 1)
    y = math.sin(math.radians(thing.turn)) * (-1 if thing.flipped else 1)
    if abs(x) > abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


def _circle_to_square(scene: Scene) -> float | None:
    """How far right of the only circle the only square lies, in picture widths."""
    circles = [thing.centre[0] for thing in scene.things if thing.shape == "circle"]
    squares = [thing.centre[0] for thing in scene.things if thing.shape == "square"]
    return (squares[0] - circles[0]) / scene.width if len(circles) == len(squares) == 1 else None


def _coverage(scene: Scene) -> list[np.ndarray]:
    """bool [H, W] of each thing as if it stood alone."""
    return [np.asarray(_thing_mask(thing, (scene.width, scene.height), 1)) >= 128 for thing in scene.things]


def _has_overlap(scene: Scene) -> bool:
    masks = _coverage(scene)
    return any((masks[i] & masks[j]).any() for i in range(len(masks)) for j in range(i))


def _is_clear(scene: Scene) -> bool:
    """Whether everything that the tags say can be seen, with no doubt at any border between two tags."""
    masks = _coverage(scene)
    for i, mask in enumerate(masks):
        if mask[[0, -1]].any() or mask[:, [0, -1]].any():
            return False
        for other in range(i + 1, len(masks)):
            near, far = scene.things[other], scene.things[i]
            shared = float((mask & masks[other]).sum()) / mask.sum()
            if shared and not (0.1 <= shared <= 0.32 and near.colour != far.colour and _distance(near, far.rgb) >= 130):
                return False
            if not shared and (_grown(mask) & masks[other]).any():
                return False
    grounds = (TRANSPARENT_SEEN_ON,) if scene.transparent else scene.background
    for thing in scene.things:
        second = thing.rgb if thing.texture == "plain" else _second_colour(thing)
        if any(_distance(thing, ground) < 120 or math.dist(second, ground) < 60 for ground in grounds):
            return False
    gap = _circle_to_square(scene)
    return gap is None or abs(gap) <= 0.06 or abs(gap) >= 0.24


def _distance(thing: Thing, colour: Colour) -> float:
    return math.dist(thing.rgb, colour)


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask two pixels larger all round."""
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MaxFilter(5))) > 0


# ---- pixels ----


def render(scene: Scene) -> Image.Image:
    """The picture, RGB, or RGBA where the ground is transparent. The colour under transparent pixels means nothing."""
    size = (scene.width, scene.height)
    canvas = Image.new("RGB", size) if scene.transparent else _ground(scene)
    covered = Image.new("L", size)
    short_side = min(size)
    for thing in scene.things:
        mask = _thing_mask(thing, size, SUPERSAMPLING).reduce(SUPERSAMPLING)
        if not scene.transparent:
            shadow = Image.new("L", size)
            shadow.paste(mask.point(lambda level: level // 4), (0, round(short_side * 0.03)))
            canvas.paste((0, 0, 0), mask=shadow.filter(ImageFilter.GaussianBlur(short_side * 0.02)))
        canvas.paste(_thing_paint(thing, size), mask=mask)
        covered.paste(255, mask=mask)
    if scene.transparent:
        return _with_alpha(canvas, covered, scene.noise_key)
    return _with_noise(canvas, scene.noise, scene.noise_key) if scene.noise else canvas


def _ground(scene: Scene) -> Image.Image:
    first, second = (np.asarray(colour, dtype=np.float64) for colour in scene.background)
    across = scene.gradient == "horizontal"
    length = scene.width if across else scene.height
    share = (np.arange(length) + 0.5)[:, None] / length
    ramp = np.rint(first + (second - first) * share).astype(np.uint8)
    line = ramp[None, :, :] if across else ramp[:, None, :]
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(line, (scene.height, scene.width, 3))))


def _place(outline: Outline, thing: Thing, scale: int) -> list[Point]:
    cosine, sine = math.cos(math.radians(thing.turn)), math.sin(math.radians(thing.turn))
    side, half = (-1 if thing.flipped else 1), thing.size / 2
    return [
        (
            scale * (thing.centre[0] + half * (cosine * side * x - sine * y)) - 0.5,
            scale * (thing.centre[1] + half * (sine * side * x + cosine * y)) - 0.5,
        )
        for x, y in outline
    ]


def _thing_mask(thing: Thing, size: tuple[int, int], scale: int) -> Image.Image:
    mask = Image.new("L", (size[0] * scale, size[1] * scale))
    pen = ImageDraw.Draw(mask)
    for outline, filled in SHAPES[thing.shape].parts:
        pen.polygon(_place(outline, thing, scale), fill=255 if filled else 0)
    return mask


def _thing_paint(thing: Thing, size: tuple[int, int]) -> Image.Image:
    """The thing's surface all over the picture; its mask cuts it out, so that edges carry no foreign colour."""
    paint = Image.new("RGB", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING), thing.rgb)
    pen = ImageDraw.Draw(paint)
    for outline in _texture(thing):
        pen.polygon(_place(outline, thing, SUPERSAMPLING), fill=_second_colour(thing))
    shade = np.clip((np.arange(size[1] * SUPERSAMPLING) / SUPERSAMPLING - thing.centre[1]) / thing.size + 0.5, 0, 1)
    column = Image.fromarray((shade * 44).astype(np.uint8)[:, None]).resize(paint.size)
    paint.paste((0, 0, 0), mask=column)
    for outline, colour in SHAPES[thing.shape].accents:
        pen.polygon(_place(outline, thing, SUPERSAMPLING), fill=colour)
    return paint.reduce(SUPERSAMPLING)


def _texture(thing: Thing) -> list[Outline]:
    steps = [thing.pitch * i for i in range(-4, 5)]
    if thing.texture == "striped":
        return [_box(-1.1, y - thing.pitch / 4, 1.1, y + thing.pitch / 4) for y in steps]
    if thing.texture == "dotted":
        return [_oval(x, y, thing.pitch * 0.3) for x in steps for y in steps]
    if thing.texture == "checkered":
        cells = [(i, j) for i in range(-4, 5) for j in range(-4, 5) if (i + j) % 2 == 0]
        half = thing.pitch * 0.4
        return [
            _box(x * 2 * half - half, y * 2 * half - half, x * 2 * half + half, y * 2 * half + half) for x, y in cells
        ]
    return []


def _second_colour(thing: Thing) -> Colour:
    """A clear shade of the same colour, so that a texture adds no colour that has a tag."""
    if thing.colour == "yellow":
        return (198, 128, 16)
    if thing.colour == "white":
        return (152, 156, 164)
    if thing.colour == "black":
        return (124, 124, 130)
    red, green, blue = (round(channel + 0.62 * (255 - channel)) for channel in thing.rgb)
    return red, green, blue


def _with_alpha(premultiplied: Image.Image, alpha: Image.Image, key: str) -> Image.Image:
    """RGBA with straight alpha. The hidden colour is loud: a reader that drops alpha instead of blending shows it."""
    cover = np.asarray(alpha, dtype=np.float64)[:, :, None]
    hidden = np.frombuffer(hashlib.shake_256(f"hidden {key}".encode()).digest(3), dtype=np.uint8)
    colour = np.asarray(premultiplied, dtype=np.float64) * 255 / np.maximum(cover, 1)
    rgb = np.where(cover > 0, np.clip(np.rint(colour), 0, 255), hidden)
    return Image.fromarray(np.concatenate([rgb, cover], axis=2).astype(np.uint8))


def _with_noise(picture: Image.Image, deviation: float, key: str) -> Image.Image:
    """Near-normal noise (the sum of four bytes) from a hash, whose bytes no release of any library will change."""
    pixels = np.asarray(picture, dtype=np.float64)
    draws = np.frombuffer(hashlib.shake_256(f"noise {key}".encode()).digest(pixels.size * 4), dtype=np.uint8)
    grain = (draws.reshape(*pixels.shape, 4).sum(axis=3, dtype=np.int64) - 510) / math.sqrt(4 * (256**2 - 1) / 12)
    return Image.fromarray(np.clip(np.rint(pixels + deviation * grain), 0, 255).astype(np.uint8))
