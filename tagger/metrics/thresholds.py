"""A threshold for each tag, fitted on the calibration images, and the file that keeps them.

A tag's own best threshold is as good as the images that have the tag: of two it says little. So it is drawn towards
that of all tags of about the same training count, and this one towards that of all tags:

    threshold = w * own + (1 - w) * shared    with w = n / (n + SHRINKAGE), n = positives among the calibration images

all as logits. A tag without positives has its group's threshold, one with thousands its own. An own threshold lies
midway between the lowest score that is taken and the highest that is not.

Refuses to fit on images of any other part than CALIB, and thresholds of another model, vocabulary or split.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson

from tagger.data.split import Part, Split
from tagger.errors import InputError
from tagger.files import FormatError, read_json
from tagger.metrics.curves import Counts, OperatingPoint, TagCurve
from tagger.metrics.keys import KEY_OFFSET, MAX_KEY, NUM_KEYS, from_keys, lowest_keys, probability_of
from tagger.metrics.ranking import ScoredImages
from tagger.metrics.store import codes
from tagger.metrics.summary import FREQUENCY_EDGES

FORMAT_VERSION = 1
# Positives at which a tag's own threshold counts as much as its group's; see docs/experiment-log.md.
SHRINKAGE = 10.0

Logits = npt.NDArray[np.float64]
Objective = Literal["f1", "equal", "precision", "tags_per_image"]


class LeakError(InputError):
    """Thresholds were to be fitted on images that are not for that, or used where their fit has seen the images."""


@dataclass(frozen=True)
class ThresholdGoal:
    """What a threshold is chosen for.

    f1: the best F1. equal: as many images taken as have the tag, so precision = recall. precision: the most images at a
    precision of `precision`. tags_per_image: so many taken that an image has `tags_per_image` tags on average, each tag
    its share.
    """

    objective: Objective = "f1"
    precision: float = 0.9
    tags_per_image: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.precision <= 1:
            raise ValueError(f"precision={self.precision} is not above 0 and at most 1")
        if self.objective == "tags_per_image" and not 0 < (self.tags_per_image or 0) < math.inf:
            raise ValueError(f"tags_per_image={self.tags_per_image} is not above 0; say how many, e.g. 20")

    def describe(self) -> str:
        """In words: "best F1"."""
        return {
            "f1": "best F1",
            "equal": "precision = recall",
            "precision": f"precision {self.precision:g}",
            "tags_per_image": f"{self.tags_per_image or 0:g} tags an image",
        }[self.objective]

    def threshold(self, curve: TagCurve, taken_of_true: float = 1.0) -> float | None:
        """The logit that suits one tag; None without positives.

        taken_of_true: for tags_per_image, how many images are to be taken for each that has the tag. Where no score
        reaches the precision, it lies above the highest.
        """
        if not curve.num_positives:
            return None
        point: OperatingPoint | None
        if self.objective == "f1":
            point = curve.best_f1()
        elif self.objective == "precision":
            point = curve.at_precision(self.precision)
        elif self.objective == "equal":
            point = curve.equal_precision_recall()
        else:
            wanted = taken_of_true * curve.num_positives
            point = curve.at(float(curve.logits[int(np.argmin(np.abs(curve.predicted - wanted)))]))
        if point is None:
            return float(from_keys(min(int(lowest_keys(curve.logits[0])) + 1, MAX_KEY)))
        place = int(np.searchsorted(-curve.logits, -point.logit, side="left"))
        below = min(place + 1, len(curve.logits) - 1)
        return (float(curve.logits[place]) + float(curve.logits[below])) / 2


@dataclass(frozen=True)
class Decisions:
    """What thresholds decide, int64 [C] each: images taken that have the tag, images taken, images that have it."""

    hits: Counts
    predicted: Counts
    present: Counts
    num_images: int

    @property
    def num_counted(self) -> int:
        """Tags that are present or predicted."""
        return int((self.predicted + self.present > 0).sum())

    @property
    def f1_macro(self) -> float:
        """Mean F1 over the tags that are present or predicted; NaN over none."""
        both = self.predicted + self.present
        counted = both > 0
        return float((2 * self.hits[counted] / both[counted]).mean()) if counted.any() else math.nan

    @property
    def f1_micro(self) -> float:
        """F1 of all decisions together; NaN where nothing is true or taken."""
        both = int(self.predicted.sum() + self.present.sum())
        return 2 * int(self.hits.sum()) / both if both else math.nan

    @property
    def precision(self) -> float:
        """The share of what is taken that is true; NaN where nothing is taken."""
        taken = int(self.predicted.sum())
        return int(self.hits.sum()) / taken if taken else math.nan

    @property
    def recall(self) -> float:
        """The share of what is true that is taken; NaN where nothing is true."""
        true = int(self.present.sum())
        return int(self.hits.sum()) / true if true else math.nan

    @property
    def tags_per_image(self) -> float:
        """Tags taken for an image, on average."""
        return int(self.predicted.sum()) / self.num_images

    def to_json(self) -> dict[str, float | None]:
        """The scores; None for NaN."""
        names = ("f1_macro", "f1_micro", "precision", "recall", "tags_per_image")
        values = {name: float(getattr(self, name)) for name in names}
        return {name: None if math.isnan(value) else value for name, value in values.items()}


def decide(scored: ScoredImages, logits: npt.ArrayLike) -> Decisions:
    """What thresholds, logits [C], decide about images that were scored, in one pass over their scores."""
    wanted = codes(np.arange(scored.num_tags), lowest_keys(logits))
    positives = scored.positives()
    present = np.bincount(positives // NUM_KEYS, minlength=scored.num_tags)
    hits = np.cumsum(present) - np.searchsorted(positives, wanted)
    return Decisions(hits, scored.store.counts_from(wanted), present, scored.num_images)


@dataclass(frozen=True)
class TagThresholds:
    """A threshold for each output of one model: images whose 16-bit logit is at or above it are taken.

    logits: float64 [C], finite. support: int64 [C], calibration images that have the tag. global_logit: the threshold
    for all tags together. on_calib: what they decide about the images that they were fitted on. weights_sha256: of the
    model's `model.safetensors`; calib_sha256: `Split.part_sha256` of the calibration part.
    """

    logits: Logits
    support: Counts
    global_logit: float
    goal: ThresholdGoal
    num_images: int
    on_calib: Mapping[str, float | None]
    weights_sha256: str
    vocabulary_sha256: str
    calib_sha256: str

    @property
    def global_probability(self) -> float:
        """The threshold for all tags together as a probability, 0..1."""
        return probability_of(self.global_logit)

    @cached_property
    def probabilities(self) -> Logits:
        """float64 [C], 0..1."""
        return np.array([probability_of(logit) for logit in self.logits.tolist()])

    def summary(self) -> str:
        """One line for people."""
        reached = ", ".join(f"{name} {value:.3f}" for name, value in self.on_calib.items() if value is not None)
        return (
            f"thresholds for {self.goal.describe()}, fitted on {self.num_images:,} calibration images: {reached}; "
            f"one for all would be {self.global_probability:.3f}"
        )

    def require_model(self, source: str, weights_sha256: str, vocabulary_sha256: str) -> None:
        """Raise FormatError unless they are of this model. `source` says where they come from."""
        if self.vocabulary_sha256 != vocabulary_sha256:
            raise FormatError(
                f"{source} are of another vocabulary ({self.vocabulary_sha256[:12]}, the model's is "
                f"{vocabulary_sha256[:12]}); fit thresholds for this model with scripts.fit_thresholds"
            )
        if self.weights_sha256 != weights_sha256:
            raise FormatError(
                f"{source} were fitted for other weights ({self.weights_sha256[:12]}, the model's are "
                f"{weights_sha256[:12]}); fit thresholds for this model with scripts.fit_thresholds"
            )

    def require_split(self, source: str, split: Split) -> None:
        """Raise LeakError where their calibration images are not this split's: it may hold them in another part."""
        found = split.part_sha256(Part.CALIB)
        if self.calib_sha256 != found:
            raise LeakError(
                f"{source} were fitted on the calibration images of another split ({self.calib_sha256[:12]}, here "
                f"{found[:12]}), which may be among those to score; fit them anew with scripts.fit_thresholds"
            )

    def to_json(self) -> bytes:
        """The content of a thresholds file."""
        content = {
            "format_version": FORMAT_VERSION,
            "objective": self.goal.objective,
            "precision": self.goal.precision,
            "tags_per_image": self.goal.tags_per_image,
            "num_images": self.num_images,
            "on_calib": dict(self.on_calib),
            "weights_sha256": self.weights_sha256,
            "vocabulary_sha256": self.vocabulary_sha256,
            "calib_sha256": self.calib_sha256,
            "global_logit": self.global_logit,
            "logits": self.logits,
            "support": self.support,
        }
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)

    @classmethod
    def load(cls, path: Path) -> "TagThresholds":
        """Raises FormatError for a file that is missing, damaged, newer or not of thresholds."""
        content = read_json(path, "thresholds", FORMAT_VERSION)
        try:
            return _from_json(content)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FormatError(
                f"thresholds {path} are not complete ({error}); fit them anew with scripts.fit_thresholds"
            ) from error


def _from_json(content: Mapping[str, Any]) -> TagThresholds:
    logits = np.array(content["logits"], dtype=np.float64)
    support = np.array(content["support"], dtype=np.int64)
    global_logit = float(content["global_logit"])
    if logits.ndim != 1 or logits.shape != support.shape or not len(logits):
        raise ValueError(f"logits are of shape {list(logits.shape)} and support of {list(support.shape)}")
    if not (np.isfinite(logits).all() and math.isfinite(global_logit)):
        raise ValueError("a threshold is not finite")
    hashes = {name: content[name] for name in ("weights_sha256", "vocabulary_sha256", "calib_sha256")}
    if not all(isinstance(value, str) for value in hashes.values()):
        raise ValueError("a hash is not text")
    wanted = content["tags_per_image"]
    goal = ThresholdGoal(content["objective"], float(content["precision"]), None if wanted is None else float(wanted))
    goal.describe()
    return TagThresholds(
        logits=logits,
        support=support,
        global_logit=global_logit,
        goal=goal,
        num_images=int(content["num_images"]),
        on_calib=dict(content["on_calib"]),
        **hashes,
    )


def fit_thresholds(
    scored: ScoredImages,
    split: Split,
    tag_counts: npt.ArrayLike,
    goal: ThresholdGoal,
    *,
    weights_sha256: str,
    vocabulary_sha256: str,
    shrinkage: float = SHRINKAGE,
) -> TagThresholds:
    """Fit thresholds to images that were scored, whose "image_ids" are their rows in the split.

    tag_counts: int64 [C], how often each tag is in the data set: tags of about the same count share what they learn.
    shrinkage: see the module; 0: each tag for itself, inf: one threshold for all. Raises LeakError where an image is
    not of the calibration part.
    """
    _refuse_other_parts(scored.per_image("image_ids"), split)
    counts = np.asarray(tag_counts)
    if counts.shape != (scored.num_tags,):
        raise ValueError(f"tag_counts are of shape {list(counts.shape)}; expected [{scored.num_tags}]")
    group_of = np.searchsorted(FREQUENCY_EDGES, counts, side="right") - 1
    true_per_image = len(scored.positives()) / scored.num_images
    taken_of_true = (goal.tags_per_image or 0) / true_per_image if true_per_image else 1.0
    own = np.full(scored.num_tags, math.nan)
    support = np.zeros(scored.num_tags, np.int64)
    pools = [_Pool() for _ in FREQUENCY_EDGES]
    for tag, curve in enumerate(scored.curves()):
        own[tag] = _or_nan(goal.threshold(curve, taken_of_true))
        support[tag] = curve.num_positives
        pools[group_of[tag]].add(curve)
    everything = _Pool.joined(pools)
    of_all = goal.threshold(everything.curve(), taken_of_true)
    if of_all is None:
        raise InputError(
            f"none of the {scored.num_images} calibration images has a tag of the vocabulary, so no threshold can be "
            "fitted; raise data.calib_fraction"
        )
    shared = np.array([_or_nan(goal.threshold(pool.curve(), taken_of_true)) for pool in pools])
    sizes = np.array([pool.num_positives for pool in pools])
    groups = _drawn(shared, sizes, np.full(len(pools), of_all), shrinkage)
    fitted = TagThresholds(
        logits=_drawn(own, support, groups[group_of], shrinkage),
        support=support,
        global_logit=of_all,
        goal=goal,
        num_images=scored.num_images,
        on_calib={},
        weights_sha256=weights_sha256,
        vocabulary_sha256=vocabulary_sha256,
        calib_sha256=split.part_sha256(Part.CALIB),
    )
    return replace(fitted, on_calib=decide(scored, fitted.logits).to_json())


def _refuse_other_parts(rows: npt.NDArray[np.int64], split: Split) -> None:
    """The one place where thresholds meet images: none of another part comes further."""
    known = (rows >= 0) & (rows < len(split.parts))
    if not known.all():
        raise LeakError(f"{int((~known).sum())} of {len(rows)} images to fit thresholds on are not of this data set")
    found = np.bincount(split.parts[rows], minlength=len(Part))
    others = [f"{found[part]} for {part.purpose}" for part in Part if part != Part.CALIB and found[part]]
    if others:
        raise LeakError(
            f"of {len(rows)} images to fit thresholds on, {' and '.join(others)} are not for that; thresholds are "
            "fitted on calibration images alone (data.calib_fraction)"
        )


def _drawn(own: Logits, support: npt.NDArray[np.integer], shared: Logits, shrinkage: float) -> Logits:
    """Thresholds of their own drawn towards shared ones; NaN stands for none of one's own."""
    weight = np.zeros(len(own)) if math.isinf(shrinkage) else support / np.maximum(support + shrinkage, 1e-300)
    weight = np.where(np.isnan(own), 0.0, weight)
    return np.asarray(weight * np.where(np.isnan(own), 0.0, own) + (1 - weight) * shared)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


class _Pool:
    """All decisions about some tags, as of one tag."""

    def __init__(self) -> None:
        self._counts = np.zeros(NUM_KEYS, np.int64)
        self._hits = np.zeros(NUM_KEYS, np.int64)
        self._num_images = 0
        self.num_positives = 0

    def add(self, curve: TagCurve) -> None:
        cells = lowest_keys(curve.logits).astype(np.int64) + KEY_OFFSET
        self._counts[cells] += np.diff(curve.predicted, prepend=0)
        self._hits[cells] += np.diff(curve.hits, prepend=0)
        self._num_images += curve.num_images
        self.num_positives += curve.num_positives

    def curve(self) -> TagCurve:
        cells = np.flatnonzero(self._counts)[::-1]
        return TagCurve(
            tag=-1,
            logits=from_keys(cells - KEY_OFFSET),
            predicted=np.cumsum(self._counts[cells]),
            hits=np.cumsum(self._hits[cells]),
            num_images=self._num_images,
            num_positives=self.num_positives,
        )

    @classmethod
    def joined(cls, pools: "list[_Pool]") -> "_Pool":
        whole = cls()
        for pool in pools:
            whole._counts += pool._counts
            whole._hits += pool._hits
            whole._num_images += pool._num_images
            whole.num_positives += pool.num_positives
        return whole
