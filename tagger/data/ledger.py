"""What became of the images of one loader: judged in the order of its batches, by whoever consumes them.

Workers of any kind only report; here refused files are counted against the budget and remembered in the quarantine.
"""

import logging
from collections import Counter
from collections.abc import Sequence

from tagger.data.batch_job import Outcome
from tagger.data.index import MetadataIndex
from tagger.data.quarantine import FailureBudget, Refusal
from tagger.data.quarantine_log import KnownBad, Quarantine
from tagger.data.scan import printable

logger = logging.getLogger(__name__)


class ImageLedger:
    """Refused, partial and mended files of a loader. For one thread."""

    def __init__(self, index: MetadataIndex, budget: FailureBudget, quarantine: Quarantine) -> None:
        self._index = index
        self._budget = budget
        self.quarantine = quarantine
        self._partial: dict[str, None] = {}
        self.num_missed_cache = 0

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Files left out so far, and why."""
        return self._budget.refusals

    @property
    def partial(self) -> tuple[str, ...]:
        """Truncated files used in part so far."""
        return tuple(self._partial)

    @property
    def num_quarantined(self) -> int:
        """Files that are in quarantine now, whichever loader of the run met them."""
        return self.quarantine.num_files

    def known_bad(self) -> KnownBad:
        """Files that need not be tried again."""
        return self.quarantine.known_bad()

    def judge(self, outcomes: Sequence[Outcome]) -> None:
        """Count what was used and what was refused; raises DataFailureError past the failure budget."""
        for outcome in outcomes:
            if outcome.refused is not None:
                self.quarantine.record(outcome.refused)
                self._budget.refuse(outcome.refused)
                continue
            self._budget.accept()
            self.num_missed_cache += outcome.missed_cache
            if outcome.partial:
                self._partial[self._name(outcome)] = None
            if outcome.mended:
                self.quarantine.clear(self._name(outcome))

    def report(self) -> None:
        """One line about what is not as it should be, if anything is."""
        counts = Counter(refusal.reason for refusal in self.refusals)
        counts.update({"partial": len(self._partial)})
        if counts.total():
            listed = ", ".join(f"{reason} {count}" for reason, count in counts.most_common() if count)
            logger.info("images left out or used in part so far: %s; in quarantine: %d", listed, self.num_quarantined)

        if self.num_missed_cache:
            message = "%d images so far came from their files, as they are not in the shrink cache"
            logger.info(message, self.num_missed_cache)

    def _name(self, outcome: Outcome) -> str:
        return printable(self._index.image_path(outcome.row))
