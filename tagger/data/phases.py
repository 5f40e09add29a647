"""Phases of a run, each with its share of the images seen: where one ends and the next begins.

The phase of an update is a function of the position before it, so a run resumes inside any phase by its position alone,
and recipes with other shares, epochs or batches go on from it as their own plan says. Refuses nothing: the
configuration has checked the shares.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tagger.data.epoch_order import EpochOrder


@dataclass(frozen=True)
class PhasePlan:
    """starts: images of the run before each phase, counted by places in its epochs; ascending, the first 0."""

    starts: tuple[int, ...]
    images_an_epoch: int
    num_epochs: int

    @classmethod
    def create(cls, shares: Sequence[float], num_epochs: int, orders: Sequence[EpochOrder]) -> "PhasePlan":
        """shares: of all images seen, one for each phase, together 1. orders: those of the phases' loaders.

        A phase starts at an update; with aspect buckets where a window of its own order does (see `BucketPlan`), so
        that it resumes there without images that come a second time.
        """
        images_an_epoch = len(orders[0].plan.sampler)
        starts = [0]
        for before, order in zip(_sums(shares[:-1]), orders[1:], strict=True):
            epoch, samples = divmod(round(before * images_an_epoch * num_epochs), images_an_epoch)
            starts.append(max(starts[-1], epoch * images_an_epoch + order.plan.start_near(samples)))
        return cls(tuple(starts), images_an_epoch, num_epochs)

    def phase_at(self, epoch: int, position: Mapping[str, int] | None) -> int:
        """The phase of the update after a position in an epoch; None: after nothing of it."""
        # What is no position at all is the loader's to refuse.
        done = 0 if position is None else position.get("whole", position.get("samples", 0))
        return bisect_right(self.starts, epoch * self.images_an_epoch + done) - 1


def _sums(shares: Sequence[float]) -> list[float]:
    return [math.fsum(shares[: count + 1]) for count in range(len(shares))]
