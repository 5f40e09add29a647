"""What is collected of one kind of weights beside the counts, and everything that is then said about them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from tagger.batch import Batch
from tagger.evaluation.document import Scores, TagList
from tagger.evaluation.tag_details import TagDetails
from tagger.metrics.hierarchy import HierarchyMetrics
from tagger.metrics.keys import logit_of
from tagger.metrics.ranking import ScoredImages
from tagger.metrics.summary import score_tags, summarise
from tagger.metrics.thresholds import Decisions, TagThresholds
from tagger.ontology import TagRelations


class Collector(Protocol):
    """Looks at every batch of an evaluation."""

    def add(self, batch: Batch, logits: Tensor) -> None:
        """batch: on the host. logits: float32 [B, C] on the CPU."""
        ...


@dataclass(frozen=True)
class Watch:
    """The collectors of one kind of weights, at the thresholds `fitted` for it or else at one for all tags."""

    threshold: float
    fitted: TagThresholds | None
    details: TagDetails | None
    hierarchy: HierarchyMetrics | None
    others: tuple[Collector, ...]

    @classmethod
    def create(
        cls,
        num_tags: int,
        threshold: float,
        fitted: TagThresholds | None,
        named: Sequence[int],
        relations: TagRelations | None,
        others: Sequence[Collector | None],
    ) -> "Watch":
        """threshold: a probability. named: tags to look at closely. others: further collectors, or None."""
        logits = np.full(num_tags, logit_of(threshold)) if fitted is None else fitted.logits
        return cls(
            threshold,
            fitted,
            TagDetails(named, num_tags, logits) if named else None,
            None if relations is None else HierarchyMetrics(relations, num_tags, logits),
            tuple(collector for collector in others if collector is not None),
        )

    @property
    def collectors(self) -> list[Collector]:
        """All of them."""
        own = [collector for collector in (self.details, self.hierarchy) if collector is not None]
        return [*own, *self.others]

    def scores(
        self,
        weights: str,
        kind: str,
        scalars: Mapping[str, float],
        metrics: Mapping[str, object],
        scored: ScoredImages,
        tags: TagList,
        at_one: Decisions | None = None,
    ) -> Scores:
        """Everything, once all images have gone by; `scored` at the same thresholds. at_one: see `Scores`."""
        tag_scores = score_tags(scored)
        return Scores(
            weights=weights,
            kind=kind,
            scalars=scalars,
            metrics=metrics,
            summary=summarise(scored, tags.training_counts, tags.categories, tag_scores),
            tags=tag_scores,
            threshold=self.threshold,
            fitted=self.fitted,
            at_one=at_one,
            hierarchy=None if self.hierarchy is None else self.hierarchy.compute(),
            details=() if self.details is None else self.details.details(scored),
        )
