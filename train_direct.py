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

from close_run import log_validation, tell, way_on, write_model, write_results
from Configuration_System import FullConfig, check_paths, load_config
from schedulers import apply
from start_up import Parts, build, check
from tagger.alerts import Alerts
from tagger.cadence import due
from tagger.command import command
from tagger.data.windows import Window, accumulation_windows
from tagger.distributed import Ranks
from tagger.endings import Ending, diagnose, is_unknown
from tagger.errors import DivergedError, InputError, LostFolderError, PeerFailedError, RunFailedError
from tagger.files import write_json
from tagger.launch import launched_as
from tagger.logs import log_as_rank, log_to_console
from tagger.options import Parser
from tagger.output import print_if_read
from tagger.report.collect import create_mistakes
from tagger.rng import mix
from tagger.run_folder import RunFolder, resume_origin
from tagger.stop import StoppedEarly, StopRequest
from validation_loop import EvaluationStopped, Subject, evaluate_all

logger = logging.getLogger(__name__)

RESUME_HELP = "go on with the run of the same name, which must exist; auto: or start it"


def train_step(parts: Parts, window: Window) -> tuple[Tensor, Tensor, Tensor]:
    """One update: loss summed over the images of all ranks, gradient norm, whether it was left out; device scalars."""
    config, state, parallel, phase = parts.config, parts.state, parts.parallel, parts.phases[window.phase]
    augment, parts.model.patch_dropout = parts.augments[window.phase], phase.patch_dropout
    total = torch.zeros((), device=parts.device)
    parts.criterion.begin_epoch(window.epoch)
    # The window's own images, so that a short last window weighs each image as much as any other.
    num_images = parallel.begin_window(config.training.seed, state.step, window.num_images, parts.device)
    for number, host in enumerate(window.batches, 1):
        keys = mix(config.training.seed, window.epoch, host.row_ids.numpy())
        batch = host.to(parts.device, non_blocking=True)
        images = augment(batch.images, keys)
        with parallel.batch(is_last=number == len(window.batches)):
            with state.precision.autocast():
                loss = parts.objective(
                    images, batch.valid_sizes, batch.tag_indices, batch.tag_offsets, augment.own_share(keys)
                )
            state.precision.backward(loss / num_images)
        total += loss.detach()
    parallel.add_up(total)
    apply(parts.schedule, state.optimizer, state.step, phase.learning_rate_factor)
    parts.boundary.begin_update()
    clip = config.training.clip_grad_norm
    grad_norm, left_out = state.precision.step(state.optimizer, parts.parameters, clip, total, config.model.num_members)
    state.optimizer.zero_grad(set_to_none=True)
    parts.boundary.undo_buffers(left_out)
    parallel.settle_buffers()
    if state.ema is not None:
        state.ema.update()
    return total, grad_norm, left_out


def validate(parts: Parts, epoch: int) -> dict[str, float]:
    """Score the held-out images with the averaged weights where they are kept, and log everything about it.

    The weights themselves are scored beside them where `validation.online_weights` asks for it, to be logged alone.
    Each rank scores its share; the scalars that are returned are those of all images, on every rank.
    """
    config, state = parts.config, parts.state
    tags, counts, threshold = parts.vocabulary.tags, parts.vocabulary.counts, config.validation.threshold
    wanted = config.monitor.sample_images if parts.monitor.shows_pictures else 0
    mistakes = create_mistakes(wanted, counts, len(parts.validation_loader.dataset), threshold)
    collectors = () if mistakes is None else (mistakes,)
    subjects = [Subject(parts.model, parts.criterion, len(tags), threshold, collectors=collectors)]
    if state.ema is not None and config.validation.online_weights:
        subjects.append(Subject(state.ema.online_model(), parts.criterion, len(tags), threshold))
    image_size = config.data.image_size
    feed = parts.parallel.validation_feed(parts.validation_loader, lambda: parts.stop.requested, image_size)
    with state.ema.swapped() if state.ema is not None else contextlib.nullcontext(), parts.parallel.forward_only():
        done = evaluate_all(
            subjects,
            feed,
            state.precision,
            parts.device,
            num_samples=config.monitor.sample_images,
            stop=feed.stop,
            ranks=parts.ranks,
        )
    if done:
        log_validation(parts, done, mistakes, epoch)
    scalars = parts.ranks.broadcast(dict(done[0].scalars) if done else None)
    state.extra["final"] = scalars
    return cast(dict[str, float], scalars)


def close_epoch(parts: Parts, epoch: int) -> tuple[dict[str, float] | None, bool]:
    """Validate: the scalars, and whether that ends the run. Until it is done, a checkpoint says that it is owed."""
    state = parts.state
    state.extra["owed_validation"] = epoch
    try:
        scalars = validate(parts, epoch)
    except EvaluationStopped:
        parts.stop.adopt(parts.ranks.agree(0, parts.stop.request, False).stop)
        logger.warning("the validation under way is left to the next start")
        return None, True
    del state.extra["owed_validation"]
    state.extra["validated"] = [state.step, parts.manager.yardstick]
    stopping = state.early_stopping
    return scalars, stopping is not None and stopping.update(scalars[parts.config.checkpoint.best_metric])


def train(parts: Parts) -> None:
    """The loop: fetch, step, then perhaps log, validate, save, stop."""
    config, state, monitor = parts.config, parts.state, parts.monitor
    windows = accumulation_windows(parts.feed, state.position, state.epoch)
    started = time.perf_counter() - state.seconds
    stopping = state.early_stopping is not None and state.early_stopping.exhausted
    if "owed_validation" in state.extra:
        made_up_for, stopping = close_epoch(parts, cast(int, state.extra["owed_validation"]))
        parts.stop.hold()
        save(parts, made_up_for)
    while state.step < parts.total_steps and not stopping:
        asked = time.perf_counter()
        window = next(windows)
        waited_s = time.perf_counter() - asked

        loss, grad_norm, left_out = train_step(parts, window)
        parts.stop.hold()
        state.step += 1
        state.epoch, state.position = window.epoch, dict(window.position)
        state.seconds = time.perf_counter() - started
        parts.boundary.mark()
        due_now = parts.manager.due(state.step, state.seconds)
        agreed = parts.ranks.agree(window.num_images, parts.stop.request, due_now)
        parts.stop.adopt(agreed.stop)
        state.samples_seen += agreed.num_images
        parts.meter.add(state.step, loss, grad_norm, agreed.num_images, waited_s, seconds=time.perf_counter() - asked)
        if parts.ranks.is_main:  # all ranks leave out the same updates; one judges them
            parts.guard.add(state.step, left_out, [batch.row_ids for batch in window.batches])

        if due(state.step, config.monitor.log_every_steps):
            phase = parts.phases[window.phase]
            factor = parts.schedule.factor(state.step - 1) * phase.learning_rate_factor
            scalars = parts.meter.read(parts.learning_rate * factor, state.precision.nonfinite_steps)
            scalars["train/image_size"] = phase.image_size
            scalars["train/checkpoint_lag_seconds"] = parts.manager.lag_s()
            monitor.log(scalars, state.step, window.epoch)
        for failure in parts.manager.poll():
            tell(parts, "save failed", Ending("running", reason=str(failure)))
        monitor.advance(state.step)

        validated = None
        last = state.step == parts.total_steps
        if window.ends_epoch and (due(window.epoch + 1, config.validation.every_epochs) or last):
            validated, stopping = close_epoch(parts, window.epoch)
        stopping = stopping or agreed.stop > 0

        if validated is not None or agreed.save or stopping or last:
            save(parts, validated)


def save(parts: Parts, scalars: dict[str, float] | None = None, *, wait: bool = False) -> None:
    """A checkpoint of the last step boundary, and `results.json` of the same moment."""
    state = parts.state
    parts.folder.require_ours()
    state.extra["image_size"] = parts.phases[parts.feed.plan.phase_at(state.epoch, state.position)].image_size
    state.extra["meter"], state.extra["guard"] = parts.meter.state_dict(), parts.guard.state_dict()
    parts.manager.save(state, scalars, wait=wait)
    write_results(parts, Ending("running"))


def rescue(parts: Parts, error: Exception) -> None:
    """After a fatal error: save the last step boundary where it can be had back, and what the error knows."""
    parts.state.optimizer.zero_grad(set_to_none=True)
    if isinstance(error, LostFolderError) or not parts.ranks.is_main:
        return
    if diagnose(error).status == "diverged":
        # Finite weights on the way to divergence must not take the place of good checkpoints.
        logger.error("nothing is saved, so that no good checkpoint gives way")
        if isinstance(error, DivergedError) and error.row_ids:
            images = [str(parts.train_loader.dataset.index.image_path(row)) for row in error.row_ids]
            content = {"step": error.step, "row_ids": error.row_ids, "images": images}
            # With several ranks these are the images of the first; the others had as many of their own.
            write_json(parts.folder.diverged_path, {**content, "num_ranks": parts.ranks.world_size})
        return
    if not parts.parallel.can_save_after(error):
        logger.error("the ranks no longer work together, so that the state of this step is not to be had: not saved")
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
    """Train as configured, as one rank or as one of several; returns the exit code."""
    with Ranks.join(config.training.device) as ranks:
        return lead(config, ranks) if ranks.is_main else follow(config, ranks)


def lead(config: FullConfig, ranks: Ranks) -> int:
    """As the rank that owns the run's folder, from opening it to the model; returns the exit code."""
    alerts, resuming = Alerts.from_environment(), config.checkpoint.resume != "none"
    if resuming:
        resume_origin(config.run.folder, config.checkpoint.resume)
    with StopRequest() as stop, RunFolder.open(config.run.folder, resume=resuming) as folder, alerts:
        stop.watch(folder.stop_path)
        try:
            stop.at_once()
            return finish(start(config, folder, stop, alerts, ranks))
        except StoppedEarly:
            left = f"{folder.path} is removed" if folder.is_new else f"{folder.path} stays as it was"
            logger.warning("%s before the first update: there is nothing to save, %s", stop.reason, left)
            folder.discard_if_new()
            ranks.report(Ending("stopped", stop.exit_code, stop.reason))
            return stop.exit_code


def start(config: FullConfig, folder: RunFolder, stop: StopRequest, alerts: Alerts, ranks: Ranks) -> Parts:
    """Build the parts; a start that fails is told, and leaves no new folder behind."""
    try:
        return build(config, folder, stop, alerts, ranks)
    except Exception as first:
        error = ranks.explain(first)
        ending = diagnose(error)
        if not isinstance(error, InputError):
            logger.exception("the run could not start: %s", ending.reason)
        ranks.report(ending)
        text = f"{folder.name}: could not start: {ending.reason}"
        alerts.send("could not start", text, run=folder.name, status=ending.status, exit_code=ending.exit_code)
        folder.discard_if_new()
        if isinstance(error, InputError) or (folder.is_new and is_unknown(error)):  # its train.log is gone
            raise
        raise RunFailedError(str(ending.reason), ending.exit_code or 1) from error


def follow(config: FullConfig, ranks: Ranks) -> int:
    """As a rank that owns no folder: the same steps, and rank 0 tells how it was; returns the exit code."""
    log_as_rank(ranks.rank, logging.ERROR)  # what is odd about settings and data, rank 0 says
    with StopRequest() as stop:
        try:
            stop.at_once()
            parts = build(config, RunFolder.beside(config.run.folder), stop, ranks=ranks)
            log_as_rank(ranks.rank, logging.WARNING)
            with parts.monitor, parts.manager:
                train(parts)
            return stop.exit_code if stop.requested else 0
        except StoppedEarly:
            ranks.report(Ending("stopped", stop.exit_code, stop.reason))
            return stop.exit_code
        except Exception as first:
            error = ranks.explain(first)
            ending = diagnose(error)
            ranks.report(ending)
            if isinstance(error, InputError) or is_unknown(error):  # nothing but the console has the traceback
                raise
            if not isinstance(error, PeerFailedError):  # which rank 0 tells
                logger.exception("%s", ending.reason)
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
            except Exception as first:
                error = parts.ranks.explain(first)
                parts.ranks.report(diagnose(error))
                rescue(parts, error)
                raise error from first
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
    is_main = launched_as()[0] == 0
    if options.validate_only:
        found = check(config)
        if is_main:
            print(found)
        return 0
    code = run(config)
    if is_main and config.run.folder.is_dir():  # a start that was stopped at once leaves none
        print_if_read(f"run: {config.run.folder}")
    return code


if __name__ == "__main__":
    sys.exit(main())
