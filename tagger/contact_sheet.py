"""A picture of tagged images: each on a card with its tags, their scores and, where the truth is known, the verdicts.

Drawn with Pillow and the font inside it, so that it looks the same on every machine. A tag in a script that this font
lacks is shown as boxes.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Verdict = Literal["right", "wrong", "missed", "unjudged"]
_Colour = tuple[int, int, int]
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_PAGE: _Colour = (243, 244, 246)
_CARD: _Colour = (255, 255, 255)
_EDGE: _Colour = (222, 225, 230)
_BEHIND_IMAGE: _Colour = (234, 236, 240)
_INK: _Colour = (28, 32, 38)
_FAINT: _Colour = (118, 125, 136)
# Icon and bar: pairs that keep apart in greyscale as well (a verdict also has a shape of its own).
_COLOURS: dict[Verdict, tuple[_Colour, _Colour]] = {
    "right": ((22, 122, 62), (216, 243, 225)),
    "wrong": ((196, 38, 46), (253, 224, 224)),
    "missed": ((140, 147, 158), (238, 240, 243)),
    "unjudged": ((46, 98, 188), (222, 233, 251)),
}

# Lengths in units of one pixel at scale 1.
_MARGIN, _GAP, _PAD = 24, 16, 12
_CARD_WIDTH = 232
_ROW, _BAR_HEIGHT, _ICON, _SCORE_WIDTH = 24, 20, 9, 34
_CAPTION_HEIGHT, _HEADER_HEIGHT = 26, 62
_TITLE_SIZE, _NAME_SIZE, _SMALL_SIZE = 20.0, 13.0, 11.5
_SMOOTH = 4  # shapes are drawn this much larger and reduced, because Pillow draws them with stairs


@dataclass(frozen=True)
class SheetTag:
    """A tag on a card; `score` is a probability, 0..1."""

    name: str
    score: float
    verdict: Verdict = "unjudged"


@dataclass(frozen=True)
class Card:
    """An image, uint8 [H, W, 3] RGB, what it is called, its tags from the top, and how many more there are."""

    image: NDArray[np.uint8]
    caption: str
    tags: tuple[SheetTag, ...]
    num_more: int = 0


def make_card(
    image: NDArray[np.uint8],
    caption: str,
    tag_names: Sequence[str],
    scores: NDArray[np.floating],
    *,
    threshold: float,
    truth: Collection[int] | None = None,
    max_tags: int = 8,
) -> Card:
    """A card from the scores [C] of one image.

    It shows every tag at or above `threshold` and, with `truth` (indices of the tags it should have), those missed.
    """
    shown = {int(index) for index in np.flatnonzero(scores >= threshold)} | set(truth or ())
    ranked = sorted(shown, key=lambda index: (-float(scores[index]), index))
    tags = tuple(
        SheetTag(tag_names[index], float(scores[index]), _judge(index, float(scores[index]) >= threshold, truth))
        for index in ranked[:max_tags]
    )
    return Card(image, caption, tags, len(ranked) - len(tags))


def draw_sheet(
    cards: Sequence[Card], title: str = "", subtitle: str = "", *, columns: int | None = None, scale: float = 2.0
) -> Image.Image:
    """An RGB picture of the cards in rows. `scale` is the number of pixels in a unit; text is 13 units high."""
    if not cards:
        raise ValueError("a contact sheet needs at least one card")
    columns = min(len(cards), columns or _columns_for(len(cards)))
    rows = [cards[start : start + columns] for start in range(0, len(cards), columns)]
    heights = [max(_card_height(card) for card in row) for row in rows]
    judged = any(tag.verdict != "unjudged" for card in cards for tag in card.tags)
    header = _HEADER_HEIGHT if title or subtitle or judged else 0.0
    # The legend does not fit above a single card.
    room = max(columns, 2 if judged else 1)
    width = 2 * _MARGIN + room * _CARD_WIDTH + (room - 1) * _GAP
    pen = _Pen(width, header + 2 * _MARGIN + sum(heights) + (len(rows) - 1) * _GAP, scale)
    if header:
        _draw_header(pen, width, title, subtitle, judged)
    top = _MARGIN + header
    for row, height in zip(rows, heights, strict=True):
        for column, card in enumerate(row):
            _draw_card(pen, card, _MARGIN + column * (_CARD_WIDTH + _GAP), top, height)
        top += height + _GAP
    return pen.picture


def _judge(index: int, predicted: bool, truth: Collection[int] | None) -> Verdict:
    if truth is None:
        return "unjudged"
    if not predicted:
        return "missed"
    return "right" if index in truth else "wrong"


def _columns_for(num_cards: int) -> int:
    if num_cards <= 4:
        return num_cards
    return 4 if num_cards <= 16 else 6


class _Pen:
    """Draws in units on a picture of `scale` pixels a unit."""

    def __init__(self, width: float, height: float, scale: float) -> None:
        self._scale = scale
        self.picture = Image.new("RGB", (self._px(width), self._px(height)), _PAGE)
        self._draw = ImageDraw.Draw(self.picture)
        self._fonts: dict[float, _Font] = {}

    def _px(self, length: float) -> int:
        return round(length * self._scale)

    def _font(self, size: float) -> _Font:
        if size not in self._fonts:
            self._fonts[size] = ImageFont.load_default(size * self._scale)
        return self._fonts[size]

    def text_width(self, text: str, size: float) -> float:
        return self._font(size).getlength(text) / self._scale

    def fitted(self, text: str, width: float, size: float) -> str:
        """The text, its end replaced by dots where it is wider than `width`."""
        if self.text_width(text, size) <= width:
            return text
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            if self.text_width(text[:middle] + "...", size) <= width:
                low = middle
            else:
                high = middle - 1
        return text[:low] + "..."

    def text(self, x: float, middle: float, text: str, size: float, colour: _Colour, *, right: bool = False) -> None:
        """One line, centred vertically on `middle`; `x` is its left end, or its right end."""
        place = (self._px(x), self._px(middle))
        self._draw.text(place, text, fill=colour, font=self._font(size), anchor="rm" if right else "lm")

    def box(self, x: float, y: float, width: float, height: float, radius: float, fill: _Colour) -> None:
        """A filled rectangle with round corners."""
        size = (self._px(width), self._px(height))
        if min(size) > 0:
            self.picture.paste(fill, (self._px(x), self._px(y)), _round_mask(size, self._px(radius)))

    def image(self, pixels: NDArray[np.uint8], x: float, y: float, side: float, radius: float) -> None:
        """An image inside a square whose corners are round."""
        length = self._px(side)
        square = Image.new("RGB", (length, length), _BEHIND_IMAGE)
        picture = Image.fromarray(pixels)
        share = length / max(picture.size)
        size = (max(1, round(picture.width * share)), max(1, round(picture.height * share)))
        # A filter without negative lobes: sharper ones draw dark lines beside the bars of a letterboxed image.
        square.paste(picture.resize(size, Image.Resampling.HAMMING), ((length - size[0]) // 2, (length - size[1]) // 2))
        self.picture.paste(square, (self._px(x), self._px(y)), _round_mask(square.size, self._px(radius)))

    def icon(self, verdict: Verdict, x: float, middle: float) -> None:
        """A check, a cross, a dash or a dot, `_ICON` units wide."""
        strokes: dict[Verdict, list[list[tuple[float, float]]]] = {
            "right": [[(0.02, 0.55), (0.36, 0.86), (0.98, 0.16)]],
            "wrong": [[(0.1, 0.1), (0.9, 0.9)], [(0.1, 0.9), (0.9, 0.1)]],
            "missed": [[(0.05, 0.5), (0.95, 0.5)]],
            "unjudged": [[(0.5, 0.5), (0.5, 0.5)]],
        }
        side = self._px(_ICON) * _SMOOTH
        line = round(side * (0.55 if verdict == "unjudged" else 0.19))
        mask = Image.new("L", (side + line, side + line), 0)
        draw = ImageDraw.Draw(mask)
        for stroke in strokes[verdict]:
            points = [(line / 2 + u * side, line / 2 + v * side) for u, v in stroke]
            draw.line(points, fill=255, width=line, joint="curve")
            for u, v in points:
                draw.ellipse((u - line / 2, v - line / 2, u + line / 2, v + line / 2), fill=255)
        small = mask.resize((round(mask.width / _SMOOTH), round(mask.height / _SMOOTH)), Image.Resampling.BOX)
        corner = (self._px(x + _ICON / 2) - small.width // 2, self._px(middle) - small.height // 2)
        self.picture.paste(_COLOURS[verdict][0], corner, small)


@lru_cache(maxsize=64)  # the cards of a sheet are of a few sizes
def _round_mask(size: tuple[int, int], radius: int) -> Image.Image:
    large = Image.new("L", (size[0] * _SMOOTH, size[1] * _SMOOTH), 0)
    ImageDraw.Draw(large).rounded_rectangle((0, 0, large.width - 1, large.height - 1), radius * _SMOOTH, fill=255)
    return large.resize(size, Image.Resampling.BOX)


def _num_lines(card: Card) -> int:
    return max(1, len(card.tags)) + (1 if card.num_more else 0)


def _card_height(card: Card) -> float:
    caption = _CAPTION_HEIGHT if card.caption else 0
    return _CARD_WIDTH + _PAD / 2 + caption + _num_lines(card) * _ROW + _PAD / 2


def _draw_header(pen: _Pen, width: float, title: str, subtitle: str, judged: bool) -> None:
    legend = _draw_legend(pen, width - _MARGIN, _MARGIN + 12) if judged else width - _MARGIN
    pen.text(_MARGIN, _MARGIN + 12, pen.fitted(title, legend - _MARGIN - _GAP, _TITLE_SIZE), _TITLE_SIZE, _INK)
    pen.text(_MARGIN, _MARGIN + 36, pen.fitted(subtitle, width - 2 * _MARGIN, _NAME_SIZE), _NAME_SIZE, _FAINT)


def _draw_legend(pen: _Pen, right: float, middle: float) -> float:
    """What the icons mean, ending at `right`; gives where it begins."""
    verdicts: tuple[Verdict, ...] = ("missed", "wrong", "right")
    for verdict in verdicts:
        pen.text(right, middle, verdict, _NAME_SIZE, _FAINT, right=True)
        right -= pen.text_width(verdict, _NAME_SIZE) + 6 + _ICON
        pen.icon(verdict, right, middle)
        right -= 18
    return right


def _draw_card(pen: _Pen, card: Card, x: float, y: float, height: float) -> None:
    pen.box(x - 1, y - 1, _CARD_WIDTH + 2, height + 2, 11, _EDGE)
    pen.box(x, y, _CARD_WIDTH, height, 10, _CARD)
    pen.image(card.image, x + 4, y + 4, _CARD_WIDTH - 8, 7)
    y += _CARD_WIDTH + _PAD / 2
    inner = _CARD_WIDTH - 2 * _PAD
    if card.caption:
        pen.text(x + _PAD, y + 9, pen.fitted(card.caption, inner, _SMALL_SIZE), _SMALL_SIZE, _FAINT)
        y += _CAPTION_HEIGHT
    for tag in card.tags:
        _draw_tag(pen, tag, x + _PAD, y + _ROW / 2, inner)
        y += _ROW
    if not card.tags:
        pen.text(x + _PAD, y + _ROW / 2, "no tag", _NAME_SIZE, _FAINT)
    elif card.num_more:
        pen.text(x + _PAD, y + _ROW / 2, f"and {card.num_more} more", _SMALL_SIZE, _FAINT)


def _draw_tag(pen: _Pen, tag: SheetTag, x: float, middle: float, width: float) -> None:
    bar_room = width - _SCORE_WIDTH
    # Never narrower than its round ends and the icon, so that a low score still has a shape.
    length = max(min(tag.score, 1.0) * bar_room, _ICON + 12.0)
    pen.box(x, middle - _BAR_HEIGHT / 2, length, _BAR_HEIGHT, 5, _COLOURS[tag.verdict][1])
    pen.icon(tag.verdict, x + 6, middle)
    name = pen.fitted(tag.name, bar_room - _ICON - 16, _NAME_SIZE)
    pen.text(x + _ICON + 13, middle, name, _NAME_SIZE, _FAINT if tag.verdict == "missed" else _INK)
    pen.text(x + width, middle, f"{tag.score:.2f}", _SMALL_SIZE, _FAINT, right=True)
