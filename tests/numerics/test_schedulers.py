"""Schedules against their closed forms and torch's; then what holds for every step."""

import logging
import math
from itertools import pairwise
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from Configuration_System import OptimizerSection, SchedulerSection
from schedulers import (
    SCHEDULES,
    CosineAnnealingWarmupRestarts,
    Course,
    CourseSchedule,
    LinearWarmupCosineLR,
    apply,
    create_scheduler,
    scale_learning_rates,
)


def test_warmup_cosine_equals_its_closed_form():
    total, warmup, low = 97, 13, 0.05
    schedule = LinearWarmupCosineLR(total, warmup, low)
    for step in range(total + 20):
        if step < warmup:
            expected = (step + 1) / (warmup + 1)
        elif step < total:
            expected = low + (1 - low) / 2 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        else:
            expected = low
        assert schedule.factor(step) == pytest.approx(expected, rel=1e-13)


def test_cosine_without_warmup_equals_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.4)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.4 * 0.1)
    schedule = LinearWarmupCosineLR(50, 0, 0.1)
    for step in range(50):
        assert 0.4 * schedule.factor(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        reference.step()


def test_equal_cycles_without_warmup_equal_torch_warm_restarts():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10, eta_min=0.2)
    schedule = CosineAnnealingWarmupRestarts(30, num_cycles=3, min_lr_ratio=0.2)
    for step in range(30):
        assert schedule.factor(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        reference.step()


def test_restarts_equal_their_closed_form():
    # Cycles of 20, 40 and 80 steps, with 5, 10 and 20 steps of warm-up and peaks of 1, 1/2 and 1/4.
    schedule = CosineAnnealingWarmupRestarts(140, 3, 0.25, cycle_multiplier=2.0, cycle_decay=0.5, min_lr_ratio=0.1)
    assert schedule.cycle_starts() == (0, 20, 60, 140)
    for start, length, peak in ((0, 20, 1.0), (20, 40, 0.5), (60, 80, 0.25)):
        warmup = length // 4
        for within in range(length):
            if within < warmup:
                share = (within + 1) / (warmup + 1)
            else:
                share = (1 + math.cos(math.pi * (within - warmup) / (length - warmup))) / 2
            assert schedule.factor(start + within) == pytest.approx(0.1 + (peak - 0.1) * share, rel=1e-13)
    assert schedule.factor(140) == schedule.factor(10_000) == 0.1


def test_one_cycle_from_zero_is_the_plain_schedule():
    restarts = CosineAnnealingWarmupRestarts(80, 1, warmup_fraction=0.25)
    plain = LinearWarmupCosineLR(80, 20)
    assert [restarts.factor(step) for step in range(90)] == pytest.approx([plain.factor(step) for step in range(90)])


@pytest.mark.parametrize(
    "schedule",
    [LinearWarmupCosineLR(1), LinearWarmupCosineLR(1, 0, 1.0), CosineAnnealingWarmupRestarts(1)],
)
def test_a_run_of_one_step_moves_at_the_full_rate(schedule):
    assert schedule.factor(0) == 1.0
    assert schedule.factor(1) == schedule.min_lr_ratio


def test_warmup_over_the_whole_run_is_allowed():
    assert [LinearWarmupCosineLR(3, 3, 0.5).factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 0.5]


@given(
    total=st.integers(1, 3000),
    warmup_share=st.floats(0, 1),
    low=st.floats(0, 1),
)
def test_warmup_cosine_rises_to_one_then_falls_to_its_minimum(total, warmup_share, low):
    warmup = int(warmup_share * total)
    schedule = LinearWarmupCosineLR(total, warmup, low)
    factors = [schedule.factor(step) for step in range(total + 2)]
    assert factors[0] > 0
    assert all(earlier < later for earlier, later in pairwise(factors[:warmup]))
    assert all(earlier >= later for earlier, later in pairwise(factors[warmup:]))
    assert factors[-1] == low
    if warmup < total:
        assert factors[warmup] == max(factors) == 1.0


@given(
    total=st.integers(1, 2000),
    num_cycles=st.integers(1, 12),
    fraction=st.floats(0, 0.99),
    multiplier=st.floats(0.5, 3),
    decay=st.floats(0, 1),
    low=st.floats(0, 1),
)
def test_restarts_fill_the_run_and_stay_between_minimum_and_peak(total, num_cycles, fraction, multiplier, decay, low):
    try:
        schedule = CosineAnnealingWarmupRestarts(total, num_cycles, fraction, multiplier, decay, low)
    except ValueError as error:
        assume("cycle" not in str(error))
        raise
    starts = schedule.cycle_starts()
    assert starts[0] == 0
    assert starts[-1] == total
    assert len(starts) == num_cycles + 1
    for cycle, (start, end) in enumerate(pairwise(starts)):
        assert end > start
        peak = max(decay**cycle, low)
        factors = [schedule.factor(step) for step in range(start, end)]
        assert max(factors) == pytest.approx(peak)
        assert min(factors) >= low - 1e-15
    assert schedule.factor(0) > 0
    assert schedule.factor(total) == low


def test_a_factor_depends_on_the_step_alone():
    schedule = CosineAnnealingWarmupRestarts(50, 4, 0.1, 1.5, 0.7, 0.01)
    forward = [schedule.factor(step) for step in range(60)]
    assert [schedule.factor(step) for step in reversed(range(60))] == forward[::-1]


def test_cycles_of_any_growth_are_computed_without_overflow():
    with pytest.raises(ValueError, match="leave a cycle without a step"):
        CosineAnnealingWarmupRestarts(100_000, 2000, cycle_multiplier=1e9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LinearWarmupCosineLR(0), "total_steps=0"),
        (lambda: LinearWarmupCosineLR(10, 11), "warmup_steps=11"),
        (lambda: LinearWarmupCosineLR(10, -1), "warmup_steps=-1"),
        (lambda: LinearWarmupCosineLR(10, 0, 1.5), "min_lr_ratio=1.5"),
        (lambda: LinearWarmupCosineLR(10).factor(-1), "step=-1"),
        (lambda: CosineAnnealingWarmupRestarts(10).factor(-1), "step=-1"),
        (lambda: CosineAnnealingWarmupRestarts(10, 0), "num_cycles=0"),
        (lambda: CosineAnnealingWarmupRestarts(10, 11), "num_cycles=11"),
        (lambda: CosineAnnealingWarmupRestarts(10, 4, cycle_multiplier=9.0), "without a step"),
        (lambda: CosineAnnealingWarmupRestarts(10, 2, warmup_fraction=1.0), "warmup_fraction=1.0"),
        (lambda: CosineAnnealingWarmupRestarts(10, 2, cycle_multiplier=0.0), "cycle_multiplier=0.0"),
        (lambda: CosineAnnealingWarmupRestarts(10, 2, cycle_decay=1.1), "cycle_decay=1.1"),
        (lambda: create_scheduler(SchedulerSection(), 0), "total_steps=0"),
        (lambda: SCHEDULES.get("cosine_restart"), "cosine_restarts"),
    ],
)
def test_bad_arguments_are_refused_with_what_was_found(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_configured_names_are_the_registered_ones():
    assert set(get_args(get_type_hints(SchedulerSection)["name"])) == set(SCHEDULES.names())


def test_create_scheduler_builds_what_the_recipe_names():
    plain = create_scheduler(SchedulerSection(warmup_fraction=0.1, min_lr_ratio=0.2), 200)
    assert plain == LinearWarmupCosineLR(200, 20, 0.2)
    section = SchedulerSection("cosine_restarts", 0.2, 0.1, num_cycles=2, cycle_multiplier=1.5, cycle_decay=0.5)
    assert create_scheduler(section, 200) == CosineAnnealingWarmupRestarts(200, 2, 0.2, 1.5, 0.5, 0.1)


def test_the_warmup_of_a_recipe_always_leaves_a_step_at_the_peak():
    assert create_scheduler(SchedulerSection(warmup_fraction=0.99), 1) == LinearWarmupCosineLR(1, 0, 0.01)


@pytest.mark.parametrize(
    "schedule", [LinearWarmupCosineLR(40, 10, 0.1), CosineAnnealingWarmupRestarts(40, 2, 0.25, min_lr_ratio=0.1)]
)
def test_between_whole_steps_a_schedule_runs_on_smoothly(schedule):
    assert [schedule.factor(float(step)) for step in range(41)] == [schedule.factor(step) for step in range(41)]
    for step in range(19):
        low, high = sorted((schedule.factor(step), schedule.factor(step + 1)))
        assert low < schedule.factor(step + 0.5) < high


def test_a_schedule_that_is_stretched_falls_at_every_update():
    course = Course(400, start_step=20, start_share=0.8)
    schedule = CourseSchedule(LinearWarmupCosineLR(400), course)
    factors = [schedule.factor(step) for step in range(20, 400)]
    assert all(earlier > later for earlier, later in pairwise(factors))
    assert factors[0] == pytest.approx(LinearWarmupCosineLR(400).factor(320))
    assert schedule.factor(400) == 0.0


def two_groups(**options: object) -> torch.optim.Optimizer:
    first, second = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    return torch.optim.AdamW([{"params": [first]}, {"params": [second], "lr": 0.5}], lr=0.1, **options)


def test_apply_scales_every_group_from_its_own_base():
    optimizer = two_groups()
    schedule = LinearWarmupCosineLR(10, 4)
    for step in (0, 3, 7, 3):
        factor = apply(schedule, optimizer, step)
        assert factor == schedule.factor(step)
        assert [group["lr"] for group in optimizer.param_groups] == [0.1 * factor, 0.5 * factor]


def test_apply_keeps_the_base_through_the_state_dict():
    schedule = LinearWarmupCosineLR(10, 4)
    optimizer, resumed = two_groups(), two_groups()
    apply(schedule, optimizer, 1)
    resumed.load_state_dict(optimizer.state_dict())
    apply(schedule, resumed, 6)
    assert resumed.param_groups[1]["lr"] == 0.5 * schedule.factor(6)


def test_apply_fills_a_tensor_learning_rate_in_place():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=torch.tensor(0.1))
    rate = optimizer.param_groups[0]["lr"]
    for step in (0, 2):
        apply(LinearWarmupCosineLR(4, 3), optimizer, step)
        assert optimizer.param_groups[0]["lr"] is rate
        assert rate.item() == pytest.approx(0.1 * (step + 1) / 4)


def test_learning_rates_grow_with_the_square_root_of_the_batch(caplog):
    section = OptimizerSection(learning_rate=1e-3, muon_learning_rate=0.02, base_batch_size=64)
    with caplog.at_level(logging.INFO):
        scaled = scale_learning_rates(section, 256)
    assert (scaled.learning_rate, scaled.muon_learning_rate) == (2e-3, 0.04)
    assert scaled.weight_decay == section.weight_decay and scaled.betas == section.betas
    (record,) = caplog.records
    assert "learning rates times 2: updates of 256 images, tuned at optimizer.base_batch_size=64" in record.message


def test_learning_rates_without_a_base_are_left_alone(caplog):
    section = OptimizerSection()
    with caplog.at_level(logging.INFO):
        assert scale_learning_rates(section, 256) is section
    assert not caplog.records
