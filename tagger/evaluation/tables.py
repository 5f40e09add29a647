"""An evaluation as tables for a terminal of 80 columns; each number beside what it is over."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from rich import box
from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from tagger.data.index import MetadataIndex
from tagger.data.scan import printable
from tagger.data.split import Part
from tagger.evaluation.comparison import Comparison, Difference, TagChange
from tagger.evaluation.document import Scores, TagList
from tagger.evaluation.tag_details import Confusions, HardImage, TagDetail
from tagger.metrics.curves import OperatingPoint
from tagger.metrics.hierarchy import HierarchyResult
from tagger.metrics.intervals import Interval
from tagger.metrics.summary import ENOUGH_POSITIVES, Group

_NONE = "-"
_SHOWN = 5
_TEST_PART = "This is the test part: use it once, at the end; choose and tune on the validation part."
_IMAGES = ("has it, lowest scores", "does not have it, highest scores")


def evaluation_tables(
    facts: Mapping[str, object], results: Sequence[Scores], tags: TagList, index: MetadataIndex
) -> Iterable[RenderableType]:
    """What an evaluation is of, and its tables by its mode; `facts` as in the JSON file."""
    part = Part[str(facts["part"]).upper()]
    chosen, whole = (cast(int, facts[name]) for name in ("num_images_chosen", "num_images_in_part"))
    images = f"{chosen:,} images" if chosen == whole else f"{chosen:,} of {whole:,} images, chosen by hash"
    yield Text(f"{' and '.join(scores.weights for scores in results)}\non the {part.purpose} part: {images}")
    if part == Part.TEST:
        yield Text(_TEST_PART)
    if facts["num_images_refused"]:
        yield Text(f"{facts['num_images_refused']:,} of them could not be read and are left out")
    if facts["mode"] in ("full", "fast"):
        yield from full_tables(results, tags)
    for scores in results:
        if scores.hierarchy is not None:
            yield from hierarchy_tables(scores, scores.hierarchy, tags.names, len(results) > 1)
        for detail in scores.details:
            yield from detail_tables(detail, tags, index, "" if len(results) == 1 else f" ({scores.kind} weights)")


def full_tables(all_scores: Sequence[Scores], tags: TagList) -> Iterable[RenderableType]:
    """Everything of a whole evaluation; the groups are of the first weights."""
    yield from headline(all_scores)
    first, named = all_scores[0], "" if len(all_scores) == 1 else f", {all_scores[0].kind} weights"
    summary = first.summary
    yield Text()
    yield from group_table(f"by training images of the tag{named}", "trained on", summary.by_frequency)
    if len(summary.by_category) > 1:
        yield Text()
        yield from group_table(f"by category{named}", "category", summary.by_category)
    yield Text("true: tags of these images; macro, micro: F1; n: the tags that the score before it is over")
    yield Text()
    coverage, per_image = summary.coverage, summary.per_image
    yield Text(
        f"{coverage.num_tags:,} tags: {coverage.enough:,} with 5 or more of these images, {coverage.few:,} with 1 to "
        f"4, {coverage.without:,} with none. Tags of an image at the median: {per_image.tag_quantiles[2]:g}, predicted "
        f"{per_image.predicted_quantiles[2]:g}."
    )
    yield from weakest(first, tags)


def headline(all_scores: Sequence[Scores]) -> Iterable[RenderableType]:
    """The scores of each kind of weights side by side, with 95 % intervals and what each is over."""
    first = all_scores[0]
    metrics, summary = first.metrics, first.summary
    columns = [Column("score", overflow="fold")]
    for scores in all_scores:
        columns += [Column(scores.kind, justify="right"), Column("95 %", no_wrap=True)]
    table = _new(*columns, Column("over", overflow="fold"))

    def row(name: str, cells: Iterable[tuple[str, str]], over: str) -> None:
        table.add_row(name, *(text for cell in cells for text in cell), over)

    def plain(values: Iterable[float | None], digits: int = 4) -> Iterable[tuple[str, str]]:
        return ((_value(value, digits), "") for value in values)

    def interval(name: str, digits: int = 4) -> Iterable[tuple[str, str]]:
        return (_interval(scores.summary.intervals[name], digits) for scores in all_scores)

    images = f"{summary.num_images:,} images"
    row("mAP", interval("mAP"), f"{metrics['num_tags_with_positives']:,} tags with a positive")
    macro = [scores.summary.all_tags.f1_macro for scores in all_scores]
    counted = " and ".join(dict.fromkeys(f"{mean.over:,}" for mean in macro))
    row("F1 macro", plain(mean.value for mean in macro), f"{counted} tags there or told")
    row("F1 micro", interval("f1_micro"), "all decisions")
    row("F1 per image", interval("f1_per_image"), images)
    row("predicted tags", interval("predicted_per_image", 2), images)
    row("its own tags", plain((s.summary.per_image.tags.value for s in all_scores), 2), images)
    at_one = [scores.at_one for scores in all_scores if scores.at_one is not None]
    if len(at_one) == len(all_scores):
        counted = " and ".join(dict.fromkeys(f"{told.num_counted:,}" for told in at_one))
        row("F1 macro *", plain(told.f1_macro for told in at_one), f"{counted} tags there or told")
        row("F1 micro *", plain(told.f1_micro for told in at_one), "all decisions")
        row("predicted tags *", plain((told.tags_per_image for told in at_one), 2), images)
    for name in (name for name in first.scalars if name.endswith("/loss")):
        row("loss", plain(scores.scalars[name] for scores in all_scores), "sum over tags, mean over images")
    error = (scores.summary.all_tags.calibration.error for scores in all_scores)
    row("calibration error", plain(error, 5), f"{summary.all_tags.calibration.num_decisions:,} decisions")
    yield table
    yield Text(f"Thresholds: {first.thresholds}.")
    if len(at_one) == len(all_scores):
        yield Text(f"* at {first.threshold:g} for all tags, as training logs them.")


def group_table(title: str, first: str, groups: Sequence[Group]) -> Iterable[RenderableType]:
    """Scores by group; n: how many of its tags the mean before it is over."""
    names = ("tags", "true", "mAP", "n", "macro", "n", "micro", "calib.")
    columns = [Column(first, overflow="fold"), *(Column(name, justify="right", no_wrap=True) for name in names)]
    table = _new(*columns, title=title)
    for group in groups:
        if group.empty:
            continue
        table.add_row(
            group.name,
            f"{group.num_tags:,}",
            f"{group.num_positives:,}",
            *(text for mean in (group.mAP, group.f1_macro) for text in (_value(mean.value), f"{mean.over:,}")),
            _value(group.f1_micro.value),
            _value(group.calibration.error, 5),
        )
    yield table
    if empty := [group.name for group in groups if group.empty]:
        yield Text(f"no tag has {'; '.join(empty)}")


def weakest(scores: Scores, tags: TagList) -> Iterable[RenderableType]:
    """The tags of the lowest AP, of those with enough positives: that of one image says nothing."""
    precision, enough = scores.tags.average_precision, scores.tags.present >= ENOUGH_POSITIVES
    if not enough.any():
        yield Text(f"weakest tags: none has {ENOUGH_POSITIVES} or more of these images, too few to tell")
        return
    title = f"weakest of the {int(enough.sum()):,} tags with {ENOUGH_POSITIVES} or more of these images"
    table = _table("tag", "AP", "positives", "training images", title=title)
    for tag in [i for i in np.argsort(precision, kind="stable").tolist() if enough[i]][:_SHOWN]:
        table.add_row(
            Text(tags.names[tag]),
            _value(float(precision[tag])),
            f"{scores.tags.present[tag]:,}",
            f"{tags.training_counts[tag]:,}",
        )
    yield table


def hierarchy_tables(
    scores: Scores, result: HierarchyResult, names: Sequence[str], several: bool
) -> Iterable[RenderableType]:
    """Hierarchical scores beside the plain F1 at the same thresholds, consistency, and the groups violated most."""
    flat = scores.summary.all_tags
    title = f"{scores.kind} weights" if several else None
    table = _table("tags with all they imply", "precision", "recall", "F1", "over", title=title)
    for name, score, count in (
        ("every tag", result.all_tags, flat.num_tags),
        ("those that imply or are implied", result.related_tags, result.num_related_tags),
    ):
        table.add_row(name, *(_value(value) for value in (score.precision, score.recall, score.f1)), f"{count:,} tags")
    table.add_row("each tag by itself (plain)", "", "", _value(flat.f1_micro.value), f"{flat.num_tags:,} tags")
    yield table
    yield Text(
        f"{_value(result.consistency)} of {result.child_decisions:,} predicted tags that imply others come with all "
        f"of those; a tag's probability exceeds that of one it implies by {_significant(result.mean_violation)} on "
        f"average, over {result.num_pairs:,} pairs and {result.num_images:,} images."
    )
    if result.groups:
        groups = _table("exclusive group", "images with one of it", "with more than one")
        ranked = sorted(result.groups, key=lambda group: (-group.violated, group.tags))
        for group in ranked[: 2 * _SHOWN]:
            shown = Text(", ".join(names[tag] for tag in group.tags))
            groups.add_row(shown, f"{group.decided:,}", f"{group.violated:,}")
        yield groups
        if len(ranked) > 2 * _SHOWN:
            yield Text(f"and {len(ranked) - 2 * _SHOWN:,} more groups in the JSON file")


def detail_tables(detail: TagDetail, tags: TagList, index: MetadataIndex, of: str = "") -> Iterable[RenderableType]:
    """Operating points, confusions and hardest images of one tag."""
    names = tags.names
    yield Text()
    yield Text(
        f"{names[detail.tag]}{of}: AP {_value(detail.average_precision)}; {detail.num_positives:,} of "
        f"{detail.num_images:,} images have it, {tags.training_counts[detail.tag]:,} training images"
    )
    table = _table("point", "score", "precision", "recall", "F1")
    points: Mapping[str, OperatingPoint | None] = {
        "at the threshold": detail.at_threshold,
        "best F1": detail.best_f1,
        "precision = recall": detail.equal,
    }
    for name, point in points.items():
        if point is not None:
            score = float(0.5 + 0.5 * np.tanh(0.5 * point.logit))
            table.add_row(name, *(_value(value) for value in (score, point.precision, point.recall, point.f1)))
    yield table
    yield _confusions(detail.missed, "has it, does not get it", "gets instead", names)
    yield _confusions(detail.wrong, "gets it, does not have it", "has instead", names)
    for title, images in zip(_IMAGES, (detail.lowest, detail.highest), strict=True):
        yield _hard_images(title, images, index)


def comparison_tables(
    facts: Mapping[str, object], comparison: Comparison, names: Sequence[str]
) -> Iterable[RenderableType]:
    """Scores of A and B, B - A with its interval, and the tags that changed beyond it; `facts` as in the JSON file."""
    for letter, side in zip("AB", cast(Sequence[Mapping[str, Any]], facts["sides"]), strict=True):
        yield Text(
            f"{letter}: {side['weights']}; {side['num_tags']:,} tags, {len(side['left_out']):,} not in common; "
            f"thresholds {side['thresholds']}"
        )
        used = side["num_images_it_was_made_from"]
        if used is None:
            yield Text(f"   whether {letter} was trained on these images is not known: it comes without its run")
        elif used:
            yield Text(f"   {letter} was made from {used:,} of the images; these are left out")
    part = Part[str(facts["part"]).upper()]
    yield Text(
        f"{comparison.num_tags:,} tags in common, on {comparison.num_images:,} of "
        f"{facts['num_images_in_part']:,} images of the {part.purpose} part of {facts['run']}"
    )
    if part == Part.TEST:
        yield Text(_TEST_PART)
    numbers = (Column(name, justify="right", no_wrap=True) for name in ("A", "B", "B - A", "95 %"))
    table = _new(Column("score"), *numbers, Column("over"))
    labels = {
        "mAP": "mAP",
        "f1_macro": "F1 macro",
        "f1_micro": "F1 micro",
        "f1_per_image": "F1 per image",
        "predicted_per_image": "predicted tags",
        "f1_macro_at_0.5": "F1 macro at 0.5",
        "f1_micro_at_0.5": "F1 micro at 0.5",
    }
    for name, score in comparison.scores.items():
        over = f"{score.over:,} {score.what.split()[0]}"
        own = "" if comparison.one_rule or name == "mAP" or name.endswith("_at_0.5") else " *"
        table.add_row(
            labels[name] + own, _value(score.a), _value(score.b), _signed(score.difference), _bounds(score), over
        )
    yield table
    if not comparison.one_rule:
        yield Text(
            "* each model at its own thresholds, as told above: a part of the difference may be theirs. At 0.5: "
            "for all tags of both."
        )
    supported = len(comparison.changes)
    yield Text(
        f"{supported:,} of {comparison.num_tags:,} tags have 5 or more of these images. B is better at "
        f"{len(comparison.won):,} and worse at {len(comparison.lost):,} by more than 1.96 standard errors; were both "
        f"alike, about {comparison.by_chance:.0f} tags would be."
    )
    for title, changes in (("B won", comparison.won), ("B lost", comparison.lost)):
        if changes:
            yield _changes(title, changes, names)


def _changes(title: str, changes: Sequence[TagChange], names: Sequence[str]) -> Table:
    more = "" if len(changes) <= 2 * _SHOWN else f" (the first {2 * _SHOWN} of {len(changes):,})"
    table = _table(title + more, "AP of A", "AP of B", "B - A", "standard error", "positives")
    for change in changes[: 2 * _SHOWN]:
        table.add_row(
            Text(names[change.tag]),
            _value(change.a),
            _value(change.b),
            _signed(change.difference),
            _value(change.standard_error),
            f"{change.positives:,}",
        )
    return table


def _confusions(found: Confusions, what: str, header: str, names: Sequence[str]) -> RenderableType:
    if not found.others:
        return Text(f"{what}: {found.num_images:,} images, no other tag stands out")
    table = _table(f"{what}: {found.num_images:,} images", header, "in", "in all images")
    for place, other in enumerate(found.others[:_SHOWN]):
        more = len(found.others) - _SHOWN
        first = "" if place or more <= 0 else f"({more:,} more in the JSON file)"
        table.add_row(first, Text(names[other.tag]), f"{other.count:,} images", f"{other.rate:.2%}")
    return table


def _hard_images(title: str, images: Sequence[HardImage], index: MetadataIndex) -> RenderableType:
    if not images:
        return Text(f"{title}: no image")
    table = _table("score", title)
    for image in images[:_SHOWN]:
        table.add_row(_value(image.score), Text(printable(index.relative_path(image.row)), overflow="fold"))
    return table


def _table(first: str, *others: str, title: str | None = None) -> Table:
    """Columns of numbers, except the first, "over", and the names of tags and images."""
    columns = [Column(first, overflow="fold")]
    for name in others:
        text = name == "over" or name.endswith("instead") or name in _IMAGES
        columns.append(Column(name, justify="left" if text else "right", overflow="fold"))
    return _new(*columns, title=title)


def _new(*columns: Column, title: str | None = None) -> Table:
    return Table(
        *columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )


def _value(value: float | None, digits: int = 4) -> str:
    return _NONE if value is None or value != value else f"{value:.{digits}f}"


def _significant(value: float) -> str:
    return _NONE if value != value else f"{value:.2g}"


def _signed(value: float | None) -> str:
    return _NONE if value is None else f"{value:+.4f}"


def _bounds(score: Difference) -> str:
    return _NONE if score.low is None or score.high is None else f"{score.low:+.4f} to {score.high:+.4f}"


def _interval(interval: Interval, digits: int = 4) -> tuple[str, str]:
    value = _value(interval.value, digits)
    if interval.low is None or interval.high is None:
        return value, ""
    fewer = max(1, digits - 1)
    return value, f"{interval.low:.{fewer}f}-{interval.high:.{fewer}f}"
