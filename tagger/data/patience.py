"""How long a loader may stand still, and how often its processes may be lost.

Refuses to count time in which this process did not run either (stopped with Ctrl-Z, suspended by a batch system, asleep
with the machine): nothing moved then, and nothing is to blame.
"""

from collections import deque

from tagger.data.quarantine import SYSTEM_CLOCK, Clock

# A loader that begins no image for so long while a batch is waited for is hung; storage is retried more often.
HANG_S = 50.0
# Longer than MAX_RESTARTS rounds of the slowest start and a hang (18 minutes), so that an image that hangs its decoder
# each time ends the run; and at a hang each, the restarts put up with cost 4 % of the hour.
MAX_RESTARTS = 3
RESTART_WINDOW_S = 3600.0
# Of the time between two looks no more is counted: this process did not run, or nobody waited.
_LONGEST_LOOK_S = 2.0


class Stillness:
    """For how long something has not moved. For one thread."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._mark: object = None
        self._looked = clock.now()
        self._seconds = 0.0

    def seconds(self, mark: object) -> float:
        """Seconds since `mark`, which says how far it is, was last another; ask every second or so."""
        now = self._clock.now()
        passed = min(now - self._looked, _LONGEST_LOOK_S)
        self._seconds = self._seconds + passed if mark == self._mark else 0.0
        self._mark, self._looked = mark, now
        return self._seconds


class RestartBudget:
    """MAX_RESTARTS in any RESTART_WINDOW_S, so that one a day ends no run of weeks. For one thread at a time."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._times: deque[float] = deque()
        self.total = 0

    def take(self) -> bool:
        """Whether one more is put up with; it is counted then."""
        now = self._clock.now()
        while self._times and now - self._times[0] > RESTART_WINDOW_S:
            self._times.popleft()
        if len(self._times) >= MAX_RESTARTS:
            return False
        self._times.append(now)
        self.total += 1
        return True

    def __str__(self) -> str:
        hour = f"{len(self._times)} of {MAX_RESTARTS} in {RESTART_WINDOW_S / 60:.0f} minutes"
        return hour if self.total == len(self._times) else f"{hour}, {self.total} since the start"
