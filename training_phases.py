"""Phases of a run (`training.phases`): what a recipe means by them, the loader of each, and what is told of them.

A phase has its image size, batch, learning rate and augmentation; a run without phases is one phase. Refuses phases
that get no update.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from Configuration_System import AugmentSection, FullConfig, PhaseSection
from dataset_loader import DataLoader
from tagger.data.augment import BatchAugment, Op
from tagger.data.phases import PhasePlan
from tagger.data.windows import Feed
from tagger.errors import InputError
from tagger.preprocess import Preprocess

logger = logging.getLogger(__name__)

_FAR = 0.03  # of the run: how far from its place a phase begins without a word


@dataclass(frozen=True)
class Phase:
    """A phase of a run: its section of the configuration with every null put in."""

    image_size: int
    share: float
    batch_size: int
    learning_rate_factor: float
    patch_dropout: float
    augment: AugmentSection


def resized_batch(config: FullConfig, image_size: int) -> int:
    """Images of this size with no more patches than a batch of the recipe, which is of `data.image_size`.

    From 16 up a multiple of 8, which products of matrices are fast with, unless that is less than the recipe's own.
    """
    own = config.training.batch_size
    fitting = own * config.data.image_size**2 // image_size**2
    return fitting if fitting < 16 else max(own, fitting // 8 * 8)


def rate_by_batch(config: FullConfig, batch_size: int) -> float:
    """What `optimizer.base_batch_size` makes of learning rates for another batch than `training.batch_size`."""
    scaled = config.optimizer.base_batch_size is not None
    return math.sqrt(batch_size / config.training.batch_size) if scaled else 1.0


def resolve_phases(config: FullConfig) -> tuple[Phase, ...]:
    """The phases of a run; without `training.phases` it is one.

    Where a phase does not say, its batches are of as many patches as `training.batch_size` images of `data.image_size`.
    """
    sections = config.training.phases or [PhaseSection(config.data.image_size)]
    before = math.fsum(section.share or 0.0 for section in sections[:-1])
    return tuple(
        Phase(
            section.image_size,
            1.0 - before if section.share is None or number == len(sections) else section.share,
            batch_size := section.batch_size or resized_batch(config, section.image_size),
            section.learning_rate_factor * rate_by_batch(config, batch_size),
            config.model.patch_dropout if section.patch_dropout is None else section.patch_dropout,
            section.augment or config.augment,
        )
        for number, section in enumerate(sections, 1)
    )


def open_phases(config: FullConfig, train_loader: DataLoader) -> tuple[tuple[Phase, ...], Feed]:
    """The phases of a run, and what feeds them: `train_loader`, in other sizes where there are phases."""
    data, patch_size, phases = config.data, config.model.resolved_patch_size, resolve_phases(config)
    red, green, blue = data.background
    loaders = [train_loader]
    if config.training.phases:
        sizes = [
            Preprocess.create(
                each.image_size, data.fit, patch_size, (red, green, blue), decode_scaling=data.decode_scaling
            )
            for each in phases
        ]
        loaders = [train_loader.resized(size, each.batch_size) for size, each in zip(sizes, phases, strict=True)]
    orders = [loader.order for loader in loaders]
    plan = PhasePlan.create([phase.share for phase in phases], config.training.num_epochs, orders)
    return phases, Feed(loaders, plan, config.training.accumulation_steps)


def require_updates(phases: Sequence[Phase], feed: Feed, left: Sequence[int], now: int | None) -> None:
    """Raise InputError where a phase still to come gets none of the updates left, and warn where it starts elsewhere.

    now: the phase that the run goes on in, those up to which are not looked at; None: it starts.
    """
    plan = feed.plan
    edges = [*(start / plan.images_an_epoch for start in plan.starts), plan.num_epochs]
    shares = [0.0, *accumulate(phase.share for phase in phases)]
    for number, (phase, updates) in enumerate(zip(phases, left, strict=True)):
        begins, asked = edges[number], shares[number] * plan.num_epochs
        if now is not None and number <= now:
            continue
        name = f"training.phases, item {number + 1} of {len(phases)}"
        if not updates:
            raise InputError(
                f"{name}: no update is left for its {phase.image_size} px (it was to go from {asked:.4g} to "
                f"{shares[number + 1] * plan.num_epochs:.4g} of {plan.num_epochs} epochs and goes from {begins:.4g} to "
                f"{edges[number + 1]:.4g}); use fewer phases, another share, smaller batches or, where data.fit is "
                "buckets, data.fit=letterbox, with which a phase can begin anywhere"
            )
        if abs(begins - asked) > _FAR * plan.num_epochs:
            message = (
                "%s begins at %.4g epochs and not at %.4g, as the shares say: with data.fit=buckets a phase begins "
                "where a window of batches does; with data.fit=letterbox anywhere"
            )
            logger.warning(message, name, begins, asked)


def describe_phases(phases: Sequence[Phase], feed: Feed, left: Sequence[int]) -> Iterator[str]:
    """Each phase for people: its images, and the updates left of it."""
    for number, (phase, start) in enumerate(zip(phases, feed.plan.starts, strict=True)):
        epochs = start / feed.plan.images_an_epoch
        yield (
            f"phase {number + 1} of {len(phases)}: {phase.image_size} px in batches of {phase.batch_size}, from "
            f"{epochs:.4g} epochs on; {left[number]} updates to come"
        )


def create_augments(config: FullConfig, phases: Sequence[Phase]) -> tuple[BatchAugment, ...]:
    """The operations of each phase; InputError, naming the phase, for one that is out of its range."""
    built = []
    for number, phase in enumerate(phases, 1):
        try:
            built.append(create_augment(phase.augment, config.data.background))
        except InputError as error:
            if phase.augment is config.augment:
                raise
            raise InputError(f"training.phases, item {number}: {error}") from error
    return tuple(built)


def create_augment(section: AugmentSection, background: Sequence[int]) -> BatchAugment:
    """The operations of a section, on images with this background."""
    red, green, blue = background
    operations = {name: op and Op(op.probability, op.strength) for name, op in vars(section).items()}
    return BatchAugment(**operations, fill=(red, green, blue))
