"""Watches a training loop for numbers that go wrong, without waiting for the device: left-out updates and loss spikes.

An update that is not finite is left out on the device. A few are put up with; more than MAX_IN_A_ROW one after another,
or more than MAX_IN_WINDOW in WINDOW steps, end the run: it would only pretend to train. A spike is a loss far above
what the last SPIKE_WINDOW steps have shown; it is reported, no more.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tagger.checkpoint.format import Json
from tagger.errors import DivergedError

MAX_IN_A_ROW = 3
MAX_IN_WINDOW = 10
WINDOW = 1000
SPIKE_SIGMAS = 6.0
SPIKE_WINDOW = 128
_SPIKE_MIN_SEEN = 32
# Flags on their way from the device; more than are ever under way, since the host is at most a few steps ahead.
_RING = 64


class UpdateGuard:
    """Takes a flag of each update from the device and ends the run when too many say that it was left out.

    The flag is copied asynchronously and looked at once it has arrived: at the same step on a CPU, a few steps later
    on a GPU, which costs nothing since left-out updates change nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._ring = torch.zeros(_RING, dtype=torch.bool, pin_memory=self._on_cuda)
        self._events: list[Any] = [cast(Any, torch.cuda).Event() for _ in range(_RING)] if self._on_cuda else []
        self._under_way: deque[tuple[int, int, Sequence[Tensor]]] = deque()
        self._next = 0
        self._in_a_row = 0
        self._bad_steps: deque[int] = deque()

    def add(self, step: int, left_out: Tensor, row_ids: Sequence[Tensor]) -> None:
        """Take in the update after `step` updates: `left_out` bool scalar on the device, `row_ids` on the host.

        Raises DivergedError with the rows of the newest bad update that has been seen.
        """
        slot, self._next = self._next, (self._next + 1) % _RING
        if len(self._under_way) == _RING:
            self._settle(wait=True)
        self._ring[slot].copy_(left_out, non_blocking=self._on_cuda)
        if self._on_cuda:
            self._events[slot].record()
        self._under_way.append((step, slot, row_ids))
        self._settle()

    def flush(self) -> None:
        """Look at every flag, waiting for the device; raises DivergedError as `add` does."""
        while self._under_way:
            self._settle(wait=True)

    def _settle(self, wait: bool = False) -> None:
        while self._under_way:
            step, slot, row_ids = self._under_way[0]
            if self._on_cuda and not self._events[slot].query():
                if not wait:
                    return
                self._events[slot].synchronize()
            self._under_way.popleft()
            wait = False
            self._judge(step, bool(self._ring.numpy()[slot]), row_ids)

    def _judge(self, step: int, left_out: bool, row_ids: Sequence[Tensor]) -> None:
        while self._bad_steps and self._bad_steps[0] <= step - WINDOW:
            self._bad_steps.popleft()
        if not left_out:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self._bad_steps.append(step)
        if self._in_a_row > MAX_IN_A_ROW:
            found = f"{self._in_a_row} updates in a row were not finite"
        elif len(self._bad_steps) > MAX_IN_WINDOW:
            found = f"{len(self._bad_steps)} of the last {WINDOW} updates were not finite"
        else:
            return
        raise DivergedError(
            f"{found} (the last at step {step}; its images are in diverged.json); "
            "lower optimizer.learning_rate, or look at these images",
            step,
            tuple(int(row) for rows in row_ids for row in rows.tolist()),
        )

    def state_dict(self) -> dict[str, Json]:
        """As JSON values; waits for the device."""
        self.flush()
        return {"in_a_row": self._in_a_row, "bad_steps": cast(list[Json], list(self._bad_steps))}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on counting."""
        values = cast(Mapping[str, Any], state)
        self._in_a_row = values["in_a_row"]
        self._bad_steps = deque(values["bad_steps"])


class SpikeWatch:
    """Tells losses that stand out: more than SPIKE_SIGMAS standard deviations above the mean of those before."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Take in a step's loss and say whether it stands out. One that is not finite is none, and is not kept."""
        if not math.isfinite(loss):
            return False
        spike = False
        if len(self._recent) >= _SPIKE_MIN_SEEN:
            mean = statistics.fmean(self._recent)
            spike = loss > mean + SPIKE_SIGMAS * statistics.pstdev(self._recent, mean)
        self._recent.append(loss)
        return spike

    def state_dict(self) -> dict[str, Json]:
        """As JSON values."""
        return {"recent": cast(list[Json], list(self._recent))}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from saved losses."""
        self._recent = deque(cast(Any, state["recent"]), maxlen=SPIKE_WINDOW)
