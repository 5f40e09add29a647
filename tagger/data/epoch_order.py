"""Where the batches of a plan lie in an epoch: positions given out, resumed from, and what is left after one.

Refuses a position of another order of images (see `tagger.data.position`).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from tagger.data.batch_plan import BatchPlan, Grouping, Spans
from tagger.data.position import Position, carry_over, check_position, identified

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpochOrder:
    """The batches of `plan`, in positions of the order that `identity` names."""

    plan: BatchPlan
    identity: Mapping[str, int]

    def position(self, samples: int, epoch: int) -> Position:
        """After `samples` of an epoch."""
        grouping = self.plan.grouping(samples)
        extra = {"grouping": grouping.hash, "whole": grouping.whole} if grouping is not None else {}
        return identified({"epoch": epoch, "samples": samples, **extra}, self.identity)

    def sample_at(self, position: Mapping[str, int]) -> int:
        """The sample to go on from; before the position's own where the order of this epoch has changed since.

        Raises PositionError for a position of another seed, other rows or other sampling.
        """
        grouped = check_position(position, self.identity)
        grouping = Grouping(position["grouping"], position.get("whole", 0)) if grouped else None
        return self.plan.resume_at(position["samples"], grouping)

    def go_to(self, position: Mapping[str, int]) -> int:
        """`sample_at`; logs how many images come again."""
        start, samples = self.sample_at(position), position["samples"]
        if start < samples:
            message = "the order of this epoch has changed with the batches: %d images of it come a second time"
            logger.warning(message, samples - start)
        return start

    def carry_over(self, position: Mapping[str, int]) -> Position:
        """A position of this order in place of one of other images, split, sampling or corrections.

        Itself where nothing has changed; see `tagger.data.position.carry_over`.
        """
        spans = self.plan.spans(0)
        start, end = (self.position(samples, position["epoch"]) for samples in (0, spans.pieces[-1][1]))
        return carry_over(position, self.identity, spans.step, start, end)

    def rest(self, epoch: int, position: Mapping[str, int] | None) -> "EpochRest":
        """What is left of an epoch after a position in it; None: all of it."""
        start = 0 if position is None else self.sample_at(position)
        return EpochRest(self, epoch, self.plan.spans(start))


@dataclass(frozen=True)
class EpochRest:
    """The batches of one rank from some sample of an epoch to its end."""

    order: EpochOrder
    epoch: int
    spans: Spans

    def __len__(self) -> int:
        return len(self.spans)

    def position_after(self, num_batches: int) -> Position:
        """The position after the first `num_batches` of them; 1 or more."""
        return self.order.position(self.spans.done_after(num_batches), self.epoch)
