"""The learning rate as a pure function of the step: no state, so that resuming needs the step alone.

A schedule's ``factor(step)`` multiplies each parameter group's base learning rate; ``step`` counts the updates already
made, so the first update is at step 0. Between whole steps it runs on smoothly.

Refuses schedules that do not fit into the steps of the run.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Protocol, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from Configuration_System import OptimizerSection, SchedulerSection
from tagger.errors import InputError
from tagger.registry import Registry

logger = logging.getLogger(__name__)


class Schedule(Protocol):
    """Base learning rate multiplier as a function of the step, which need not be whole: a bent run is between two."""

    def factor(self, step: float) -> float:
        """Multiplier for the update made after ``step`` updates."""
        ...


def _check_step(step: float) -> None:
    if step < 0:
        raise ValueError(f"step={step} is below 0; steps count the updates already made")


def _check_common(total_steps: int, min_lr_ratio: float) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps={total_steps} is below 1; a run needs at least one update")
    if not 0 <= min_lr_ratio <= 1:
        raise ValueError(f"min_lr_ratio={min_lr_ratio} is not between 0 and 1; use a share, e.g. 0.01")


def _cosine(progress: float) -> float:
    """Half a cosine from 1 (progress 0) to 0 (progress 1)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class LinearWarmupCosineLR:
    """A straight rise to 1, then half a cosine down to ``min_lr_ratio``, where it stays.

    Step ``s`` of ``w`` warm-up steps has factor ``(s+1) / (w+1)``: the first update already moves, and the peak is
    reached once, at step ``w``. From there ``min + (1-min) * (1 + cos(pi * (s-w) / (total-w))) / 2``.
    """

    total_steps: int
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check_common(self.total_steps, self.min_lr_ratio)
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} is not between 0 and total_steps={self.total_steps}")

    def factor(self, step: float) -> float:
        """Multiplier for the update made after ``step`` updates."""
        _check_step(step)
        if step >= self.total_steps:
            return self.min_lr_ratio
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * _cosine(progress)


@dataclass(frozen=True)
class CosineAnnealingWarmupRestarts:
    """Cycles of a straight rise from ``min_lr_ratio`` to a peak and half a cosine back, filling the run exactly.

    Each cycle is ``cycle_multiplier`` times as long as the one before it and peaks ``cycle_decay`` times as high (never
    below ``min_lr_ratio``). ``warmup_fraction`` is the share of a cycle spent rising; step ``s`` of its ``w`` warm-up
    steps has factor ``min + (peak-min) * (s+1) / (w+1)``. Past the end it stays at ``min_lr_ratio``.
    """

    total_steps: int
    num_cycles: int = 1
    warmup_fraction: float = 0.0
    cycle_multiplier: float = 1.0
    cycle_decay: float = 1.0
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check_common(self.total_steps, self.min_lr_ratio)
        if self.num_cycles < 1:
            raise ValueError(f"num_cycles={self.num_cycles} is below 1; 1 is a single cosine")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction={self.warmup_fraction} is not in 0 <= x < 1; try 0.05")
        if not (math.isfinite(self.cycle_multiplier) and self.cycle_multiplier > 0):
            raise ValueError(f"cycle_multiplier={self.cycle_multiplier} is not above 0; 1 keeps cycles equally long")
        if not 0 <= self.cycle_decay <= 1:
            raise ValueError(f"cycle_decay={self.cycle_decay} is not between 0 and 1; 1 keeps peaks equally high")
        if self.num_cycles > self.total_steps:
            raise ValueError(f"num_cycles={self.num_cycles} is more than total_steps={self.total_steps}; use fewer")
        starts = self.cycle_starts()
        if any(end <= start for start, end in pairwise(starts)):
            raise ValueError(
                f"{self.num_cycles} cycles with cycle_multiplier={self.cycle_multiplier} leave a cycle without a step "
                f"in {self.total_steps} steps; use fewer cycles, or a cycle_multiplier nearer to 1"
            )

    def cycle_starts(self) -> tuple[int, ...]:
        """First step of each cycle, and ``total_steps`` last: ``num_cycles + 1`` numbers."""
        # Lengths relative to the longest cycle, so that no power overflows.
        longest = self.num_cycles - 1 if self.cycle_multiplier > 1 else 0
        lengths = [self.cycle_multiplier ** (cycle - longest) for cycle in range(self.num_cycles)]
        ends = list(accumulate(lengths))
        return (0, *(round(self.total_steps * end / ends[-1]) for end in ends))

    def factor(self, step: float) -> float:
        """Multiplier for the update made after ``step`` updates."""
        _check_step(step)
        if step >= self.total_steps:
            return self.min_lr_ratio
        starts = self.cycle_starts()
        cycle = sum(start <= step for start in starts) - 1
        length, within = starts[cycle + 1] - starts[cycle], step - starts[cycle]
        warmup_steps = _warmup_steps(self.warmup_fraction, length)
        height = max(self.cycle_decay**cycle, self.min_lr_ratio) - self.min_lr_ratio
        if within < warmup_steps:
            return self.min_lr_ratio + height * (within + 1) / (warmup_steps + 1)
        return self.min_lr_ratio + height * _cosine((within - warmup_steps) / (length - warmup_steps))


def _warmup_steps(fraction: float, steps: int) -> int:
    """A share of the steps in whole steps, one of which is always left for the peak."""
    return min(round(fraction * steps), steps - 1)


ScheduleFactory: TypeAlias = Callable[[SchedulerSection, int], Schedule]
SCHEDULES: Registry[ScheduleFactory] = Registry("scheduler")


@SCHEDULES.register("linear_warmup_cosine")
def _linear_warmup_cosine(section: SchedulerSection, total_steps: int) -> Schedule:
    return LinearWarmupCosineLR(total_steps, _warmup_steps(section.warmup_fraction, total_steps), section.min_lr_ratio)


@SCHEDULES.register("cosine_restarts")
def _cosine_restarts(section: SchedulerSection, total_steps: int) -> Schedule:
    return CosineAnnealingWarmupRestarts(
        total_steps,
        section.num_cycles,
        section.warmup_fraction,
        section.cycle_multiplier,
        section.cycle_decay,
        section.min_lr_ratio,
    )


def create_scheduler(section: SchedulerSection, total_steps: int) -> Schedule:
    """The schedule that a recipe names, over ``total_steps`` updates; InputError where it does not fit into them."""
    factory = SCHEDULES.get(section.name)
    try:
        _check_common(total_steps, section.min_lr_ratio)
        return factory(section, total_steps)
    except ValueError as error:
        raise InputError(f"scheduler.name={section.name} does not fit this run: {error}") from error


@dataclass(frozen=True)
class Course:
    """Where a run stands on its schedule: at update ``start_step`` a share ``start_share`` of it was done.

    From there the rest of the schedule is spread over the updates up to ``total_steps``. A run that was never bent is
    (total, 0, 0.0) and follows its schedule step by step.
    """

    total_steps: int
    start_step: int = 0
    start_share: float = 0.0
    # Where the run ends, when that is not where its schedule does.
    end_step: int | None = None


def plan_course(before: Course | None, step: int, updates_left: int, updates_in_all: int, on_change: str) -> Course:
    """The course of a run that has made ``step`` updates and has ``updates_left``; ``before`` is what it was on.

    ``updates_in_all``: of a run like this from its start, with the present settings and images. Where the end has moved
    (other batch size, epochs or images), ``on_change`` says what the learning rate does. "rescale": the rest of the
    schedule is spread over the updates left, from the share that such a run would have behind it in the same place, so
    that another batch size alone does not move it. The share is one of updates, which is what the schedule counts:
    phases make theirs of different numbers of images. "keep": the old course, which may end early or late. "error":
    InputError.
    """
    total_steps = step + updates_left
    if before is None:
        return Course(total_steps)
    end_before = before.end_step or before.total_steps
    if end_before == total_steps:
        return before
    moved = f"the run was to end at update {end_before} and now ends at {total_steps}"
    if on_change == "error":
        raise InputError(
            f"{moved}; bring back batch size, accumulation, epochs and images, or say what the learning rate should do "
            "with checkpoint.on_schedule_change=rescale or keep"
        )
    if on_change == "keep":
        logger.warning("%s; the learning rate keeps to its old course", moved)
        return replace(before, end_step=total_steps)
    share = 1.0 - updates_left / updates_in_all if updates_left else 1.0
    logger.warning("%s; the learning rate goes on from %.1f %% of its schedule", moved, 100 * share)
    return Course(total_steps, step, share)


@dataclass(frozen=True)
class CourseSchedule:
    """A schedule followed along a course: ``inner`` spans ``course.total_steps`` steps as if run from its start."""

    inner: Schedule
    course: Course

    def factor(self, step: float) -> float:
        """Multiplier for the update made after ``step`` updates."""
        course = self.course
        if course.start_step == 0:
            return self.inner.factor(step)
        left = max(1, course.total_steps - course.start_step)
        share = course.start_share + (1.0 - course.start_share) * (step - course.start_step) / left
        return self.inner.factor(min(share * course.total_steps, course.total_steps))


def scale_learning_rates(section: OptimizerSection, images_an_update: int) -> OptimizerSection:
    """The section with its learning rates, tuned with updates of ``base_batch_size`` images, for those of this run.

    They grow with the square root, as suits Adam's kind of step (Malladi et al. 2022; betas and eps, which the paper
    moves too, stay). Without a ``base_batch_size`` the section is returned as it is.
    """
    if section.base_batch_size is None:
        return section
    factor = math.sqrt(images_an_update / section.base_batch_size)
    message = "learning rates times %.3g: updates of %d images, tuned at optimizer.base_batch_size=%d"
    logger.info(message, factor, images_an_update, section.base_batch_size)
    return replace(
        section,
        learning_rate=section.learning_rate * factor,
        muon_learning_rate=section.muon_learning_rate * factor,
    )


def apply(schedule: Schedule, optimizer: Optimizer, step: int, scale: float = 1.0) -> float:
    """Set every group's ``lr`` to its ``initial_lr`` times the factor at ``step`` times ``scale``; returns the product.

    A group's ``initial_lr`` is its ``lr`` when it is first seen, and travels with the optimizer's state dict. An ``lr``
    that is a tensor is filled in place, so that a captured or compiled update sees the change.
    """
    factor = schedule.factor(step) * scale
    for group in optimizer.param_groups:
        base = group.setdefault("initial_lr", float(group["lr"]))
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(base * factor)
        else:
            group["lr"] = base * factor
    return factor
