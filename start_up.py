"""From a configuration to the parts of a run: data, model, optimizer, state, and where its weights come from.

Refuses, with InputError, what cannot be trained as asked, before anything is written that would have to be undone.
"""

import json
import logging
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from Configuration_System import FullConfig, OptimizerSection, changed_settings, split_changes
from dataset_loader import DataLoader
from model_architecture import TaggerModel
from Monitor_log import TrainingMonitor
from schedulers import Course, CourseSchedule, Schedule, create_scheduler, plan_course, scale_learning_rates
from tagger.alerts import Alerts
from tagger.boundary import StepBoundary
from tagger.checkpoint.follower import CheckpointFollower
from tagger.checkpoint.format import LoadedCheckpoint, list_checkpoints, read_checkpoint
from tagger.config_io import digest, flat_values, save_yaml
from tagger.data.augment import BatchAugment
from tagger.data.windows import Feed
from tagger.data.yardstick import yardstick_sha256
from tagger.distributed import ALONE, Ranks
from tagger.errors import InputError
from tagger.guard import UpdateGuard
from tagger.launch import launched_as
from tagger.meter import TrainingMeter
from tagger.objective import TrainingObjective
from tagger.ontology import ONTOLOGY_FILE
from tagger.ontology_file import require_unchanged
from tagger.parallel import Parallel, require_shardable, synchronise_norms
from tagger.run_folder import RunFolder, config_path, probe_checkpoints, resume_origin
from tagger.stop import StopRequest
from tagger.transfer import find_initial_weights, start_from
from training_phases import Phase, create_augments, describe_phases, open_phases, require_updates
from training_utils import (
    CheckpointManager,
    EarlyStopping,
    ExponentialMovingAverage,
    MixedPrecisionTrainer,
    TrainState,
    compile_model,
    create_optimizer,
    resolve_device,
    seed_everything,
)
from validation_loop import Criterion, build_criterion, open_data_and_model
from vocabulary import TagVocabulary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """Everything that the loop uses, built once."""

    config: FullConfig
    folder: RunFolder
    ranks: Ranks
    device: torch.device
    vocabulary: TagVocabulary
    train_loader: DataLoader
    validation_loader: DataLoader
    model: TaggerModel
    parameters: tuple[torch.nn.Parameter, ...]
    phases: tuple[Phase, ...]
    augments: tuple[BatchAugment, ...]  # of the phases
    feed: Feed
    criterion: Criterion
    objective: torch.nn.Module
    parallel: Parallel
    learning_rate: float  # of the head, before the schedule
    schedule: Schedule
    state: TrainState
    boundary: StepBoundary
    guard: UpdateGuard
    meter: TrainingMeter
    manager: CheckpointManager | CheckpointFollower
    monitor: TrainingMonitor
    stop: StopRequest
    alerts: Alerts
    total_steps: int


def check(config: FullConfig) -> str:
    """What a run would use, for people; raises InputError for the first thing that would stop it. Writes nothing.

    Of a run that goes on no checkpoint is read: what its place in the run means for the rest is not looked at.
    """
    folder, resume, training = RunFolder.beside(config.run.folder), config.checkpoint.resume, config.training
    if resume != "none":
        resume_origin(folder.path, resume)
    rank, world_size = launched_as()
    try:
        require_shardable(
            training.parallel, Ranks(0, max(2, world_size)), config.optimizer.name, config.model.num_members
        )
    except InputError as error:
        if world_size > 1:
            raise
        logger.warning("in one process this trains, in several it does not: %s", error)
    share = (rank, world_size)
    vocabulary, train_loader, validation_loader, model = open_data_and_model(
        config, folder.vocabulary_path, share=share
    )
    is_new = resume == "none" or (resume == "auto" and not list_checkpoints(folder.checkpoints_dir))
    if is_new and config.checkpoint.init_from is not None:
        start_from(model, find_initial_weights(Path(config.checkpoint.init_from)), vocabulary.tags)
    build_criterion(config, vocabulary)
    device = resolve_device(training.device)
    MixedPrecisionTrainer(training.mixed_precision, device)
    create_optimizer(scaled_rates(config, world_size), model)
    phases, feed = open_phases(config, train_loader)
    updates = feed.left(None, 0)
    create_scheduler(config.scheduler, max(sum(updates), 1))
    create_augments(config, phases)
    if is_new:
        require_updates(phases, feed, updates, None)
    return (
        f"ready: {train_loader.num_rows} training and {validation_loader.num_rows} validation images, "
        f"{len(vocabulary)} tags, {model.num_parameters() / 1e6:.1f} M parameters on {device}"
    )


def build(
    config: FullConfig, folder: RunFolder, stop: StopRequest, alerts: Alerts | None = None, ranks: Ranks = ALONE
) -> Parts:
    """Everything that the loop needs, for a fresh run and for one that goes on; without `alerts` nobody is told.

    Every one of `ranks` calls it; rank 0 alone writes into the folder.
    """
    training, alerts = config.training, alerts or Alerts(None)
    require_shardable(training.parallel, ranks, config.optimizer.name, config.model.num_members)
    device = resolve_device(training.device)
    seed_everything(training.seed)
    vocabulary, train_loader, validation_loader, model = open_for_all(config, folder, ranks)
    yardstick = measured_with(config, vocabulary, validation_loader)
    facts = {"configuration": digest(nameless(config)), "vocabulary": vocabulary.sha256}
    ranks.require_same({**facts, "data set": json.dumps(train_loader.order.identity), "validation part": yardstick})
    manager = open_checkpoints(config, folder, vocabulary, yardstick, ranks)
    # Where the weights come from, the first that applies: 1. the checkpoint to resume from (with checkpoint.resume=auto
    # there may be none); 2. the weights of another run (checkpoint.init_from); 3. scratch.
    loaded = find_checkpoint(config, folder, manager, ranks)
    if loaded is None and config.checkpoint.init_from is not None:
        start_from(model, find_initial_weights(Path(config.checkpoint.init_from)), vocabulary.tags)
    model.to(device)
    synchronise_norms(model, ranks, device)
    criterion = build_criterion(config, vocabulary).to(device)
    parallel = Parallel(TrainingObjective(model, criterion, config.loss.chunk_tags), model, ranks, training.parallel)
    rates = scaled_rates(config, ranks.world_size)
    state = TrainState(
        model,
        create_optimizer(rates, model),
        MixedPrecisionTrainer(training.mixed_precision, device),
        None if training.ema_decay is None else ExponentialMovingAverage(model, training.ema_decay),
        EarlyStopping.from_config(training, config.checkpoint.best_metric, yardstick),
    )
    phases, feed = open_phases(config, train_loader)
    if loaded is not None:
        state.restore(loaded)
        logger.info("resumed from %s: step %d, epoch %d", loaded.path, state.step, state.epoch + 1)
        if state.position is not None:
            state.position = feed.loader_at(state.position, state.epoch).order.carry_over(state.position)
    remaining = feed.left(state.position, state.epoch)
    place = feed.plan.phase_at(state.epoch, state.position)
    left = sum(remaining)
    saved = cast(dict[str, Any], state.extra)
    course = plan_course(
        None if loaded is None else Course(**saved["course"]),
        state.step,
        left,
        sum(feed.left(None, 0)),
        config.checkpoint.on_schedule_change,
    )
    state.extra["course"] = asdict(course)
    # Before anything is written, since it refuses what does not fit into so many updates.
    schedule = CourseSchedule(create_scheduler(config.scheduler, max(course.total_steps, 1)), course)
    if len(phases) > 1:
        require_updates(phases, feed, remaining, None if loaded is None else place)
        for line in describe_phases(phases, feed, remaining):
            logger.info("%s", line)
    guard, meter = UpdateGuard(device), TrainingMeter()
    if loaded is not None:
        guard.load_state_dict(saved["guard"])
        meter.load_state_dict(saved["meter"], device)
        before, now = saved.get("image_size"), phases[place].image_size
        if before not in (None, now):
            logger.warning("this place in the run was in the phase of %d px and is in that of %d px now", before, now)
        if not left:
            nothing_left(training.num_epochs, state, yardstick)
    if isinstance(manager, CheckpointManager):
        manager.before_write = folder.require_ours
        manager.on_wait = lambda why: alerts.send(
            "waiting for the disk", f"{folder.name}: {why}", run=folder.name, status="running", reason=why
        )
        manager.reserve(state)
        manager.report_room(state.stand_ins(), state.step, state.step + left)
        save_yaml(config, folder.config_path)
        # Before the vocabulary, whose presence says that all there is of the tags' meaning is there.
        if train_loader.dataset.ontology is not None:
            train_loader.dataset.ontology.save(folder.ontology_path)
        vocabulary.save(folder.vocabulary_path)
    if compile_model(model, training.compile, device):
        criterion.use_compiled()
    return Parts(
        config=config,
        folder=folder,
        ranks=ranks,
        device=device,
        vocabulary=vocabulary,
        train_loader=train_loader,
        validation_loader=validation_loader,
        model=model,
        parameters=tuple(p for p in model.parameters() if p.requires_grad),
        phases=phases,
        augments=create_augments(config, phases),
        feed=feed,
        criterion=criterion,
        objective=parallel.objective,
        parallel=parallel,
        learning_rate=rates.learning_rate,
        schedule=schedule,
        state=state,
        boundary=StepBoundary(model, device),
        guard=guard,
        meter=meter,
        manager=manager,
        monitor=TrainingMonitor(
            config.monitor,
            folder,
            total_steps=state.step + left,
            resume_step=None if loaded is None else state.step,
            settings=flat_values(config),
            silent=not ranks.is_main,
        ),
        stop=stop,
        alerts=alerts,
        total_steps=state.step + left,
    )


def open_for_all(
    config: FullConfig, folder: RunFolder, ranks: Ranks
) -> tuple[TagVocabulary, DataLoader, DataLoader, TaggerModel]:
    """Data and model as `open_data_and_model` gives them: rank 0 builds what must be built, the others read that."""
    share = (ranks.rank, ranks.world_size)
    if ranks.alone:
        probe_checkpoints(folder.path)
        return open_data_and_model(config, folder.vocabulary_path, folder.quarantine_path, share)
    with tempfile.TemporaryDirectory() as place:
        meaning = RunFolder.beside(Path(place))
        if ranks.is_main:
            probe_checkpoints(folder.path)
            opened = open_data_and_model(config, folder.vocabulary_path, folder.quarantine_path, share)
            vocabulary, train_loader = opened[:2]
            if train_loader.dataset.ontology is not None:
                train_loader.dataset.ontology.save(meaning.ontology_path)
            vocabulary.save(meaning.vocabulary_path)
            ranks.broadcast({path.name: path.read_text(encoding="utf-8") for path in Path(place).iterdir()})
        else:
            for name, text in ranks.broadcast(None).items():
                (Path(place) / name).write_text(text, encoding="utf-8")
            opened = open_data_and_model(config, meaning.vocabulary_path, folder.quarantine_path, share)
    return opened


def open_checkpoints(
    config: FullConfig, folder: RunFolder, vocabulary: TagVocabulary, yardstick: str, ranks: Ranks
) -> CheckpointManager | CheckpointFollower:
    """The run's checkpoints, which rank 0 writes."""
    if not ranks.is_main:
        return CheckpointFollower(yardstick, sharded=config.training.parallel == "fsdp")
    return CheckpointManager.from_config(
        folder.checkpoints_dir,
        config.checkpoint,
        vocabulary_sha256=vocabulary.sha256,
        config_sha256=digest(nameless(config)),
        yardstick=yardstick,
    )


def find_checkpoint(
    config: FullConfig, folder: RunFolder, manager: CheckpointManager | CheckpointFollower, ranks: Ranks
) -> LoadedCheckpoint | None:
    """What the run goes on from: rank 0 chooses it, every rank reads it; None for a fresh start."""
    if config.checkpoint.resume == "none":
        return None
    if not isinstance(manager, CheckpointManager):
        chosen = ranks.broadcast(None)
        return None if chosen is None else read_checkpoint(Path(chosen))
    loaded = choose_checkpoint(config, folder, manager)
    ranks.broadcast(None if loaded is None else str(loaded.path))
    return loaded


def scaled_rates(config: FullConfig, world_size: int) -> OptimizerSection:
    """The optimizer's settings with the learning rates of updates of as many images as those of `world_size` ranks."""
    images_an_update = config.training.batch_size * config.training.accumulation_steps * world_size
    return scale_learning_rates(config.optimizer, images_an_update)


def nameless(config: FullConfig) -> FullConfig:
    """The settings less what a run is called, where it lies and how it was started."""
    run, checkpoint = replace(config.run, name=None, output_dir="runs"), replace(config.checkpoint, resume="none")
    return replace(config, run=run, checkpoint=checkpoint)


def measured_with(config: FullConfig, vocabulary: TagVocabulary, validation: DataLoader) -> str:
    """Hash of what `checkpoint.best_metric` is measured with: held-out images, their tags and what else moves it."""
    metric, options = config.checkpoint.best_metric, validation.options
    settings = {
        "vocabulary": vocabulary.sha256,
        "preprocess": options.preprocess.to_json(),
        "max_pixels": options.max_pixels,
        "partial_images": options.partial_images,
        "logits": "float32",  # before, rounded to the precision of training
        "threshold": config.validation.threshold if metric.startswith("val/f1") else None,
        "loss": asdict(config.loss) if metric == "val/loss" else None,
    }
    return yardstick_sha256(validation.dataset.table, validation.rows, settings)


def nothing_left(num_epochs: int, state: TrainState, yardstick: str) -> None:
    """Say that a run goes no further; weights that were never scored as they are owe a validation before it ends."""
    more = "raise training.num_epochs to go on"
    if state.epoch >= num_epochs:
        message = (
            "training.num_epochs=%d, but the run is in epoch %d already (step %d): nothing is trained, and the run "
            "ends here with weights trained for longer than asked; %s"
        )
        logger.warning(message, num_epochs, state.epoch + 1, state.step, more)
    else:
        logger.info("all %d epochs are done (step %d): nothing is left to train; %s", num_epochs, state.step, more)
    if state.extra.get("validated") != [state.step, yardstick]:
        state.extra["owed_validation"] = state.epoch


def choose_checkpoint(config: FullConfig, folder: RunFolder, manager: CheckpointManager) -> LoadedCheckpoint | None:
    """The checkpoint to go on from, saying what has changed since; None where there is none yet."""
    origin = resume_origin(folder.path, config.checkpoint.resume)
    for change in changed_settings(config_path(origin), config):
        if change.startswith("vocabulary."):
            raise InputError(
                f"{change}: a run keeps the tags that it started with; set it back, or start a new run with "
                f"--init-from {origin}, which carries over the tags that both know"
            )
        logger.warning("changed since this run last started: %s", change)
    moved = split_changes(config_path(origin), config)
    if moved and (config.data.calib_fraction or config.data.test_fraction):
        raise InputError(
            f"{moved[0]}: calibration and test images would be among those that this run has trained on; set it back, "
            "or start a new run"
        )
    if moved:
        logger.warning(
            "%s: images that this run has trained on may be validation images now; scores from here on are flattered "
            "and do not tell how it does on new images",
            "; ".join(moved),
        )
    if config.vocabulary.ontology_file is not None and (origin / ONTOLOGY_FILE).exists():
        require_unchanged(Path(config.vocabulary.ontology_file), origin / ONTOLOGY_FILE)
    auto = config.checkpoint.resume == "auto"
    loaded = manager.load("latest" if auto else config.checkpoint.resume)
    if loaded is None:
        logger.info("%s holds no checkpoint: starting fresh", folder.checkpoints_dir)
    return loaded
