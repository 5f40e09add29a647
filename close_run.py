"""What a run tells and leaves behind: its validations, `results.json`, alerts, and `model/` with its thresholds.

Nothing here ends a run that could go on: a full disk costs a line in the log.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from torch import nn

from Configuration_System import FullConfig
from dataset_loader import DataLoader, create_part_loader
from model_architecture import create_model
from start_up import Parts
from tagger.artifact import TagRow, attach_thresholds, load_artifact, save_artifact
from tagger.checkpoint.store import newest_first
from tagger.data.split import Part
from tagger.endings import Ending
from tagger.errors import InputError, LostFolderError
from tagger.metrics.thresholds import TagThresholds, ThresholdGoal, fit_thresholds
from tagger.module_state import load_tensors, named_tensors
from tagger.report.collect import telling_curves
from tagger.report.mistakes import ConfidentMistakes
from tagger.run_folder import BestResult, RunResults, code_commit
from training_utils import MixedPrecisionTrainer, load_weights
from validation_loop import Evaluation, EvaluationStopped, Subject, build_criterion, evaluate_all

logger = logging.getLogger(__name__)


def log_validation(parts: Parts, done: Sequence[Evaluation], mistakes: ConfidentMistakes | None, epoch: int) -> None:
    """Numbers, curves and pictures of an evaluation; beside it, the numbers of the online weights, if there are two.

    With several ranks pictures are of what rank 0 has scored.
    """
    config, state, monitor = parts.config, parts.state, parts.monitor
    tags, counts, threshold = parts.vocabulary.tags, parts.vocabulary.counts, config.validation.threshold
    evaluation, *beside = done
    scalars = dict(evaluation.scalars)
    for online in beside:
        scalars |= {f"val_online/{name.removeprefix('val/')}": value for name, value in online.scalars.items()}
    monitor.log(scalars, state.step, epoch)
    monitor.log_histogram("val/average_precision", evaluation.metrics["average_precision"], state.step)
    monitor.log_predictions("val/samples", evaluation.samples, tags, threshold, state.step)
    if monitor.shows_pictures:
        monitor.log_curves("val/precision_recall", telling_curves(evaluation.computer, tags, counts), state.step)
    if mistakes is not None:
        monitor.log_mistakes("val/mistakes", mistakes, tags, state.step)


def write_results(parts: Parts, ending: Ending) -> None:
    """`results.json` as of now; `final` are the scores of the newest validation. A full disk does not stop the run."""
    if not parts.ranks.is_main:
        return
    state, best = parts.state, parts.manager.best
    results = RunResults(
        status=ending.status,
        best=None if best is None else BestResult(best.metric, best.value, best.step),
        final=cast(dict[str, float], state.extra.get("final", {})),
        seconds=state.seconds,
        images_per_second=state.samples_seen / state.seconds if state.seconds else None,
        steps=state.step,
        commit=code_commit(),
        vocabulary_sha256=parts.vocabulary.sha256,
        error=ending.reason,
        exit_code=ending.exit_code,
    )
    try:
        parts.folder.require_ours()
        results.write(parts.folder.results_path)
    except (OSError, LostFolderError) as error:
        logger.error("%s could not be written: %s", parts.folder.results_path, error)


def way_on(parts: Parts) -> str:
    """Which checkpoint a run that failed can go on from, and how, by what is on disk."""
    try:
        whole, _ = newest_first(parts.folder.checkpoints_dir)
    except OSError as error:
        return f"{parts.folder.checkpoints_dir} cannot be read: {error}"
    if not whole:
        return "there is no checkpoint yet: start over with --resume auto"
    return f"the newest checkpoint is of step {whole[0][1].step}: go on from it with --resume latest"


def tell(parts: Parts, event: str, ending: Ending) -> None:
    """An alert to whoever watches the run from afar, where the environment names a webhook."""
    state, best, run = parts.state, parts.manager.best, parts.folder.name
    code = "" if ending.exit_code is None else f" (exit code {ending.exit_code})"
    parts.alerts.send(
        event,
        f"{run}: {event} at step {state.step}, {ending.status}{code}" + (f": {ending.reason}" if ending.reason else ""),
        run=run,
        status=ending.status,
        exit_code=ending.exit_code,
        reason=ending.reason,
        step=state.step,
        best=None if best is None else {"metric": best.metric, "value": best.value, "step": best.step},
    )


def write_model(parts: Parts) -> None:
    """`model/`: the best validation's weights (the average where it is kept) and all that prediction needs."""
    best = parts.manager.best
    if best is None:
        reason, remedy = "no validation was completed", "continue with --resume latest"
        if "final" in parts.state.extra:
            reason = f"no validation gave a {parts.config.checkpoint.best_metric}: no held-out image has a tag to score"
            remedy = "hold out more images (data.val_fraction)"
        logger.warning("%s, so model/ is not written; %s", reason, remedy)
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
        ontology_file=parts.folder.ontology_path if parts.validation_loader.dataset.ontology else None,
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
    give_thresholds(parts)


def give_thresholds(parts: Parts) -> None:
    """Give `model/` a threshold for each tag, where calibration images were held out."""
    config, folder = parts.config, parts.folder.model_dir
    if not config.data.calib_fraction:
        at = config.validation.threshold
        logger.info("all tags have the threshold %g; hold out data.calib_fraction=0.05 to fit each tag's own", at)
        return
    # Where the weights are spread over ranks, rank 0 needs a network of its own for them.
    model = create_model(parts.model.config).to(parts.device) if parts.parallel.sharded else parts.model
    try:
        thresholds = fit_model_thresholds(config, folder, model, parts.validation_loader, lambda: parts.stop.requested)
    except EvaluationStopped:
        logger.warning(
            "stopped before the thresholds were fitted; to fit them: python -m scripts.fit_thresholds --run %s",
            parts.folder.path,
        )
        return
    attach_thresholds(folder, thresholds)
    logger.info("%s", thresholds.summary())


def fit_model_thresholds(
    config: FullConfig,
    folder: Path,
    model: nn.Module,
    beside: DataLoader,
    stop: Callable[[], bool] = lambda: False,
) -> TagThresholds:
    """Thresholds for the model in `folder`, from its scores of the calibration images and as `validation` asks for.

    `model`, on its device, is given that model's weights; `beside` is a loader of the run's images. Raises InputError
    without calibration images and for a model of another vocabulary, EvaluationStopped when `stop` says so.
    """
    artifact, vocabulary, section = load_artifact(folder), beside.dataset.vocabulary, config.validation
    if artifact.vocabulary_sha256 != vocabulary.sha256:
        raise InputError(f"{folder} is of another vocabulary than its run; they do not belong together")
    calibration = create_part_loader(beside, Part.CALIB)
    assert calibration.split is not None
    load_tensors(named_tensors(model), artifact.weights, f"the weights in {folder}")
    device = next(model.parameters()).device
    try:
        subject = Subject(model, build_criterion(config, vocabulary).to(device), len(vocabulary), section.threshold)
        precision = MixedPrecisionTrainer(config.training.mixed_precision, device)
        evaluation = evaluate_all([subject], calibration, precision, device, stop=stop)[0]
    finally:
        calibration.close()
    return fit_thresholds(
        evaluation.computer,
        calibration.split,
        vocabulary.counts,
        ThresholdGoal(section.threshold_objective, section.threshold_precision, section.threshold_tags_per_image),
        weights_sha256=artifact.weights_sha256,
        vocabulary_sha256=artifact.vocabulary_sha256,
    )
