"""The run: build, loop, close. One direct training loop over sidecar-JSON data sets.

Refuses to write into an existing run without --resume. Exit codes: tagger/errors.py.
"""

if __name__ == "__main__":
    from tagger.command import start_quietly

    start_quietly()  # importing torch takes seconds

import contextlib
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from close_run import tell, way_on, write_model, write_results
from Configuration_System import FullConfig, check_paths, load_config
from schedulers import apply
from start_up import Parts, build, check
from tagger.alerts import Alerts
from tagger.cadence import due
from tagger.command import command
from tagger.data.windows import Window, accumulation_windows
from tagger.endings import Ending, diagnose
from tagger.errors import DivergedError, InputError, LostFolderError, RunFailedError
from tagger.files import write_json
from tagger.logs import log_to_console
from tagger.options import Parser
from tagger.output import print_if_read
from tagger.report.collect import create_mistakes, telling_curves
from tagger.rng import mix
from tagger.run_folder import RunFolder, resume_origin
from tagger.stop import StoppedEarly, StopRequest
from validation_loop import Evaluation, EvaluationStopped, evaluate

logger = logging.getLogger(__name__)

RESUME_HELP = "go on with the run of the same name, which must exist; auto: or start it"


def train_step(parts: Parts, window: Window) -> tuple[Tensor, Tensor, Tensor]:
    """One update: loss summed over the window's images, gradient norm, whether it was left out; device scalars."""
    config, state = parts.config, parts.state
    total = torch.zeros((), device=parts.device)
    for host in window.batches:
        keys = mix(config.training.seed, window.epoch, host.row_ids.numpy())
        batch = host.to(parts.device, non_blocking=True)
        images = parts.augment(batch.images, keys)
        with state.precision.autocast():
            loss = parts.objective(images, batch.valid_sizes, batch.tag_indices, batch.tag_offsets)
        # Divided by the window's own images, so that a short last window weighs each image as much as any other.
        state.precision.backward(loss / window.num_images)
        total += loss.detach()
    apply(parts.schedule, state.optimizer, state.step)
    parts.boundary.begin_update()
    clip = config.training.clip_grad_norm
    grad_norm, left_out = state.precision.step(state.optimizer, parts.parameters, clip, total)
    state.optimizer.zero_grad(set_to_none=True)
    parts.boundary.undo_buffers(left_out)
    if state.ema is not None:
        state.ema.update()
    return total, grad_norm, left_out


def validate(parts: Parts, epoch: int) -> Evaluation:
    """Score the held-out images with the averaged weights where they are kept, and log everything about it."""
    config, state, monitor = parts.config, parts.state, parts.monitor
    tags, counts, threshold = parts.vocabulary.tags, parts.vocabulary.counts, config.validation.threshold
    wanted = config.monitor.sample_images if monitor.shows_pictures else 0
    mistakes = create_mistakes(wanted, counts, len(parts.validation_loader.dataset), threshold)
    with state.ema.swapped() if state.ema is not None else contextlib.nullcontext():
        evaluation = evaluate(
            parts.model,
            parts.validation_loader,
            parts.criterion,
            state.precision,
            parts.device,
            num_tags=len(tags),
            threshold=threshold,
            num_samples=config.monitor.sample_images,
            collectors=() if mistakes is None else (mistakes,),
            stop=lambda: parts.stop.requested,
        )
    monitor.log(evaluation.scalars, state.step, epoch)
    monitor.log_histogram("val/average_precision", evaluation.metrics["average_precision"], state.step)
    monitor.log_predictions("val/samples", evaluation.samples, tags, threshold, state.step)
    if monitor.shows_pictures:
        monitor.log_curves("val/precision_recall", telling_curves(evaluation.computer, tags, counts), state.step)
    if mistakes is not None:
        monitor.log_mistakes("val/mistakes", mistakes, tags, state.step)
    state.extra["final"] = dict(evaluation.scalars)
    return evaluation


def close_epoch(parts: Parts, epoch: int) -> tuple[Evaluation | None, bool]:
    """Validate, and say whether that ends the run. Until it is done, a checkpoint says that it is still owed."""
    state = parts.state
    state.extra["owed_validation"] = epoch
    try:
        evaluation = validate(parts, epoch)
    except EvaluationStopped:
        logger.warning("the validation under way is left to the next start")
        return None, True
    del state.extra["owed_validation"]
    state.extra["validated"] = [state.step, parts.manager.yardstick]
    stopping = state.early_stopping
    return evaluation, stopping is not None and stopping.update(evaluation.scalars[parts.config.checkpoint.best_metric])


def train(parts: Parts) -> None:
    """The loop: fetch, step, then perhaps log, validate, save, stop."""
    config, state, monitor = parts.config, parts.state, parts.monitor
    training = config.training
    feed = accumulation_windows(
        parts.train_loader, state.position, state.epoch, training.num_epochs, training.accumulation_steps
    )
    started = time.perf_counter() - state.seconds
    stopping = state.early_stopping is not None and state.early_stopping.exhausted
    if "owed_validation" in state.extra:
        made_up_for, stopping = close_epoch(parts, cast(int, state.extra["owed_validation"]))
        parts.stop.hold()
        save(parts, made_up_for)
    while state.step < parts.total_steps and not stopping:
        asked = time.perf_counter()
        window = next(feed)
        waited_s = time.perf_counter() - asked

        loss, grad_norm, left_out = train_step(parts, window)
        parts.stop.hold()
        state.step += 1
        state.epoch, state.position = window.epoch, dict(window.position)
        state.samples_seen += window.num_images
        state.seconds = time.perf_counter() - started
        parts.boundary.mark()
        parts.meter.add(state.step, loss, grad_norm, window.num_images, waited_s, seconds=time.perf_counter() - asked)
        parts.guard.add(state.step, left_out, [batch.row_ids for batch in window.batches])

        if due(state.step, config.monitor.log_every_steps):
            learning_rate = config.optimizer.learning_rate * parts.schedule.factor(state.step - 1)
            scalars = parts.meter.read(learning_rate, state.precision.nonfinite_steps)
            scalars["train/checkpoint_lag_seconds"] = parts.manager.lag_s()
            monitor.log(scalars, state.step, window.epoch)
        for failure in parts.manager.poll():
            tell(parts, "save failed", Ending("running", reason=str(failure)))
        monitor.advance(state.step)

        evaluation = None
        last = state.step == parts.total_steps
        if window.ends_epoch and (due(window.epoch + 1, config.validation.every_epochs) or last):
            evaluation, stopping = close_epoch(parts, window.epoch)
        stopping = stopping or parts.stop.requested

        if evaluation is not None or parts.manager.due(state.step, state.seconds) or stopping or last:
            save(parts, evaluation)


def save(parts: Parts, evaluation: Evaluation | None = None, *, wait: bool = False) -> None:
    """A checkpoint of the last step boundary, and `results.json` of the same moment."""
    state = parts.state
    parts.folder.require_ours()
    state.extra["meter"], state.extra["guard"] = parts.meter.state_dict(), parts.guard.state_dict()
    parts.manager.save(state, evaluation.scalars if evaluation else None, wait=wait)
    write_results(parts, Ending("running"))


def rescue(parts: Parts, error: Exception) -> None:
    """After a fatal error: save the last step boundary where it can be had back, and what the error knows."""
    parts.state.optimizer.zero_grad(set_to_none=True)
    if isinstance(error, LostFolderError):
        return
    if isinstance(error, DivergedError):
        # Finite weights on the way to divergence must not take the place of good checkpoints.
        logger.error("nothing is saved, so that no good checkpoint gives way")
        if error.row_ids:
            images = [str(parts.train_loader.dataset.index.image_path(row)) for row in error.row_ids]
            write_json(parts.folder.diverged_path, {"step": error.step, "row_ids": error.row_ids, "images": images})
        return
    if not parts.boundary.intact:
        logger.error("the error came in the middle of an update, whose state cannot be saved")
        return
    parts.boundary.restore()
    try:
        save(parts, wait=True)
    except (OSError, RuntimeError, ValueError) as second:
        logger.error("the state of step %d could not be saved (%s)", parts.state.step, second)


def run(config: FullConfig) -> int:
    """Train as configured, from opening the run's folder to its model; returns the exit code."""
    alerts, resuming = Alerts.from_environment(), config.checkpoint.resume != "none"
    if resuming:
        resume_origin(config.run.folder, config.checkpoint.resume)
    with StopRequest() as stop, RunFolder.open(config.run.folder, resume=resuming) as folder, alerts:
        stop.watch(folder.stop_path)
        try:
            stop.at_once()
            return finish(start(config, folder, stop, alerts))
        except StoppedEarly:
            left = f"{folder.path} is removed" if folder.is_new else f"{folder.path} stays as it was"
            logger.warning("%s before the first update: there is nothing to save, %s", stop.reason, left)
            folder.discard_if_new()
            return stop.exit_code


def start(config: FullConfig, folder: RunFolder, stop: StopRequest, alerts: Alerts) -> Parts:
    """Build the parts; a start that fails is told, and leaves no new folder behind."""
    try:
        return build(config, folder, stop, alerts)
    except Exception as error:
        if not isinstance(error, InputError):
            logger.exception("the run could not start")
        ending = diagnose(error)
        text = f"{folder.name}: could not start: {ending.reason}"
        alerts.send("could not start", text, run=folder.name, status=ending.status, exit_code=ending.exit_code)
        folder.discard_if_new()
        if isinstance(error, InputError):
            raise
        raise RunFailedError(str(ending.reason), ending.exit_code or 1) from error


def finish(parts: Parts) -> int:
    """Train to the end, whatever it is, and say how it was; returns the exit code."""
    stop = parts.stop
    write_results(parts, Ending("running"))
    ending = Ending("failed", 1, "interrupted")
    try:
        with parts.monitor, parts.manager:
            try:
                train(parts)
                stop.hold("ending once the last checkpoint and model/ are written")
            except Exception as error:
                rescue(parts, error)
                raise
        parts.folder.require_ours()
        write_model(parts)
        ending = Ending("stopped", stop.exit_code, stop.reason) if stop.requested else Ending("completed", 0)
        stop.honour()
    except StoppedEarly:
        ending = Ending("stopped", stop.exit_code, stop.reason)
        raise
    except Exception as error:
        ending = diagnose(error)
        if not isinstance(error, LostFolderError):
            ending = replace(ending, reason=f"{ending.reason}; {way_on(parts)}")
        logger.exception("%s", ending.reason)
        raise RunFailedError(str(ending.reason), ending.exit_code or 1) from error
    finally:
        write_results(parts, ending)
        tell(parts, "ended", ending)
    return ending.exit_code or 0


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints the run's folder last; the exit code is described at the top of this file."""
    parser = Parser(
        description="Train an image tagger on images with sidecar JSON.",
        epilog="example: python train_direct.py --config configs/demo.yaml training.num_epochs=3 run.name=short",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="a recipe, e.g. configs/demo.yaml")
    parser.add_argument("--validate-only", action="store_true", help="check settings, data and model; train nothing")
    parser.add_argument("--resume", metavar="latest|best|auto|none|PATH", help=RESUME_HELP)
    parser.add_argument("--init-from", metavar="FOLDER", help="start from the weights of a run, checkpoint or model")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, over those of the file")
    options = parser.parse_intermixed_args(arguments)
    log_to_console()
    named = {"checkpoint.resume": options.resume, "checkpoint.init_from": options.init_from}
    words = [*options.overrides, *(f"{key}={value}" for key, value in named.items() if value)]
    config = load_config(options.config, words)
    check_paths(config)
    if options.validate_only:
        print(check(config))
        return 0
    code = run(config)
    if config.run.folder.is_dir():  # a start that was stopped at once leaves none
        print_if_read(f"run: {config.run.folder}")
    return code


if __name__ == "__main__":
    sys.exit(main())
