"""What became of the images of one loader: judged in the order of its batches, by whoever consumes them.

Workers of any kind only report; here refused files are counted against the budget and remembered in the quarantine.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence

from tagger.data.batch_job import Outcome
from tagger.data.index import MetadataIndex
from tagger.data.quarantine import FailureBudget, Refusal
from tagger.data.quarantine_log import KnownBad, Quarantine
from tagger.data.scan import printable

logger = logging.getLogger(__name__)


class ImageLedger:
    """Refused, partial and mended files of a loader. For one thread. `purpose` names the loader in the log."""

    def __init__(self, index: MetadataIndex, budget: FailureBudget, quarantine: Quarantine, purpose: str) -> None:
        self._index = index
        self._purpose = purpose
        self._speaker = _Speaker(purpose)
        self._refused_rows: set[int] = set()
        self._budget = budget
        self.quarantine = quarantine
        self._partial: dict[str, None] = {}
        self.num_missed_cache = 0

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Files left out so far and not used since, and why."""
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
                if outcome.row not in self._refused_rows:
                    self._speaker.say(outcome.refused.path, str(outcome.refused))
                    self._refused_rows.add(outcome.row)
                self.quarantine.record(outcome.refused)
                self._budget.refuse(outcome.refused)
                continue
            came_back = outcome.row in self._refused_rows
            self._refused_rows.discard(outcome.row)
            self._budget.accept(self._name(outcome) if came_back else None)
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
            message = "images left out of %s or used in part, so far: %s; in quarantine: %d"
            logger.info(message, self._purpose, listed, self.num_quarantined)
        if self.num_missed_cache:
            message = "%d images of %s so far came from their files, as they are not in the shrink cache"
            logger.info(message, self.num_missed_cache, self._purpose)

    def _name(self, outcome: Outcome) -> str:
        return printable(self._index.image_path(outcome.row))


class _Speaker:
    """Logs the first refusals one by one, then one line for many."""

    _FIRST_LINES = 10
    _INTERVAL_S = 30.0

    def __init__(self, purpose: str) -> None:
        self._purpose = purpose
        self._num_said = 0
        self._num_held_back = 0
        self._last = time.monotonic()

    def say(self, name: str, reason: str) -> None:
        now = time.monotonic()
        if self._num_said >= self._FIRST_LINES and now - self._last < self._INTERVAL_S:
            self._num_held_back += 1
            return
        more = f" (and {self._num_held_back} more since the last such line)" if self._num_held_back else ""
        logger.warning("left out of %s: %s: %s%s", self._purpose, name, reason, more)
        self._num_said, self._num_held_back, self._last = self._num_said + 1, 0, now
