"""How long a loader may stand still, and how often its processes may be lost: with a clock that tests set."""

import random

from tagger.data.patience import HANG_S, MAX_RESTARTS, RESTART_WINDOW_S, RestartBudget, Stillness
from tagger.data.quarantine import Clock
from tagger.data.ring import START_S


class SetClock(Clock):
    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time


def test_a_restart_a_day_is_put_up_with_for_ever() -> None:
    clock = SetClock()
    budget = RestartBudget(clock)
    for _ in range(365):
        assert budget.take()
        clock.time += 86_400
    assert budget.total == 365
    assert budget.take() and str(budget) == "1 of 3 in 60 minutes, 366 since the start"


def test_no_window_holds_more_restarts_than_are_put_up_with() -> None:
    """Against the plain definition: one is refused exactly when as many as allowed lie in the hour before it."""
    clock, generator = SetClock(), random.Random(0)
    budget = RestartBudget(clock)
    taken: list[float] = []
    refused = 0
    for _ in range(2000):
        clock.time += generator.expovariate(1 / 900)
        allowed = sum(clock.time - time <= RESTART_WINDOW_S for time in taken) < MAX_RESTARTS
        assert budget.take() == allowed
        if allowed:
            taken.append(clock.time)
        refused += not allowed
    assert refused > 100 and len(taken) == budget.total > 100


def test_an_image_that_hangs_its_decoder_each_time_ends_the_run() -> None:
    clock = SetClock()
    budget = RestartBudget(clock)
    for _ in range(MAX_RESTARTS):
        assert budget.take()
        clock.time += START_S + HANG_S  # the slowest start, and then the hang
    assert not budget.take()


def test_stillness_lasts_until_something_moves() -> None:
    clock = SetClock()
    stillness = Stillness(clock)
    for second in range(30):
        assert stillness.seconds(("image", 7)) == second
        clock.time += 1
    assert stillness.seconds(("image", 8)) == 0
    clock.time += 1
    assert stillness.seconds(("image", 8)) == 1


def test_time_in_which_this_process_was_stopped_is_not_held_against_a_loader() -> None:
    clock = SetClock()
    stillness = Stillness(clock)
    stillness.seconds(0)
    clock.time += 100_000
    assert stillness.seconds(0) < HANG_S / 10
