"""A survey of a data set as one HTML file that needs no network and no script: figures, plots, examples.

Needs the extra `report` (matplotlib draws, Jinja2 writes and escapes). Pictures of near-duplicates are shown as small
copies, except of images that are rated above general.
"""

from collections.abc import Callable
from pathlib import Path

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from tagger.data.decode import RefusedImage, decode_image
from tagger.data.quarantine import read_image_file
from tagger.data.survey import Distribution, Survey
from tagger.files import write_atomic
from tagger.report import SHOWN_RATINGS
from tagger.report.drawing import (
    BAR,
    STYLE,
    Plot,
    draw_svg,
    jpeg_uri,
    page_environment,
    round_steps,
    short_bytes,
    short_number,
)

_THUMBNAIL_SIDE = 96
_LISTED_TAGS = 40


def write_page(survey: Survey, path: Path, *, max_pixels: int) -> None:
    """Write the page; raises OSError where that is not possible. max_pixels: larger images get no small copy."""
    groups = [
        (
            group.size,
            [
                (name, _thumbnail(Path(name), max_pixels) if rating in SHOWN_RATINGS else None, rating)
                for name, rating in group.images
            ],
        )
        for group in (survey.duplicates.largest if survey.duplicates is not None else ())
    ]
    text = (
        page_environment()
        .from_string(_PAGE)
        .render(
            survey=survey,
            plots=_plots(survey),
            tags=survey.tag_counts[:_LISTED_TAGS],
            groups=groups,
            style=Markup(STYLE),
        )
    )
    write_atomic(path, text.encode("utf-8", "backslashreplace"))


def _plots(survey: Survey) -> list[Plot]:
    plots: list[Plot] = []
    for title, label, shown, found in (
        ("Aspect ratio", "width over height", short_number, survey.aspect_ratios),
        ("Size", "megapixels", short_number, survey.megapixels),
        ("File size", "bytes", short_bytes, survey.file_bytes),
        ("Tags an image", "tags", short_number, survey.tags_per_image),
    ):
        if found is not None:
            log = found is not survey.tags_per_image and found.most > 1.2 * found.least > 0
            alt = f"{title}: median {shown(found.median)}, from {shown(found.least)} to {shown(found.most)} {label}"
            plots.append(Plot(label.replace(" ", "-"), title, alt, _histogram(found, label, shown, log=log)))
    if survey.tag_counts:
        most, least = survey.tag_counts[0][1], survey.tag_counts[-1][1]
        alt = f"Images of each tag by rank: {len(survey.tag_counts)} tags, from {most} images down to {least}"
        plots.append(Plot("long-tail", "The long tail", alt, _long_tail([count for _, count in survey.tag_counts])))
    return plots


def _histogram(found: Distribution, label: str, shown: Callable[[float], str], *, log: bool) -> bytes:
    def draw(axes: Axes) -> None:
        left = found.edges[:-1]
        widths = [stop - start for start, stop in zip(left, found.edges[1:], strict=True)]
        axes.bar(left, found.counts, widths, align="edge", color=BAR, edgecolor="white", linewidth=0.4)
        if log:
            axes.set_xscale("log")
            # A range of less than ten has no power of ten to put a label on.
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xticks(round_steps(found.edges[0], found.edges[-1]) or [found.least, found.median, found.most])
        elif found.least == found.most:
            axes.set_xticks([found.least])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
        axes.set_xlabel(label)
        axes.set_ylabel("images")

    return draw_svg(draw)


def _long_tail(counts: list[int]) -> bytes:
    def draw(axes: Axes) -> None:
        axes.plot(range(1, len(counts) + 1), counts, color=BAR, linewidth=1.6)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
            axis.set_minor_formatter(NullFormatter())
        if ticks := round_steps(counts[-1], counts[0]):
            axes.set_yticks(ticks)
        axes.set_xlabel("rank of the tag")
        axes.set_ylabel("images")
        axes.grid(alpha=0.25)

    return draw_svg(draw)


def _thumbnail(path: Path, max_pixels: int) -> str | None:
    """A data URI of a small copy; None where the image is gone or broken by now."""
    try:
        return jpeg_uri(decode_image(read_image_file(path), max_pixels=max_pixels), _THUMBNAIL_SIDE)
    except (RefusedImage, OSError):
        return None


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Data set: {{ survey.roots | join(", ") }}</title>
<style>
{{ style }}
td.bar { width: 38%; }
.group { border-top: 1px solid var(--line); padding: .6rem 0; }
.group ul { display: flex; flex-wrap: wrap; gap: .8rem; list-style: none; margin: .3rem 0 0; padding: 0; }
.group li { width: 7.5rem; }
.group img, .withheld { display: block; width: 96px; height: 96px; object-fit: contain; background: var(--well); }
</style>
</head>
<body>
<main>
<h1>{{ survey.roots | join(", ") }}</h1>
<dl class="figures">
<div><dt>images with tags</dt><dd>{{ survey.num_images | number }}</dd></div>
<div><dt>distinct tags</dt><dd>{{ survey.tag_counts | length | number }}</dd></div>
<div><dt>on disk</dt><dd>{{ survey.total_bytes | bytes }}</dd></div>
{% if survey.duplicates is not none %}
<div><dt>near-duplicates to spare</dt><dd>{{ survey.duplicates.surplus | number }}</dd></div>
{% endif %}
<div><dt>files with problems</dt><dd>{{ survey.problems | sum(attribute="count") | number }}</dd></div>
</dl>

<section>
<h2>Images and tags</h2>
<div class="plots">
{% for plot in plots %}
<figure><figcaption>{{ plot.title }}</figcaption><img src="{{ plot.source }}" alt="{{ plot.alt }}"></figure>
{% endfor %}
</div>
</section>

<div class="columns">
{% for title, counts in (("Formats, by content", survey.formats), ("Ratings", survey.ratings)) %}
<section>
<h2>{{ title }}</h2>
<table>
{% for name, count in counts.items() %}
<tr><td class="name">{{ name }}</td><td class="count">{{ count | number }}</td>
<td class="bar"><div style="width: {{ 100 * count / survey.num_images }}%"></div></td></tr>
{% endfor %}
</table>
</section>
{% endfor %}
</div>

<section>
<h2>Problems</h2>
{% if survey.problems %}
<table>
<tr><th>what</th><th class="count">files</th><th>for example</th></tr>
{% for problem in survey.problems %}
<tr><td>{{ problem.kind }}</td><td class="count">{{ problem.count | number }}</td>
<td class="path">{% for example in problem.examples %}{{ example }}<br>{% endfor %}</td></tr>
{% endfor %}
</table>
{% else %}
<p>None: every image has a sidecar that can be used, and every sidecar an image.</p>
{% endif %}
</section>

<div class="columns">
<section>
<h2>Most frequent tags</h2>
<table>
{% for name, count in tags %}
<tr><td class="name">{{ name }}</td><td class="count">{{ count | number }}</td>
<td class="bar"><div style="width: {{ 100 * count / tags[0][1] }}%"></div></td></tr>
{% endfor %}
</table>
{% if survey.tag_counts | length > tags | length %}
<p class="faint">and {{ (survey.tag_counts | length - tags | length) | number }} more</p>
{% endif %}
</section>
<section>
<h2>Most often together</h2>
<table>
<tr><th>tags</th><th class="count">images</th><th class="count">of the rarer</th></tr>
{% for pair in survey.co_occurring %}
<tr><td class="name">{{ pair.first }} + {{ pair.second }}</td><td class="count">{{ pair.count | number }}</td>
<td class="count">{{ "%.0f %%" | format(100 * pair.share) }}</td></tr>
{% endfor %}
</table>
<h2 style="margin-top: 1rem">Rare tags</h2>
<table>
{% for limit, count in survey.rare_tags.items() if count %}
<tr><td>on fewer than {{ limit }} images</td><td class="count">{{ count | number }} tags</td></tr>
{% else %}
<tr><td>none: each tag is on 100 images or more</td></tr>
{% endfor %}
</table>
</section>
</div>

{% if survey.duplicates is not none %}
<section>
<h2>Near-duplicates</h2>
<p>{{ survey.duplicates.num_groups | number }} groups of {{ survey.duplicates.num_images | number }} images,
connected by {{ survey.duplicates.num_pairs | number }} pairs within {{ survey.duplicates.bits }} bits;
{{ survey.duplicates.num_identical | number }} images have the very hash of another.
<span class="faint">The largest groups follow; judge by eye before you delete anything.</span></p>
{% for size, images in groups %}
<div class="group">{{ size }} images
<ul>
{% for name, picture, rating in images %}
<li>{% if picture %}<img src="{{ picture }}" alt="">
{% else %}<span class="withheld">not shown{% if rating %}: rated {{ rating }}{% endif %}</span>
{% endif %}<span class="path" title="{{ name }}">{{ name | ending }}</span></li>
{% endfor %}
</ul></div>
{% endfor %}
</section>
{% endif %}
</main>
</body>
</html>
"""
