"""When a run is saved and which checkpoints may go: pure functions of steps and seconds, which read no clock or disk.

Refuses settings that would keep nothing.
"""

from collections.abc import Iterable, Set
from dataclasses import dataclass

from tagger.cadence import due


@dataclass(frozen=True)
class SavePolicy:
    """How often to save (`every_steps`, and `every_minutes` after the last save) and what to keep.

    Kept are the newest `keep_last` steps and, as history, every multiple of `keep_every`, which is also saved. None
    turns a rule off.
    """

    keep_last: int = 3
    keep_every: int | None = None
    every_steps: int | None = None
    every_minutes: float | None = None

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ValueError(f"keep_last={self.keep_last} is below 1; the newest checkpoint is always kept")
        for name in ("keep_every", "every_steps", "every_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} is not above 0; None turns it off")

    def due(self, step: int, seconds_since_save: float) -> bool:
        """Whether to save once `step` steps are complete, the last save being that many seconds ago."""
        if any(due(step, every) for every in (self.every_steps, self.keep_every) if every is not None):
            return True
        return self.every_minutes is not None and step > 0 and seconds_since_save >= 60 * self.every_minutes

    def is_history(self, step: int) -> bool:
        """Whether checkpoints of this step are never deleted."""
        return self.keep_every is not None and due(step, self.keep_every)

    def removable(self, newest_first: Iterable[tuple[str, int]], protected: Set[str]) -> list[str]:
        """Names that may go, of checkpoints as (name, step), newest first; never the first, never a protected one.

        Several checkpoints of one step, as a run leaves that went back, count once, the newest standing for them.
        """
        seen: set[int] = set()
        names = []
        for name, step in newest_first:
            stands = step not in seen
            seen.add(step)
            kept = stands and (len(seen) <= self.keep_last or self.is_history(step))
            if not kept and name not in protected:
                names.append(name)
        return names
