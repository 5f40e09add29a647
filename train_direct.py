"""The run: build, loop, close. One direct training loop over sidecar-JSON data sets.

Refuses to write into an existing run without --resume. Exit codes: 0 done, 2 bad configuration or input, 1 anything
else (the traceback is in train.log), 130/143 stopped by a signal with a checkpoint.
"""

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from Configuration_System import FullConfig, changed_settings, check_paths, load_config
from dataset_loader import DataLoader
from model_architecture import SimplifiedTagger
from Monitor_log import TrainingMonitor
from schedulers import Schedule, apply, create_scheduler
from tagger.artifact import TagRow, save_artifact
from tagger.cadence import due
from tagger.config_io import digest, flat_values, save_yaml
from tagger.data.augment import BatchAugment, Op
from tagger.data.windows import Window, accumulation_windows, windows_left
from tagger.errors import DivergedError, InputError, RunFailedError
from tagger.logs import log_to_console
from tagger.meter import TrainingMeter
from tagger.rng import mix
from tagger.run_folder import BestResult, RunFolder, RunResults, Status, code_commit
from tagger.stop import StopRequest
from training_utils import (
    CheckpointManager,
    EarlyStopping,
    ExponentialMovingAverage,
    MixedPrecisionTrainer,
    TrainState,
    compile_model,
    create_optimizer,
    load_weights,
    resolve_device,
    seed_everything,
)
from validation_loop import Criterion, Evaluation, build_criterion, evaluate, open_data_and_model
from vocabulary import TagVocabulary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """Everything that the loop uses, built once."""

    config: FullConfig
    folder: RunFolder
    device: torch.device
    vocabulary: TagVocabulary
    train_loader: DataLoader
    validation_loader: DataLoader
    model: SimplifiedTagger
    parameters: tuple[torch.nn.Parameter, ...]
    augment: BatchAugment
    criterion: Criterion
    schedule: Schedule
    state: TrainState
    manager: CheckpointManager
    monitor: TrainingMonitor
    stop: StopRequest
    total_steps: int


def train_step(parts: Parts, window: Window) -> tuple[Tensor, Tensor]:
    """One update: the loss summed over the window's images and the gradient norm, both scalars on the device."""
    config, state = parts.config, parts.state
    total = torch.zeros((), device=parts.device)
    for host in window.batches:
        keys = mix(config.training.seed, window.epoch, host.row_ids.numpy())
        batch = host.to(parts.device, non_blocking=True)
        images = parts.augment(batch.images, keys)
        with state.precision.autocast():
            logits = parts.model(images, batch.valid_sizes)
        loss = parts.criterion(logits, batch.tag_indices, batch.tag_offsets)
        # Divided by the window's own images, so that a short last window weighs each image as much as any other.
        state.precision.backward(loss / window.num_images)
        total += loss.detach()
    apply(parts.schedule, state.optimizer, state.step)
    grad_norm = state.precision.step(state.optimizer, parts.parameters, config.training.clip_grad_norm)
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update()
    return total, grad_norm


def validate(parts: Parts, epoch: int) -> Evaluation:
    """Score the held-out images with the averaged weights where they are kept, and log everything about it."""
    config, state, monitor = parts.config, parts.state, parts.monitor
    with state.ema.swapped() if state.ema is not None else contextlib.nullcontext():
        evaluation = evaluate(
            parts.model,
            parts.validation_loader,
            parts.criterion,
            state.precision,
            parts.device,
            num_tags=len(parts.vocabulary),
            threshold=config.validation.threshold,
            num_samples=config.monitor.sample_images,
        )
    monitor.log(evaluation.scalars, state.step, epoch)
    monitor.log_histogram("val/average_precision", evaluation.metrics["average_precision"], state.step)
    monitor.log_predictions(
        "val/samples", evaluation.samples, parts.vocabulary.tags, config.validation.threshold, state.step
    )
    state.extra["final"] = dict(evaluation.scalars)
    return evaluation


def train(parts: Parts) -> None:
    """The loop: fetch, step, then perhaps log, validate, save, stop."""
    config, state, monitor = parts.config, parts.state, parts.monitor
    training = config.training
    feed = accumulation_windows(
        parts.train_loader, state.position, state.epoch, training.num_epochs, training.accumulation_steps
    )
    meter = TrainingMeter(parts.device)
    started = time.perf_counter() - state.seconds
    stopping = False
    while state.step < parts.total_steps and not stopping:
        asked = time.perf_counter()
        window = next(feed)
        waited_s = time.perf_counter() - asked

        loss, grad_norm = train_step(parts, window)
        state.step += 1
        state.epoch, state.position = window.epoch, dict(window.position)
        state.samples_seen += window.num_images
        state.seconds = time.perf_counter() - started
        meter.add(loss, grad_norm, window.num_images, waited_s, seconds=time.perf_counter() - asked)

        if due(state.step, config.monitor.log_every_steps):
            learning_rate = config.optimizer.learning_rate * parts.schedule.factor(state.step - 1)
            scalars = meter.read(state.step, learning_rate, state.precision.nonfinite_steps)
            monitor.log(scalars, state.step, window.epoch)
        monitor.advance(state.step)

        evaluation = None
        last = state.step == parts.total_steps
        if window.ends_epoch and (due(window.epoch + 1, config.validation.every_epochs) or last):
            evaluation = validate(parts, window.epoch)
            if state.early_stopping is not None:
                stopping = state.early_stopping.update(evaluation.scalars[config.checkpoint.best_metric])
        stopping = stopping or parts.stop.requested

        if evaluation is not None or due(state.step, config.checkpoint.every_steps) or stopping or last:
            parts.manager.save(state, evaluation.scalars if evaluation else None)
            write_results(parts, "running")


def write_results(parts: Parts, status: Status, error: str | None = None) -> None:
    """`results.json` as of now; `final` are the scores of the newest validation."""
    state, best = parts.state, parts.manager.best
    RunResults(
        status=status,
        best=None if best is None else BestResult(best.metric, best.value, best.step),
        final=cast(dict[str, float], state.extra.get("final", {})),
        seconds=state.seconds,
        images_per_second=state.samples_seen / state.seconds if state.seconds else None,
        steps=state.step,
        commit=code_commit(),
        vocabulary_sha256=parts.vocabulary.sha256,
        error=error,
    ).write(parts.folder.results_path)


def write_model(parts: Parts) -> None:
    """`model/`: the best validation's weights (the average where it is kept) and all that prediction needs."""
    best = parts.manager.best
    if best is None:
        logger.warning("no validation was completed, so there is no model/ yet; continue with --resume latest")
        return
    weights = load_weights(parts.folder.checkpoints_dir / best.checkpoint)
    vocabulary = parts.vocabulary
    rows = zip(vocabulary.tags, vocabulary.categories, vocabulary.counts.tolist(), strict=True)
    save_artifact(
        parts.folder.model_dir,
        weights=weights.tensors,
        model_config=parts.model.config.to_dict(),
        tags=[TagRow(name, category, count) for name, category, count in rows],
        vocabulary_file=parts.folder.vocabulary_path,
        preprocess_json=parts.validation_loader.preprocess.to_json(),
        metadata={
            "run": parts.folder.name,
            "step": best.step,
            "threshold": parts.config.validation.threshold,
            "vocabulary_sha256": vocabulary.sha256,
            "metric": best.metric,
            "metric_value": best.value,
            "exclusive_ratings": parts.config.loss.rating_weight is not None,
        },
    )
    logger.info("model/ holds the %s weights of step %d: %s %.4f", weights.kind, best.step, best.metric, best.value)


def check(config: FullConfig) -> str:
    """What a run would use, for people; raises InputError for the first thing that would stop it. Writes nothing."""
    vocabulary, train_loader, validation_loader, model = open_data_and_model(
        config, config.run.folder / "vocabulary.json"
    )
    build_criterion(config, vocabulary)
    device = resolve_device(config.training.device)
    return (
        f"ready: {train_loader.num_rows} training and {validation_loader.num_rows} validation images, "
        f"{len(vocabulary)} tags, {model.num_parameters() / 1e6:.1f} M parameters on {device}"
    )


def build(config: FullConfig, folder: RunFolder, stop: StopRequest) -> Parts:
    """Everything that the loop needs, for a fresh run and for one that goes on."""
    training = config.training
    device = resolve_device(training.device)
    seed_everything(training.seed)
    vocabulary, train, validation, model = open_data_and_model(config, folder.vocabulary_path, folder.quarantine_path)
    model.to(device)
    state = TrainState(
        model,
        create_optimizer(config.optimizer, model),
        MixedPrecisionTrainer(training.mixed_precision, device),
        None if training.ema_decay is None else ExponentialMovingAverage(model, training.ema_decay),
        EarlyStopping.from_config(training, config.checkpoint.best_metric),
    )
    manager = CheckpointManager(
        folder.checkpoints_dir,
        config.checkpoint.keep_last,
        config.checkpoint.best_metric,
        vocabulary_sha256=vocabulary.sha256,
        config_sha256=digest(config),
    )
    # Where the weights come from, the first that applies: 1. the checkpoint to resume from; 2. scratch.
    resumed = config.checkpoint.resume != "none" and resume(config, folder, manager, state)
    left = windows_left(train, state.position, state.epoch, training.num_epochs, training.accumulation_steps)
    total_steps = state.step + left
    planned = state.extra.setdefault("total_steps", total_steps)
    if planned != total_steps:
        logger.warning("the run ends at step %d now, not %s; the learning rate follows", total_steps, planned)
        state.extra["total_steps"] = total_steps
    save_yaml(config, folder.config_path)
    vocabulary.save(folder.vocabulary_path)
    compile_model(model, training.compile, device)
    red, green, blue = config.data.background
    operations = {name: op and Op(op.probability, op.strength) for name, op in vars(config.augment).items()}
    return Parts(
        config=config,
        folder=folder,
        device=device,
        vocabulary=vocabulary,
        train_loader=train,
        validation_loader=validation,
        model=model,
        parameters=tuple(p for p in model.parameters() if p.requires_grad),
        augment=BatchAugment(**operations, fill=(red, green, blue)),
        criterion=build_criterion(config, vocabulary).to(device),
        schedule=create_scheduler(config.scheduler, max(total_steps, 1)),
        state=state,
        manager=manager,
        monitor=TrainingMonitor(
            config.monitor,
            folder,
            total_steps=total_steps,
            resume_step=state.step if resumed else None,
            settings=flat_values(config),
        ),
        stop=stop,
        total_steps=total_steps,
    )


def resume(config: FullConfig, folder: RunFolder, manager: CheckpointManager, state: TrainState) -> bool:
    """Put the run's state back, saying from where and what has changed since; False where there is no checkpoint."""
    for change in changed_settings(folder.config_path, config):
        logger.warning("changed since this run last started: %s", change)
    loaded = manager.load(config.checkpoint.resume)
    if loaded is None:
        logger.warning("%s holds no checkpoint: starting fresh", folder.checkpoints_dir)
        return False
    state.restore(loaded)
    logger.info("resumed from %s: step %d, epoch %d", loaded.path, state.step, state.epoch + 1)
    return True


def run(config: FullConfig) -> int:
    """Train as configured, from opening the run's folder to its model; returns the exit code."""
    with StopRequest() as stop, RunFolder.open(config.run.folder, resume=config.checkpoint.resume != "none") as folder:
        try:
            parts = build(config, folder, stop)
        except InputError:
            folder.discard_if_new()
            raise
        write_results(parts, "running")
        status: Status = "failed"
        reason: str | None = None
        try:
            with parts.monitor, parts.manager:
                train(parts)
            write_model(parts)
            status = "stopped" if stop.requested else "completed"
        except Exception as error:
            status, reason = "diverged" if isinstance(error, DivergedError) else "failed", str(error)
            logger.exception("%s: %s", type(error).__name__, error)
            if isinstance(error, InputError):
                raise
            raise RunFailedError(reason) from error
        finally:
            write_results(parts, status, reason)
    return stop.exit_code if stop.requested else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints the run's folder last; the exit code is described at the top of this file."""
    parser = argparse.ArgumentParser(
        description="Train an image tagger on images with sidecar JSON.",
        epilog="example: python train_direct.py --config configs/demo.yaml training.num_epochs=3 run.name=short",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="a recipe, e.g. configs/demo.yaml")
    parser.add_argument("--validate-only", action="store_true", help="check settings, data and model; train nothing")
    parser.add_argument("--resume", metavar="latest|best|none|PATH", help="go on with the run of the same name")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, over those of the file")
    options = parser.parse_intermixed_args(arguments)
    log_to_console()
    try:
        words = [*options.overrides, *([f"checkpoint.resume={options.resume}"] if options.resume else [])]
        config = load_config(options.config, words)
        check_paths(config)
        if options.validate_only:
            print(check(config))
            return 0
        code = run(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFailedError:
        return 1
    print(f"run: {config.run.folder}")
    return code


if __name__ == "__main__":
    sys.exit(main())
