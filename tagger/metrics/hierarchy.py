"""How well tags are told where some imply others, and how far predictions keep to what the ontology says.

Hierarchical precision and recall: the tags told and the tags there, each with all that they imply, are compared image
by image, and the counts of all images are added up (Kiritchenko, Matwin, Famili: Functional annotation of genes using
hierarchical text categorization, 2005, which Silla and Freitas, 2011, recommend; P_H and R_H of the set-based measures
in Kosmopoulos et al., 2015). A near miss, a tag's sibling, keeps the credit for their common ancestors.

Everything is counted in whole numbers, so parts of an evaluation add up to the same result in any order. Refuses NaN
logits.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tagger.batch import Batch
from tagger.data.ragged import distinct
from tagger.metrics.keys import KEY_OFFSET, MAX_KEY, from_keys, lowest_keys, to_keys
from tagger.ontology import TagRelations, close_up
from tagger.tag_lists import tag_coordinates

# Violations are added as whole multiples of this: 300,000 images of 100,000 pairs stay below 2 ** 63.
_UNIT = 2.0**-24
_KEYS = np.clip(np.arange(-KEY_OFFSET, KEY_OFFSET), -MAX_KEY, MAX_KEY)
# Probability in units, int32, by key + KEY_OFFSET.
_PROBABILITIES = np.rint(1 / (1 + np.exp(-from_keys(_KEYS).clip(-700).astype(np.float64))) / _UNIT).astype(np.int32)
_COUNTERS = (
    "images",
    "hits",
    "predicted",
    "present",
    "related_hits",
    "related_predicted",
    "related_present",
    "child_decisions",
    "broken_decisions",
    "violation",
)


@dataclass(frozen=True)
class HierarchicalScore:
    """Of the closed sets of all images together; NaN over nothing."""

    precision: float
    recall: float
    f1: float

    @classmethod
    def of(cls, hits: int, predicted: int, present: int) -> "HierarchicalScore":
        return cls(_share(hits, predicted), _share(hits, present), _share(2 * hits, predicted + present))


@dataclass(frozen=True)
class GroupScore:
    """An exclusive group: images with at least one of its tags predicted, and those with more than one."""

    tags: tuple[int, ...]
    decided: int
    violated: int


@dataclass(frozen=True)
class HierarchyResult:
    """What `HierarchyMetrics.compute` returns. A mean over nothing is NaN.

    all_tags: over every tag of the vocabulary. related_tags: over those that imply or are implied, `num_related_tags`.
    consistency: share of the predicted tags with ancestors, `child_decisions`, whose ancestors are all predicted too.
    mean_violation: mean of max(0, p(tag) - p(ancestor)) over all images and the `num_pairs` pairs. groups: every
    exclusive group, in the order of the ontology.
    """

    num_images: int
    all_tags: HierarchicalScore
    related_tags: HierarchicalScore
    num_related_tags: int
    num_pairs: int
    child_decisions: int
    consistency: float
    mean_violation: float
    groups: tuple[GroupScore, ...]


class HierarchyMetrics:
    """Collects batches of an evaluation; `add` takes what a collector is given, `merge` another part's counts.

    A tag is predicted where its logit, rounded to 16 bits, is at or above its threshold. Memory for one batch: 4 bytes
    for each of its B x C scores, and 16 for each of its B x E pairs.
    """

    def __init__(self, relations: TagRelations, num_tags: int, logit_thresholds: npt.ArrayLike) -> None:
        """logit_thresholds: one number, or float [num_tags]."""
        self.relations = relations
        self.num_tags = num_tags
        self._lowest = np.broadcast_to(lowest_keys(logit_thresholds), (num_tags,))
        self._related = distinct(np.concatenate([relations.child, relations.parent]))
        # The same pairs by place among the related tags, to which alone they matter.
        self._pairs = replace(
            relations,
            child=np.searchsorted(self._related, relations.child),
            parent=np.searchsorted(self._related, relations.parent),
        )
        self._children = distinct(self._pairs.child)
        # int64: the counters, then the images of each group with a tag, then with more than one. Parts of one
        # evaluation add up.
        self.state = np.zeros(len(_COUNTERS) + 2 * relations.num_groups, dtype=np.int64)

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Count a batch on the host: logits float [B, C]. Raises DivergedError for NaN, ValueError for other shapes."""
        if logits.shape != (len(batch), self.num_tags):
            found = f"logits of shape {list(logits.shape)}"
            raise ValueError(f"{found} for {len(batch)} images and {self.num_tags} tags; expected one row an image")
        keys = to_keys(logits).cpu().numpy()
        predicted = keys >= self._lowest
        present = np.zeros(predicted.shape, dtype=np.bool_)
        rows, columns = tag_coordinates(batch.tag_indices, batch.tag_offsets, *predicted.shape)
        present[rows.numpy(), columns.numpy()] = True
        # Related tags by themselves, tags first: closing changes no other.
        own, true, related_keys = (np.ascontiguousarray(x[:, self._related].T) for x in (predicted, present, keys))
        closed, truth = (close_up(table, self._pairs, tags_first=True) for table in (own, true))
        before = _counts(predicted & present, predicted, present)
        related = _counts(closed & truth, closed, truth)
        overall = before - _counts(own & true, own, true) + related
        decisions = np.count_nonzero(own[self._children])
        consistency = [decisions, self._broken(own), self._violation(related_keys)]
        self.state += np.concatenate([[len(batch)], overall, related, consistency, *self._groups(predicted)])

    def merge(self, other: "HierarchyMetrics") -> None:
        """Add the images of another part, which keeps them."""
        if other.state.shape != self.state.shape or other.num_tags != self.num_tags:
            raise ValueError(
                f"metrics of {other.num_tags} tags do not fit {self.num_tags}; use one vocabulary for both"
            )
        self.state += other.state

    def compute(self) -> HierarchyResult:
        """The scores of every image added so far; more may follow."""
        count = dict(zip(_COUNTERS, self.state.tolist(), strict=False))
        num_groups, num_pairs = self.relations.num_groups, len(self.relations.child)
        decided, violated = self.state[len(_COUNTERS) :].reshape(2, num_groups).tolist()
        decisions = count["child_decisions"]
        return HierarchyResult(
            num_images=count["images"],
            all_tags=HierarchicalScore.of(count["hits"], count["predicted"], count["present"]),
            related_tags=HierarchicalScore.of(
                count["related_hits"], count["related_predicted"], count["related_present"]
            ),
            num_related_tags=len(self._related),
            num_pairs=num_pairs,
            child_decisions=decisions,
            consistency=_share(decisions - count["broken_decisions"], decisions),
            mean_violation=_share(count["violation"], count["images"] * num_pairs) * _UNIT,
            groups=tuple(
                GroupScore(self.relations.group(number), decided[number], violated[number])
                for number in range(num_groups)
            ),
        )

    def _broken(self, predicted: npt.NDArray[np.bool_]) -> int:
        """Decisions for a tag of which an ancestor is not predicted; [related tags, B]."""
        child, parent = self._pairs.child, self._pairs.parent
        pairs, images = np.nonzero(predicted[child] & ~predicted[parent])
        return len(distinct(child[pairs] * predicted.shape[1] + images))

    def _violation(self, keys: npt.NDArray[np.int16]) -> int:
        """By how much p(tag) exceeds p(ancestor), over all pairs, in units; [related tags, B]."""
        units = _PROBABILITIES[keys.astype(np.int32) + KEY_OFFSET]
        return int(np.maximum(units[self._pairs.child] - units[self._pairs.parent], 0).sum(dtype=np.int64))

    def _groups(self, predicted: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of each exclusive group, the images with at least one of its tags predicted, and with more."""
        relations = self.relations
        if not relations.num_groups:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        members = predicted[:, relations.members].astype(np.int32)
        found = np.add.reduceat(members, relations.group_offsets[:-1], axis=1)
        return (found > 0).sum(axis=0), (found > 1).sum(axis=0)


def _counts(*tables: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    return np.array([np.count_nonzero(table) for table in tables], dtype=np.int64)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
