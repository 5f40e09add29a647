"""Left-out updates end a run when they are too many, and losses that stand out are told apart."""

import math
import random

import pytest
import torch

from tagger.errors import DivergedError
from tagger.guard import MAX_IN_A_ROW, MAX_IN_WINDOW, WINDOW, SpikeWatch, UpdateGuard

CPU = torch.device("cpu")


def feed(guard: UpdateGuard, pattern: dict[int, bool], steps: range) -> None:
    for step in steps:
        guard.add(step, torch.tensor(pattern.get(step, False)), [torch.tensor([step, step + 1])])


def test_three_in_a_row_are_put_up_with_and_the_fourth_is_not() -> None:
    guard = UpdateGuard(CPU)
    feed(guard, {1: True, 2: True, 3: True, 5: True, 6: True, 7: True}, range(1, 8))
    with pytest.raises(DivergedError, match=rf"{MAX_IN_A_ROW + 1} updates in a row .* step 8") as caught:
        feed(guard, {8: True}, range(8, 9))
    assert caught.value.row_ids == (8, 9) and caught.value.step == 8


def test_ten_in_a_thousand_are_put_up_with_and_the_eleventh_is_not() -> None:
    bad = {1 + 90 * number: True for number in range(MAX_IN_WINDOW + 1)}
    guard = UpdateGuard(CPU)
    with pytest.raises(DivergedError, match=f"{MAX_IN_WINDOW + 1} of the last {WINDOW} updates"):
        feed(guard, bad, range(1, WINDOW))
    sparse = {1 + 101 * number: True for number in range(30)}
    feed(UpdateGuard(CPU), sparse, range(1, 3 * WINDOW))


def test_the_count_goes_on_after_a_resume() -> None:
    first = UpdateGuard(CPU)
    feed(first, {1: True, 2: True, 3: True}, range(1, 4))
    second = UpdateGuard(CPU)
    second.load_state_dict(first.state_dict())
    with pytest.raises(DivergedError, match="4 updates in a row"):
        feed(second, {4: True}, range(4, 5))


def test_a_spike_stands_six_sigma_above_the_steps_before() -> None:
    source = random.Random(3)
    watch = SpikeWatch()
    assert not watch.is_spike(1e9), "nothing to compare with yet"
    watch = SpikeWatch()
    assert not any(watch.is_spike(source.gauss(5.0, 0.5)) for _ in range(500))
    copy = SpikeWatch()
    copy.load_state_dict(watch.state_dict())
    assert watch.is_spike(9.5) and copy.is_spike(9.5)
    assert not watch.is_spike(0.1), "a low loss is no spike"
    assert not watch.is_spike(math.nan)
