"""A report as one HTML file that needs no network: figures, plots, tables, and the images that were told worst.

Nothing from outside can become a part of the page: names are escaped, and a policy in the page lets the browser load
nothing and run nothing but the page's own script. What would make the page larger than a few megabytes is left out and
said. Needs the extra `report`.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
from markupsafe import Markup

from tagger.files import write_atomic
from tagger.metrics.intervals import Interval
from tagger.metrics.keys import probability_of
from tagger.metrics.summary import ENOUGH_POSITIVES
from tagger.report.content import Report, ShownMistake
from tagger.report.drawing import STYLE, Plot, jpeg_uri, page_environment, short_number
from tagger.report.mistakes import THUMBNAIL_SIDE
from tagger.report.plots import draw_plots
from tagger.report.template import PAGE, REPORT_STYLE, SCRIPT

COLUMNS = ("tag", "category", "trained on", "positives", "threshold", "precision", "recall", "F1", "AP")
_MAX_TABLE_BYTES = 2_500_000
_STATIC_ROWS = 200
_MAX_NAME = 200
_LISTED_GROUPS = 50
_MARKS = {"right": "✓", "extra": "✗", "missed": "–"}

_Row = list[str | int | float | None]


@dataclass(frozen=True)
class _Table:
    """Rows of the tag table, those with the most positives first; left_out: tags without a row."""

    categories: list[str]
    tags: list[_Row]
    left_out: int


@dataclass(frozen=True)
class _Figure:
    name: str
    value: str
    note: str
    interval: str | None = None


@dataclass(frozen=True)
class _ShownTag:
    name: str
    score: float
    verdict: str
    mark: str
    this: bool


@dataclass(frozen=True)
class _Card:
    source: str | None
    alt: str
    withheld: str | None
    path: str
    tags: list[_ShownTag]
    num_more: int


def write_report(report: Report, path: Path, plots: Sequence[Plot] | None = None) -> None:
    """Write the page, atomically; raises OSError where that is not possible. plots: those of `draw_plots`, if there."""
    environment = page_environment()
    environment.filters["known"] = lambda value: None if math.isnan(value) else value
    coverage = report.summary.coverage
    table = _table(report)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    text = environment.from_string(PAGE).render(
        report=report,
        headline=_headline(report),
        coverage=(
            ("enough", coverage.enough, f"with {ENOUGH_POSITIVES} positives or more"),
            ("few", coverage.few, f"with 1 to {ENOUGH_POSITIVES - 1}"),
            ("without", coverage.without, "without any: no score"),
        ),
        plots=draw_plots(report) if plots is None else plots,
        extra=_cards(report, report.extra),
        missed=_cards(report, report.missed),
        exclusive=sorted(report.exclusive, key=lambda group: -group.violated)[:_LISTED_GROUPS],
        table=table,
        static=table.tags[:_STATIC_ROWS],
        columns=COLUMNS,
        style=Markup(STYLE + REPORT_STYLE),
        script=Markup(SCRIPT),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )
    write_atomic(path, text.lstrip().encode("utf-8", "backslashreplace"))


def _headline(report: Report) -> list[_Figure]:
    summary, found = report.summary, report.summary.intervals
    everything, per_image = summary.all_tags, summary.per_image
    at = "each tag's threshold" if report.threshold is None else f"threshold {report.threshold:.3g}"
    images = f"over {summary.num_images:,} images"
    spread = per_image.tag_quantiles, per_image.predicted_quantiles
    middle = [f"half of the images between {short_number(each[1])} and {short_number(each[3])}" for each in spread]
    calibration = everything.calibration
    return [
        _Figure(
            "mAP",
            _score(everything.mAP.value),
            f"over {everything.mAP.over:,} tags with a positive",
            _range(found["mAP"]),
        ),
        _Figure("F1 macro", _score(everything.f1_macro.value), f"over {everything.f1_macro.over:,} tags, at {at}"),
        _Figure("F1 micro", _score(everything.f1_micro.value), f"all decisions, at {at}", _range(found["f1_micro"])),
        _Figure("F1 per image", _score(per_image.f1.value), f"{images}, at {at}", _range(found["f1_per_image"])),
        _Figure(
            "true tags per image", _count(per_image.tags.value), middle[0], _range(found["tags_per_image"], digits=2)
        ),
        _Figure(
            "predicted per image",
            _count(per_image.predicted.value),
            middle[1],
            _range(found["predicted_per_image"], digits=2),
        ),
        _Figure(
            "calibration error",
            "–" if calibration.error is None else f"{calibration.error:.4f}",
            f"over {calibration.num_decisions:,} decisions; {_score(calibration.error_per_true)} per positive",
        ),
    ]


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _range(interval: Interval, digits: int = 3) -> str | None:
    if interval.low is None or interval.high is None:
        return None
    return f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"


def _table(report: Report) -> _Table:
    categories = sorted({tag.category for tag in report.tags})
    number_of = {name: number for number, name in enumerate(categories)}
    rows: list[_Row] = []
    used = 0
    for tag in sorted(report.tags, key=lambda tag: (-tag.positives, tag.name)):
        scores = (tag.threshold, tag.precision, tag.recall, tag.f1, tag.average_precision)
        row: _Row = [
            tag.name[:_MAX_NAME],
            number_of[tag.category],
            tag.training_images,
            tag.positives,
            *(None if value is None else round(value, 4) for value in scores),
        ]
        # Other scripts are escaped in the page, six bytes a letter.
        used += (
            6 * sum(not letter.isascii() for letter in tag.name[:_MAX_NAME])
            + len(orjson.dumps(row[1:]))
            + len(tag.name)
        )
        if used > _MAX_TABLE_BYTES:
            break
        rows.append(row)
    return _Table(categories, rows, len(report.tags) - len(rows))


def _cards(report: Report, shown: Sequence[ShownMistake]) -> list[_Card]:
    return [_card(report, each) for each in shown]


def _card(report: Report, shown: ShownMistake) -> _Card:
    mistake = shown.mistake
    tags = []
    for tag, logit, is_there, is_predicted in mistake.scores:
        verdict = "right" if is_there and is_predicted else "extra" if is_predicted else "missed"
        tags.append(
            _ShownTag(report.tags[tag].name, probability_of(logit), verdict, _MARKS[verdict], tag == mistake.tag)
        )
    tags.sort(key=lambda tag: not tag.this)
    name = report.tags[mistake.tag].name
    what = "is predicted and not among its tags" if mistake.kind == "extra" else "is among its tags and not predicted"
    return _Card(
        source=None if shown.withheld is not None else jpeg_uri(mistake.image, THUMBNAIL_SIDE),
        alt=f"An image on which “{name}” {what}",
        withheld=shown.withheld,
        path=shown.path,
        tags=tags,
        num_more=mistake.num_more,
    )
