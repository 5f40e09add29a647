"""What every page of ours is drawn with: plots as SVG, small copies of images, short figures, and one style.

A page is one file that needs no network: pictures are data URIs, so identifiers of one drawing cannot meet those of
another. The same content gives the same bytes: no dates, no random identifiers. Colours keep apart for people who do
not tell all colours (Okabe and Ito 2008, "Color Universal Design"). Needs the extra `report`.
"""

import base64
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from numpy.typing import NDArray
from PIL import Image

INK, FAINT, BAR = "#1c2026", "#767d88", "#3f6fb5"
# Blue, vermillion, green, orange, purple, sky: those of Okabe and Ito that are told from white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#aa4499", "#56b4e9")
_SVG_STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",
    "svg.hashsalt": "tagsmith",
    "font.size": 9.0,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "legend.frameon": False,
    "text.parse_math": False,
    "legend.fontsize": 8.0,
}


@dataclass(frozen=True)
class Plot:
    """A drawing. name: of a file, without an ending. alt: what it shows, in words. svg: an SVG document."""

    name: str
    title: str
    alt: str
    svg: bytes

    @property
    def source(self) -> str:
        """The drawing as a data URI."""
        return data_uri("image/svg+xml", self.svg)


def draw_svg(draw: Callable[[Axes], None], size: tuple[float, float] = (4.6, 2.6)) -> bytes:
    """What `draw` puts on the axes, as an SVG document; size in inches."""
    with matplotlib.rc_context(_SVG_STYLE), warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box; the words beside a drawing have it.
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
        stream = BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True, dpi=160)
    return stream.getvalue()


def data_uri(kind: str, content: bytes) -> str:
    """Content as the source of an image of a page."""
    return f"data:{kind};base64," + base64.b64encode(content).decode()


def jpeg_uri(pixels: NDArray[np.uint8], side: int) -> str:
    """A data URI of a small copy, at most `side` pixels wide and high; pixels uint8 [H, W, 3]."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    stream = BytesIO()
    image.save(stream, "JPEG", quality=80)
    return data_uri("image/jpeg", stream.getvalue())


def page_environment() -> Environment:
    """What renders pages: everything from outside is escaped, and a name that is missing is an error."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = short_number
    environment.filters["bytes"] = short_bytes
    environment.filters["breakable"] = breakable
    environment.filters["ending"] = lambda name: "/".join(Path(name).parts[-2:])
    return environment


def breakable(name: str) -> Markup:
    """A name, escaped, that may go on in the next line after `_`, `:` and `/`."""
    return Markup("<wbr>").join(escape(part) for part in re.split("(?<=[_:/])", name) if part)


def short_number(value: float) -> str:
    """1234 -> 1,234; 0.4567 -> 0.457."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def short_bytes(value: float) -> str:
    """Decimal: 1234567 -> 1.23 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"


def round_steps(least: float, most: float, at_most: int = 7) -> list[float]:
    """At most so many of 1, 2, 5, 10, 20 ... within a range; none where there are fewer than two."""
    steps = [factor * 10.0**power for power in range(-12, 16) for factor in (1, 2, 5)]
    inside = [step for step in steps if least <= step <= most]
    every = -(-len(inside) // at_most)
    return inside[::every] if len(inside) > 1 else []


def label_axis(axis: Axis, ticks: list[float], shown: Callable[[float], str] = short_number) -> None:
    """Labels at `ticks` alone, whatever the scale of the axis."""
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))


STYLE = """
:root { color-scheme: light; --ink: #1c2026; --faint: #5f6672; --page: #f3f4f6; --card: #fff; --edge: #dee1e6;
  --line: #eceef1; --well: #eaecf0; --bar: #3f6fb5; --link: #1f5fae; --right: #0a7a4c; --wrong: #b8430b; }
@media (prefers-color-scheme: dark) {
  :root { color-scheme: dark; --ink: #e6e9ee; --faint: #a0a8b4; --page: #14171b; --card: #1d2127; --edge: #343a43;
    --line: #2a3038; --well: #2a3038; --bar: #6f9de0; --link: #82b1ff; --right: #57d39a; --wrong: #ff9a5c; }
  .plots img { filter: invert(1) hue-rotate(180deg); }
}
@media print { :root { color-scheme: light; --ink: #000; --faint: #444; --page: #fff; --card: #fff; --line: #ccc;
  --edge: #ccc; --well: #eee; } .plots img { filter: none; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
section { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 1rem 1.2rem;
  margin-top: 1rem; }
.faint { color: var(--faint); }
.figures { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: .8rem 0 0; }
.figures dt { color: var(--faint); font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.35rem; font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: 1rem; }
.plots figure { margin: 0; }
.plots figcaption { font-weight: 600; }
.plots img { width: 100%; height: auto; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem;
  margin-top: 1rem; }
.columns section { margin-top: 0; min-width: 0; }
table { border-collapse: collapse; width: 100%; }
td, th { padding: .15rem .5rem .15rem 0; text-align: left; vertical-align: top; }
td.count, th.count { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bar div { background: var(--bar); height: .7rem; border-radius: 2px; margin-top: .35rem; min-width: 1px; }
td.name, th.name, .path { overflow-wrap: anywhere; }
.path { font-family: ui-monospace, monospace; font-size: .8rem; }
.withheld { font-size: .75rem; padding: .4rem; box-sizing: border-box; color: var(--faint); background: var(--well); }
"""
