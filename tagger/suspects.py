"""Labels that are probably wrong: where a model disagrees most with the tags of images that it was not trained on.

Two kinds: `missing` (the tag is absent and its score high) and `wrong` (the tag is present and its score low). The
strength of a disagreement is the log-odds that the label is wrong, in nats, but for one constant that all suspects
share. Where a tag's odds on the image are `exp(logit)` and labelling errors are rare and depend on the tag alone (the
class-conditional noise of Northcutt, Jiang and Chuang 2021, "Confident Learning", J. Artif. Intell. Res. 70), Bayes'
rule gives, with "should" for what a careful labeller would say,

    missing:  logit + log P(absent | should) - log P(absent | should not)   =  logit + constant
    wrong:   -logit + log P(present | should not) - log P(present | should) =  log-odds of the share - logit + constant

as every tag is forgotten at one rate, but is put on wrong images in proportion to how common it is: to its share of the
evaluated images. So a rare tag that scores low on all images is not suspected wherever it stands, and strengths compare
between tags. That paper's own threshold of a tag, the mean score of the images that have it, finds fewer planted errors
(docs/experiment-log.md), and so does the rank among the images of the other answer: both favour tags that the model has
not learnt. Logits must be calibrated alike for all tags.

Memory is bounded by the number of tags, whatever the number of images. Refuses NaN logits and mirrored images, whose
tags are not those of the file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tagger.batch import Batch
from tagger.data.correction_log import state_of
from tagger.data.index import MetadataIndex
from tagger.errors import DivergedError
from tagger.files import json_line, write_atomic
from tagger.ontology import Ontology
from tagger.tag_lists import tag_coordinates

FORMAT_VERSION = 1
Kind = Literal["missing", "wrong"]
_KINDS: tuple[Kind, Kind] = ("missing", "wrong")
_LEAST_PER_TAG = 16
_COMPACT_AFTER = 1 << 16


@dataclass(frozen=True)
class Suspect:
    """One tag of one image. score: the model's probability of the tag. strength: see the top of this file, nats."""

    row: int
    tag: int
    kind: Kind
    score: float
    strength: float


class Suspects:
    """Collects the strongest disagreements, batch by batch. For one thread; each rank fills its own and one merges.

    limit: how many `strongest` gives. per_tag: at most so many of each tag and kind (None: `limit` spread four times
    over the tags, at least 16), so that one tag does not crowd out the rest. The outcome is the same whatever the order
    of the batches. Holds 20 bytes for each tag, kind and place of `per_tag`, and the candidates of a few batches.
    """

    def __init__(self, num_tags: int, limit: int, per_tag: int | None = None) -> None:
        if num_tags < 1 or limit < 1 or (per_tag is not None and per_tag < 1):
            raise ValueError(f"{num_tags} tags, {limit} suspects, {per_tag} of a tag: each must be at least 1")
        self.num_tags = num_tags
        self.limit = limit
        self.per_tag = per_tag or min(limit, max(_LEAST_PER_TAG, -(-4 * limit // num_tags)))
        self.num_images = 0
        self._num_positives = np.zeros(num_tags, dtype=np.int64)
        # Group g is the tag g % num_tags of kind g // num_tags; below its floor nothing can come in any more.
        self._floors = np.full(2 * num_tags, -np.inf, dtype=np.float32)
        self._kept = _Candidates.none()
        self._waiting: list[_Candidates] = []

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Look at a batch on the host with its logits, float32 [B, C] on the CPU."""
        if tuple(logits.shape) != (len(batch), self.num_tags):
            raise ValueError(f"logits are {list(logits.shape)}; expected [{len(batch)}, {self.num_tags}]")
        if bool(batch.mirrored.any()):
            raise ValueError("suspects are told on images as they are; evaluate without mirroring")
        scores: NDArray[np.float32] = logits.detach().numpy()
        if scores.size and np.isnan(scores.min()):
            raise DivergedError("logits hold NaN; the model has diverged")
        rows = batch.row_ids.numpy()
        places, tags = (
            found.numpy() for found in tag_coordinates(batch.tag_indices, batch.tag_offsets, len(batch), self.num_tags)
        )
        self.num_images += len(rows)
        self._num_positives += np.bincount(tags, minlength=self.num_tags)
        strong = scores >= self._floors[: self.num_tags]
        strong[places, tags] = False
        place, tag = np.nonzero(strong)
        self._take(_Candidates(tag, scores[place, tag], rows[place]))
        errors = -scores[places, tags]
        weak = errors >= self._floors[self.num_tags + tags]
        self._take(_Candidates(self.num_tags + tags[weak], errors[weak], rows[places[weak]]))

    def merge(self, other: "Suspects") -> None:
        """Add what another collector has seen of other images; the outcome does not depend on who merges whom."""
        if (other.num_tags, other.limit, other.per_tag) != (self.num_tags, self.limit, self.per_tag):
            raise ValueError(
                f"cannot merge suspects of {other.num_tags} tags ({other.limit}, {other.per_tag} a tag) into "
                f"{self.num_tags} ({self.limit}, {self.per_tag} a tag); make both alike"
            )
        self.num_images += other.num_images
        self._num_positives += other._num_positives
        self._waiting += [other._kept, *other._waiting]
        self._compact()

    def strongest(self) -> list[Suspect]:
        """At most `limit` suspects, the strongest first; ties in the order of rows, then tags."""
        self._compact()
        kinds, tags = np.divmod(self._kept.groups, self.num_tags)
        errors = self._kept.errors.astype(np.float64)
        present = self._num_positives[tags].astype(np.float64)
        # Half an image on either side keeps a tag of all images finite.
        commonness = np.log(present + 0.5) - np.log(self.num_images - present + 0.5)
        strengths = errors + np.where(kinds == 1, commonness, 0.0)
        order = np.lexsort((tags, self._kept.rows, -strengths))[: self.limit]
        signed = np.where(kinds == 1, -errors, errors)
        probabilities = 0.5 * (1.0 + np.tanh(0.5 * signed))
        return [
            Suspect(
                int(self._kept.rows[i]), int(tags[i]), _KINDS[kinds[i]], float(probabilities[i]), float(strengths[i])
            )
            for i in order.tolist()
        ]

    def _take(self, found: "_Candidates") -> None:
        self._waiting.append(found)
        if sum(len(some.rows) for some in self._waiting) >= max(_COMPACT_AFTER, len(self._kept.rows) // 2):
            self._compact()

    def _compact(self) -> None:
        """Keep the first `per_tag` of each group by strength, then row; raise the floors of full groups."""
        if not self._waiting:
            return
        everyone = _Candidates.join([self._kept, *self._waiting])
        order = np.lexsort((everyone.rows, -everyone.errors, everyone.groups))
        groups = everyone.groups[order]
        first = np.searchsorted(groups, np.arange(2 * self.num_tags))
        ranks = np.arange(len(groups)) - first[groups]
        self._kept = everyone.picked(order[ranks < self.per_tag])
        last = order[ranks == self.per_tag - 1]
        self._floors[everyone.groups[last]] = everyone.errors[last]
        self._waiting = []


@dataclass(frozen=True)
class _Candidates:
    """groups int64 [N]. errors float32 [N]: how far the logit points to the other answer. rows int64 [N]."""

    groups: NDArray[np.int64]
    errors: NDArray[np.float32]
    rows: NDArray[np.int64]

    @classmethod
    def none(cls) -> "_Candidates":
        return cls(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int64))

    @classmethod
    def join(cls, parts: Sequence["_Candidates"]) -> "_Candidates":
        return cls(
            np.concatenate([part.groups for part in parts]),
            np.concatenate([part.errors for part in parts]),
            np.concatenate([part.rows for part in parts]),
        )

    def picked(self, places: NDArray[np.int64]) -> "_Candidates":
        return _Candidates(self.groups[places], self.errors[places], self.rows[places])


def write_suspects(
    path: Path,
    suspects: Sequence[Suspect],
    index: MetadataIndex,
    tags: Sequence[str],
    facts: Mapping[str, object],
    ontology: Ontology | None = None,
) -> None:
    """Write `suspects.jsonl`, atomically: a header with `facts`, then one suspect a line in the order given.

    tags: names in the order of the model's outputs. ontology: of the model; a present tag that others of the image give
    has them under `implied_by`, as they are what to correct.
    """
    lines = [json_line({"format_version": FORMAT_VERSION, "num_suspects": len(suspects), **facts})]
    for suspect in suspects:
        record = index.record(suspect.row)
        root, image = index.locate(suspect.row)
        by = [] if ontology is None or suspect.kind == "missing" else ontology.givers(tags[suspect.tag], record.tags)
        lines.append(
            json_line(
                {
                    "image": image,
                    "tag": tags[suspect.tag],
                    "kind": suspect.kind,
                    **({"implied_by": by} if by else {}),
                    "score": round(suspect.score, 6),
                    "strength": round(suspect.strength, 4),
                    "tags": record.tags,
                    "rating": record.rating,
                    "root": str(index.roots[root]),
                    "image_id": f"{int(index.image_ids[suspect.row]):016x}",
                    "state": state_of(index.sidecar_record(suspect.row)),
                }
            )
        )
    write_atomic(path, b"".join(lines))
