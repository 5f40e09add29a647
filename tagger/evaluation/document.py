"""`evaluation.json`: what was evaluated, on which images, and every number beside what it is over.

Plain values in, a JSON object out; a number that is none (a mean over nothing) is null. The keys of the scores begin
with the part of the data that they are of: `val/mAP`, `test/mAP`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tagger.data.index import MetadataIndex
from tagger.data.scan import printable
from tagger.data.split import Part, Split
from tagger.evaluation.comparison import Comparison, TagChange
from tagger.evaluation.tag_details import Confusions, HardImage, TagDetail
from tagger.metrics.curves import OperatingPoint
from tagger.metrics.hierarchy import HierarchyResult
from tagger.metrics.summary import Group, Summary, TagScores
from tagger.metrics.thresholds import Decisions, TagThresholds

FORMAT_VERSION = 2


@dataclass(frozen=True)
class TagList:
    """The tags of a model in the order of its outputs; training_counts: int64 [C], training images that have each."""

    names: Sequence[str]
    categories: Sequence[str]
    training_counts: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """What an evaluation of one kind of weights gives. weights: a name for people; kind: "EMA", "online", "model".

    fitted: the model's own thresholds, where it has some for these images; `metrics`, `summary`, `tags`, `hierarchy`
    and `details` are then at these, else at `threshold`, a probability. `scalars` are at `threshold` in either case;
    at_one: what it decides where `fitted` is there.
    """

    weights: str
    kind: str
    scalars: Mapping[str, float]
    metrics: Mapping[str, object]
    summary: Summary
    tags: TagScores
    threshold: float
    fitted: TagThresholds | None = None
    at_one: Decisions | None = None
    hierarchy: HierarchyResult | None = None
    details: Sequence[TagDetail] = ()

    @property
    def thresholds(self) -> str:
        """In words: "each tag's own, fitted for best F1 on 525 calibration images", or "0.5 for all tags"."""
        if self.fitted is None:
            return f"{self.threshold:g} for all tags"
        num_images = f"{self.fitted.num_images:,}"
        return f"each tag's own, fitted for {self.fitted.goal.describe()} on {num_images} calibration images"

    def decisions(self) -> Decisions:
        """What the thresholds of the evaluation decide."""
        return Decisions(self.tags.hits, self.tags.predicted, self.tags.present, self.summary.num_images)


def evaluation_document(
    facts: Mapping[str, object], results: Sequence[Scores], tags: TagList, index: MetadataIndex
) -> dict[str, object]:
    """The whole file. With several kinds of weights, those after the first are objects of their own by their kind."""
    first, *others = (scores_document(scores, tags, index) for scores in results)
    return {
        "format_version": FORMAT_VERSION,
        "evaluated_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        **first,
        **{scores.kind: content for scores, content in zip(results[1:], others, strict=True)},
    }


def image_facts(run: Path, overrides: Sequence[str], split: Split, part: Part, num_chosen: int) -> dict[str, object]:
    """Which images of which run are scored: `num_chosen` of a part. overrides: changed settings, as they were given."""
    return {
        "run": str(run),
        "overrides": list(overrides),
        "part": part.name.lower(),
        "part_sha256": split.part_sha256(part),
        "num_images_in_part": len(split.rows(part)),
        "num_images_chosen": num_chosen,
    }


def page_facts(facts: Mapping[str, object], scores: Scores) -> dict[str, str]:
    """What was evaluated, by label, for the head of a page."""
    part, num_images = Part[str(facts["part"]).upper()], scores.summary.num_images
    once = "; use it once" if part == Part.TEST else ""
    thresholds = scores.thresholds
    if scores.at_one is not None:
        macro, micro = (f"{value:.3f}" for value in (scores.at_one.f1_macro, scores.at_one.f1_micro))
        thresholds += f"; at {scores.threshold:g} for all tags F1 macro is {macro} and F1 micro {micro}"
    return {
        "weights": scores.weights,
        "thresholds": thresholds,
        "images": f"{num_images:,} of {facts['num_images_in_part']:,} of the {part.purpose} part{once} "
        f"(hash of the part: {str(facts['part_sha256'])[:12]})",
        "trained on": f"{facts['num_training_images']:,} images",
        "vocabulary": f"{scores.summary.num_tags:,} tags (hash: {str(facts['vocabulary_sha256'])[:12]})",
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    }


def scores_document(scores: Scores, tags: TagList, index: MetadataIndex) -> dict[str, object]:
    """The part of the file that is about one kind of weights."""
    metrics, fitted, at_one = dict(scores.metrics), scores.fitted, scores.at_one
    if at_one is not None:
        # What stands beside the scalars is of the scalars.
        counted = at_one.num_counted
        metrics |= {"num_tags_in_f1_macro": counted}
        metrics |= {"num_tags_left_out_of_f1_macro": scores.summary.num_tags - counted}
    content: dict[str, object] = {
        "weights": scores.weights,
        "kind": scores.kind,
        "thresholds": scores.thresholds,
        "threshold": scores.threshold,
        **{name: _number(value) for name, value in scores.scalars.items()},
        **{name: value for name, value in metrics.items() if name.startswith("num_")},
        "fitted_thresholds": None if fitted is None else fitted_document(fitted, scores.decisions()),
        "summary": summary_document(scores.summary),
    }
    if scores.hierarchy is not None:
        content["hierarchy"] = hierarchy_document(scores.hierarchy, tags.names)
    if scores.details:
        content["tag_details"] = [detail_document(detail, tags.names, index) for detail in scores.details]
    thresholds = [scores.threshold] * len(tags.names) if fitted is None else fitted.probabilities.tolist()
    return {**content, "tags": tag_rows(scores.tags, tags, thresholds)}


def tag_rows(scores: TagScores, tags: TagList, thresholds: Sequence[float]) -> list[dict[str, object]]:
    """Every tag's scores. positives, predicted, hits: evaluated images that have it, that get it, and both.

    thresholds: the probability at which each is told.
    """
    columns = zip(
        tags.names,
        tags.categories,
        tags.training_counts.tolist(),
        thresholds,
        scores.average_precision.tolist(),
        scores.f1.tolist(),
        scores.present.tolist(),
        scores.predicted.tolist(),
        scores.hits.tolist(),
        strict=True,
    )
    return [
        {
            "name": name,
            "category": category,
            "training_images": training,
            "threshold": threshold,
            "average_precision": _number(precision),
            "f1": _number(f1),
            "positives": positives,
            "predicted": predicted,
            "hits": hits,
        }
        for name, category, training, threshold, precision, f1, positives, predicted, hits in columns
    ]


def summary_document(summary: Summary) -> dict[str, object]:
    """`Summary` as it is, with groups that have no tag marked."""
    return {
        **asdict(summary),
        "all_tags": _group(summary.all_tags),
        "by_frequency": [_group(bucket) for bucket in summary.by_frequency],
        "by_category": [_group(group) for group in summary.by_category],
    }


def _group(group: Group) -> dict[str, object]:
    return {**asdict(group), "empty": group.empty}


def fitted_document(thresholds: TagThresholds, decisions: Decisions) -> dict[str, object]:
    """What the model's own thresholds were fitted for, and what they decide here."""
    return {
        "objective": thresholds.goal.describe(),
        "calib_sha256": thresholds.calib_sha256,
        "calib_images": thresholds.num_images,
        **decisions.to_json(),
        "num_tags_in_f1_macro": decisions.num_counted,
        "num_images": decisions.num_images,
    }


def hierarchy_document(result: HierarchyResult, names: Sequence[str]) -> dict[str, object]:
    """`HierarchyResult` with names in place of numbers."""
    content = {name: _clean(value) for name, value in asdict(result).items()}
    content["groups"] = [
        {"tags": [names[tag] for tag in group.tags], "decided": group.decided, "violated": group.violated}
        for group in result.groups
    ]
    return content


def detail_document(detail: TagDetail, names: Sequence[str], index: MetadataIndex) -> dict[str, object]:
    """`TagDetail` with names and paths in place of numbers."""

    def images(hard: Sequence[HardImage]) -> list[dict[str, object]]:
        return [{"image": printable(index.image_path(image.row)), "score": image.score} for image in hard]

    def confusions(table: Confusions) -> dict[str, object]:
        others = [{"tag": names[each.tag], "images": each.count, "rate": each.rate} for each in table.others]
        return {"num_images": table.num_images, "others": others}

    return {
        "name": names[detail.tag],
        "num_images": detail.num_images,
        "num_positives": detail.num_positives,
        "average_precision": detail.average_precision,
        "at_threshold": _point(detail.at_threshold),
        "best_f1": _point(detail.best_f1),
        "precision_equals_recall": _point(detail.equal),
        "curve": [asdict(point) for point in detail.curve],
        "missed": confusions(detail.missed),
        "wrong": confusions(detail.wrong),
        "lowest_of_those_with_it": images(detail.lowest),
        "highest_of_those_without": images(detail.highest),
    }


def comparison_document(facts: Mapping[str, object], comparison: Comparison, names: Sequence[str]) -> dict[str, object]:
    """The whole file: `Comparison` with names in place of numbers; `changes` is every supported tag."""

    def change(each: TagChange) -> dict[str, object]:
        return {"name": names[each.tag], **{k: v for k, v in asdict(each).items() if k != "tag"}, "z": _number(each.z)}

    return {
        "format_version": FORMAT_VERSION,
        "evaluated_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        "num_images": comparison.num_images,
        "num_tags": comparison.num_tags,
        "scores": {name: asdict(score) for name, score in comparison.scores.items()},
        "one_rule": comparison.one_rule,
        "num_supported": len(comparison.changes),
        "num_unsupported": comparison.num_unsupported,
        "num_won": len(comparison.won),
        "num_lost": len(comparison.lost),
        "expected_by_chance": comparison.by_chance,
        "changes": [change(each) for each in comparison.changes],
    }


def _point(point: OperatingPoint | None) -> dict[str, object] | None:
    return None if point is None else {name: _number(value) for name, value in asdict(point).items()}


def _clean(value: object) -> object:
    if isinstance(value, dict):
        return {name: _clean(inner) for name, inner in value.items()}
    return _number(value) if isinstance(value, float) else value


def _number(value: object) -> float | None:
    return value if isinstance(value, float) and math.isfinite(value) else None
