"""What a report says, as plain values: gathered from an evaluation's exact counts, and drawn and written elsewhere.

Refuses tag names, categories or training counts of another number of tags.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tagger.data.scan import printable
from tagger.metrics.curves import TagCurve
from tagger.metrics.hierarchy import HierarchyResult
from tagger.metrics.levels import Levels
from tagger.metrics.ranking import ScoredImages
from tagger.metrics.summary import ENOUGH_POSITIVES, Summary, TagScores, score_tags, summarise
from tagger.report import SHOWN_RATINGS
from tagger.report.mistakes import Mistake

# Points of a drawn curve; its average precision is that of all points.
_MAX_POINTS = 400
_SWEPT = 201
_LISTED = 15


class ScoredCurves(ScoredImages, Protocol):
    """What is asked of `evaluation_metrics.MetricComputer`."""

    def micro_curve(self) -> TagCurve:
        """The curve of all decisions of all tags together."""


@dataclass(frozen=True)
class TagLine:
    """A tag in numbers; None over nothing. threshold: a probability. positives: evaluated images that have it."""

    name: str
    category: str
    training_images: int
    positives: int
    threshold: float
    precision: float | None
    recall: float | None
    f1: float | None
    average_precision: float | None


@dataclass(frozen=True)
class Line:
    """A precision-recall curve: float64 [K] with ascending recall, so that the area of its steps is the AP."""

    name: str
    recall: npt.NDArray[np.float64]
    precision: npt.NDArray[np.float64]
    average_precision: float
    num_positives: int


@dataclass(frozen=True)
class ShownMistake:
    """A mistake with what the page says of its image. withheld: the rating for which the image is not shown."""

    mistake: Mistake
    path: str
    withheld: str | None = None


class DescribeImage(Protocol):
    def __call__(self, row: int, /) -> tuple[str, str | None]:
        """The path and the rating of a row."""


@dataclass(frozen=True)
class Exclusive:
    """An exclusive group of tags: images that get at least one of them, and those that get several."""

    names: tuple[str, ...]
    decided: int
    violated: int


@dataclass(frozen=True)
class Report:
    """Everything that is on the page. facts: what was evaluated, by label. tags: all, in the vocabulary's order.

    present, predicted: int64 [N], tags of each image. threshold: the one probability for all tags, None where each has
    its own. curves: all decisions first. sweep: all decisions at one threshold for all tags. everything_in: the file
    that holds what the page leaves out.
    """

    title: str
    facts: Mapping[str, str]
    summary: Summary
    tags: tuple[TagLine, ...]
    threshold: float | None
    curves: tuple[Line, ...]
    sweep: Levels
    present: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    extra: tuple[ShownMistake, ...]
    missed: tuple[ShownMistake, ...]
    hierarchy: HierarchyResult | None
    exclusive: tuple[Exclusive, ...]
    everything_in: str

    @property
    def ranked(self) -> list[TagLine]:
        """The tags that best and worst are told of, by falling AP: those with enough positives, else with any."""
        known = [tag for tag in self.tags if tag.average_precision is not None]
        enough = [tag for tag in known if tag.positives >= ENOUGH_POSITIVES]
        return sorted(enough or known, key=lambda tag: (-(tag.average_precision or 0.0), tag.name))

    @property
    def best(self) -> list[TagLine]:
        """The head of `ranked`, at most half of it."""
        return self.ranked[: min(_LISTED, -(-len(self.ranked) // 2))]

    @property
    def worst(self) -> list[TagLine]:
        """The other end, the worst first; no tag is in both lists."""
        rest = self.ranked[len(self.best) :]
        return rest[::-1][:_LISTED]


def gather_report(
    scored: ScoredCurves,
    names: Sequence[str],
    categories: Sequence[str],
    training_counts: npt.NDArray[np.integer],
    *,
    title: str,
    facts: Mapping[str, str],
    summary: Summary | None = None,
    scores: TagScores | None = None,
    extra: Sequence[Mistake] = (),
    missed: Sequence[Mistake] = (),
    describe_image: DescribeImage | None = None,
    hierarchy: HierarchyResult | None = None,
    chosen: Sequence[int] = (),
    everything_in: str = "evaluation.json",
) -> Report:
    """A report from an evaluation. summary, scores: where they are there already. chosen: tags whose curves to draw.

    training_counts: int64 [C], images of the training part that have each tag. Without `chosen`, the best, the median
    and the worst tag are drawn.
    """
    for what, number in (("names", len(names)), ("categories", len(categories)), ("counts", len(training_counts))):
        if number != scored.num_tags:
            raise ValueError(f"{number} {what} for {scored.num_tags} tags; expected one for each")
    # Half a character, which JSON may hold, is in no page's encoding.
    names, categories = ([printable(name) for name in each] for each in (names, categories))
    scores = scores or score_tags(scored)
    summary = summary or summarise(scored, training_counts, categories, scores)
    with np.errstate(over="ignore"):
        probabilities = 1 / (1 + np.exp(-scored.logit_thresholds))
    one = bool((scored.logit_thresholds == scored.logit_thresholds[0]).all())
    micro = scored.micro_curve()
    drawn = list(chosen) or _telling_tags(scores)
    curves = [_line("all decisions", micro), *(_line(names[curve.tag], curve) for curve in scored.curves(drawn))]
    groups = () if hierarchy is None else hierarchy.groups
    return Report(
        title=title,
        facts=facts,
        summary=summary,
        tags=_tag_lines(names, categories, training_counts, scores, probabilities),
        threshold=float(probabilities[0]) if one else None,
        curves=tuple(line for line in curves if line.num_positives),
        sweep=Levels.of(micro, _SWEPT),
        present=scored.per_image("present"),
        predicted=scored.per_image("predicted"),
        extra=_shown(extra, describe_image),
        missed=_shown(missed, describe_image),
        hierarchy=hierarchy,
        exclusive=tuple(
            Exclusive(tuple(names[i] for i in group.tags), group.decided, group.violated) for group in groups
        ),
        everything_in=everything_in,
    )


def _tag_lines(
    names: Sequence[str],
    categories: Sequence[str],
    training_counts: npt.NDArray[np.integer],
    scores: TagScores,
    thresholds: npt.NDArray[np.float64],
) -> tuple[TagLine, ...]:
    columns = (scores.hits, scores.predicted, scores.present, scores.f1, scores.average_precision, thresholds)
    values = zip(names, categories, training_counts.tolist(), *(column.tolist() for column in columns), strict=True)
    return tuple(
        TagLine(
            name=name,
            category=category,
            training_images=training,
            positives=present,
            threshold=threshold,
            precision=hits / predicted if predicted else None,
            recall=hits / present if present else None,
            f1=None if math.isnan(f1) else f1,
            average_precision=None if math.isnan(precision) else precision,
        )
        for name, category, training, hits, predicted, present, f1, precision, threshold in values
    )


def _telling_tags(scores: TagScores) -> list[int]:
    """The best, the median and the worst tag by AP, of those with enough positives, else with any."""
    known = np.flatnonzero(~np.isnan(scores.average_precision))
    enough = known[scores.present[known] >= ENOUGH_POSITIVES]
    among = enough if len(enough) else known
    ranked = among[np.argsort(-scores.average_precision[among], kind="stable")].tolist()
    return list(dict.fromkeys([ranked[0], ranked[len(ranked) // 2], ranked[-1]])) if ranked else []


def _line(name: str, curve: TagCurve) -> Line:
    precision, recall = curve.precision_recall()
    # A step of AP begins where positives are gained; between those, precision alone falls.
    gaining = np.flatnonzero(np.diff(curve.hits, prepend=0))
    if len(gaining) > _MAX_POINTS:
        gaining = gaining[np.unique(np.linspace(0, len(gaining) - 1, _MAX_POINTS).round().astype(np.int64))]
    return Line(name, recall[gaining], precision[gaining], curve.average_precision(), curve.num_positives)


def _shown(mistakes: Sequence[Mistake], describe: DescribeImage | None) -> tuple[ShownMistake, ...]:
    shown = []
    for mistake in mistakes:
        path, rating = (f"row {mistake.row}", None) if describe is None else describe(mistake.row)
        shown.append(ShownMistake(mistake, path, None if rating in SHOWN_RATINGS else rating))
    return tuple(shown)
