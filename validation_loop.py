"""Validation: the one path from a model and held-out images to scores, for the trainer and for this command.

Refuses a run without weights, and weights that do not belong to the run's vocabulary.
"""

if __name__ == "__main__":
    from tagger.command import start_quietly

    start_quietly()  # importing torch takes seconds

import argparse
import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from Configuration_System import FullConfig, check_paths, load_config
from dataset_loader import DataLoader, create_dataloaders, open_dataset
from evaluation_metrics import MetricComputer, MetricResult
from loss_functions import MultiTaskLoss, TagLoss, create_loss
from model_architecture import SimplifiedTagger, create_model
from tagger.artifact import load_artifact
from tagger.batch import Batch
from tagger.command import command
from tagger.data.scan import printable
from tagger.data.split import Part
from tagger.errors import InputError
from tagger.files import write_json
from tagger.logs import log_to_console
from tagger.ontology import relate
from tagger.options import Parser, output_file, output_folder, whole
from tagger.output import reader_may_leave
from tagger.report import require_libraries
from tagger.report.collect import ReportCollector
from tagger.suspects import Suspects, write_suspects
from training_utils import MixedPrecisionTrainer, load_weights, resolve_device
from vocabulary import TagVocabulary, configured_vocabulary, open_ontology, tag_shares

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
EVALUATION_FILE = "evaluation.json"
SUSPECTS_FILE = "suspects.jsonl"
REPORT_FILE = "report.html"
Criterion = TagLoss | MultiTaskLoss


@dataclass(frozen=True)
class Samples:
    """The first held-out images of the index: uint8 [3, H, W] each, logits [N, C] float32, tag indices; on the CPU."""

    images: tuple[Tensor, ...]
    logits: Tensor
    tags: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Evaluation:
    """What one pass over the held-out images gives; `scalars` are the values that are logged, `computer` the counts."""

    scalars: Mapping[str, float]
    metrics: MetricResult
    samples: Samples
    computer: MetricComputer


class Collector(Protocol):
    """Looks at every batch of an evaluation."""

    def add(self, batch: Batch, logits: Tensor) -> None:
        """batch: on the host. logits: float32 [B, C] on the CPU."""
        ...


class EvaluationStopped(Exception):
    """The pass was asked to stop before its end; it has no result."""


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Batch, object]],
    criterion: Criterion,
    precision: MixedPrecisionTrainer,
    device: torch.device,
    *,
    num_tags: int,
    threshold: float,
    num_samples: int = 0,
    collectors: Sequence[Collector] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Score `model` on every batch of `loader`; the model's training mode is put back afterwards.

    `val/loss` is the criterion summed over tags, averaged over images. Raises DivergedError when a logit is NaN,
    EvaluationStopped when `stop`, asked before each batch, says so.
    """
    computer = MetricComputer(num_tags, threshold)
    total = torch.zeros((), dtype=torch.float64)
    collected: list[_Sample] = []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for host, _ in loader:
                if stop():
                    raise EvaluationStopped
                batch = host.to(device, non_blocking=True)
                with precision.autocast():
                    logits = model(batch.images, batch.valid_sizes)
                loss = criterion(logits, batch.tag_indices, batch.tag_offsets)
                computer.update(logits, host.tag_indices, host.tag_offsets, host.row_ids)
                total += loss.double().cpu()
                collected = _first_samples(collected, host, logits, num_samples)
                if collectors:
                    scores = logits.float().cpu()
                    for collector in collectors:
                        collector.add(host, scores)
    finally:
        model.train(was_training)
    metrics = computer.compute()
    scalars = {
        "val/mAP": metrics["mAP"],
        "val/f1_macro": metrics["f1_macro"],
        "val/f1_micro": metrics["f1_micro"],
        "val/loss": float(total) / metrics["num_images"],
    }
    return Evaluation(scalars, metrics, _join_samples(collected), computer)


class _Sample(NamedTuple):
    row: int
    image: Tensor
    logits: Tensor
    tags: tuple[int, ...]


def _first_samples(collected: list[_Sample], host: Batch, logits: Tensor, count: int) -> list[_Sample]:
    """The `count` samples of the lowest rows so far: the same images in whatever order the batches come."""
    if count == 0:
        return collected
    limit = collected[-1].row if len(collected) == count else None
    places = [i for i, row in enumerate(host.row_ids.tolist()) if limit is None or row < limit]
    if not places:
        return collected
    tags, scores = host.tag_lists(), logits[places].float().cpu()
    found = [_Sample(int(host.row_ids[i]), host.images[i].clone(), scores[n], tags[i]) for n, i in enumerate(places)]
    return sorted([*collected, *found], key=lambda sample: sample.row)[:count]


def _join_samples(collected: list[_Sample]) -> Samples:
    if not collected:
        return Samples((), torch.empty(0, 0), ())
    _, images, logits, tags = zip(*collected, strict=True)
    return Samples(images, torch.stack(logits), tags)


def build_criterion(config: FullConfig, vocabulary: TagVocabulary) -> Criterion:
    """The configured loss, summed over tags and images; raises ConfigError for an ignored tag that is not there."""
    return create_loss(
        config.loss,
        rating_indices=vocabulary.rating_indices,
        tag_counts=torch.tensor(vocabulary.counts),
        ignored_tags=[vocabulary.index(tag) for tag in config.loss.ignored_tags],
        reduction="sum",
    )


def open_data_and_model(
    config: FullConfig, known_vocabulary: Path, quarantine_file: Path | None = None
) -> tuple[TagVocabulary, DataLoader, DataLoader, SimplifiedTagger]:
    """(vocabulary, training loader, validation loader, model) of a run that starts, goes on or is looked at.

    The vocabulary is the run's own where `known_vocabulary` exists. The model is new: it starts from the tags' shares
    of the images. `quarantine_file`: see `create_dataloaders`. Raises InputError for data that cannot be used.
    """
    index = open_dataset(config.data)
    ontology = open_ontology(config.vocabulary, index, known_vocabulary)
    if known_vocabulary.exists():
        vocabulary = TagVocabulary.load(known_vocabulary)
    else:
        vocabulary = configured_vocabulary(config.vocabulary, index, ontology)
    train, validation = create_dataloaders(
        config, vocabulary, index, quarantine_file=quarantine_file, ontology=ontology
    )
    model = create_model(
        config.model,
        len(vocabulary),
        config.data.image_size,
        mean=train.preprocess.mean,
        std=train.preprocess.std,
        tag_priors=torch.from_numpy(tag_shares(index, vocabulary, ontology)).float(),
    )
    return vocabulary, train, validation, model


def report(evaluation: Evaluation, vocabulary: TagVocabulary, weights: str) -> dict[str, object]:
    """The content of `evaluation.json`: the scalars, what each average covers, and every tag's average precision."""
    counts = {k: v for k, v in evaluation.metrics.items() if k.startswith("num_")}
    precision = evaluation.metrics["average_precision"].tolist()
    tags = [
        {"name": tag, "average_precision": None if np.isnan(ap) else ap}
        for tag, ap in zip(vocabulary.tags, precision, strict=True)
    ]
    return {
        "format_version": FORMAT_VERSION,
        "weights": weights,
        "vocabulary_sha256": vocabulary.sha256,
        "threshold": evaluation.metrics["threshold"],
        **evaluation.scalars,
        **counts,
        "tags": tags,
    }


def as_table(evaluation: Evaluation, vocabulary: TagVocabulary, weights: str) -> Table:
    """The scores with what each one covers, and the weakest tags."""
    metrics, scalars = evaluation.metrics, evaluation.scalars
    table = Table("score", "value", "covers", title=f"{weights} on {metrics['num_images']} held-out images")
    table.add_row("val/mAP", f"{scalars['val/mAP']:.4f}", f"{metrics['num_tags_with_positives']} tags with a positive")
    left_out = (
        f"{metrics['num_tags_in_f1_macro']} tags ({metrics['num_tags_left_out_of_f1_macro']} never seen, left out)"
    )
    at = f"at threshold {metrics['threshold']:g}"
    table.add_row("val/f1_macro", f"{scalars['val/f1_macro']:.4f}", f"{left_out}, {at}")
    table.add_row("val/f1_micro", f"{scalars['val/f1_micro']:.4f}", f"all decisions, {at}")
    table.add_row("val/loss", f"{scalars['val/loss']:.4f}", "sum over tags, mean over images")
    precision = metrics["average_precision"].numpy()
    weakest = [i for i in np.argsort(precision, kind="stable") if not np.isnan(precision[i])][:5]
    for index in weakest:
        table.add_row("weakest tag", f"{precision[index]:.4f}", vocabulary.tag(int(index)))
    return table


def evaluate_weights(
    config: FullConfig,
    run: Path,
    checkpoint: Path | None,
    use_ema: bool,
    num_suspects: int = 0,
    *,
    page: Path | None = None,
    plots: Path | None = None,
) -> tuple[Evaluation, TagVocabulary, str]:
    """Score a checkpoint of a run, or the run's model where `checkpoint` is None, and name what was scored.

    With `num_suspects`, that many labels which are probably wrong go to `suspects.jsonl` in the run. `page`: a
    report as HTML; `plots`: a folder for its plots.
    """
    vocabulary, _, validation, model = open_data_and_model(config, run / "vocabulary.json")
    found: str | None
    tensors: Mapping[str, Tensor]
    if checkpoint is None:
        artifact = load_artifact(run / "model")
        found, tensors, name = artifact.vocabulary_sha256, artifact.weights, str(run / "model")
    else:
        weights = load_weights(checkpoint, prefer_ema=use_ema)
        found, tensors, name = weights.vocabulary_sha256, weights.tensors, f"{checkpoint} ({weights.kind} weights)"
    if found != vocabulary.sha256:
        raise InputError(f"{name} is of another vocabulary than {run / 'vocabulary.json'}; they do not belong together")
    model.load_state_dict(tensors)
    device = resolve_device(config.training.device)
    suspects = Suspects(len(vocabulary), num_suspects) if num_suspects else None
    report_of = None if page is None and plots is None else _report_collector(config, validation, page, plots)
    evaluation = evaluate(
        model.to(device),
        validation,
        build_criterion(config, vocabulary).to(device),
        MixedPrecisionTrainer(config.training.mixed_precision, device),
        device,
        num_tags=len(vocabulary),
        threshold=config.validation.threshold,
        collectors=[collector for collector in (suspects, report_of) if collector is not None],
    )
    if suspects is not None:
        facts = {"weights": name, "vocabulary_sha256": vocabulary.sha256, "num_images": suspects.num_images}
        index = validation.dataset.index
        write_suspects(run / SUSPECTS_FILE, suspects.strongest(), index, vocabulary.tags, facts)
    if report_of is not None:
        _write_report(report_of, evaluation, validation, run, name)
    return evaluation, vocabulary, name


def _report_collector(
    config: FullConfig, validation: DataLoader, page: Path | None, plots: Path | None
) -> ReportCollector:
    dataset, split, vocabulary = validation.dataset, validation.split, validation.dataset.vocabulary
    assert split is not None
    return ReportCollector(
        page,
        plots,
        names=vocabulary.tags,
        categories=vocabulary.categories,
        training_counts=dataset.table.count(split.training_rows),
        num_training_images=len(split.training_rows),
        logit_thresholds=math.log(config.validation.threshold) - math.log1p(-config.validation.threshold),
        relations=None if dataset.ontology is None else relate(dataset.ontology, vocabulary.tags),
    )


def _write_report(
    report_of: ReportCollector, evaluation: Evaluation, validation: DataLoader, run: Path, weights: str
) -> None:
    index, split, vocabulary = validation.dataset.index, validation.split, validation.dataset.vocabulary
    assert split is not None
    report_of.write(
        evaluation.computer,
        title=f"Evaluation of {run.resolve().name}",
        facts={
            "weights": weights,
            "images": f"{evaluation.metrics['num_images']:,} of the {Part.VAL.purpose} part "
            f"(its hash: {split.part_sha256(Part.VAL)[:12]})",
            "trained on": f"{len(split.training_rows):,} images",
            "vocabulary": f"{len(vocabulary):,} tags (hash: {vocabulary.sha256[:12]})",
            "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        },
        describe_image=lambda row: (printable(index.image_path(row)), index.rating(row)),
        everything_in=EVALUATION_FILE,
    )


def _parser() -> Parser:
    parser = Parser(
        description="Score a trained model on the held-out images of its run.",
        epilog="example: python validation_loop.py --run runs/demo",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="DIR", help="a run folder; its model/ is scored")
    source.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="a checkpoint, e.g. runs/demo/checkpoints/step-000000900"
    )
    parser.add_argument(
        "--weights", choices=("ema", "online"), default="ema", help="of a checkpoint (default: ema where kept)"
    )
    parser.add_argument(
        "--output", type=output_file, metavar="FILE", help="where the JSON goes (default: evaluation.json in the run)"
    )
    parser.add_argument(
        "--suspects", type=whole(0), default=0, metavar="N", help=f"write the N most doubtful labels to {SUSPECTS_FILE}"
    )
    parser.add_argument(
        "--report",
        nargs="?",
        const=True,
        type=_page_file,
        metavar="FILE",
        help=f"write a page with plots and mistakes (default: {REPORT_FILE} in the run); needs the extra 'report'",
    )
    parser.add_argument(
        "--create-plots", type=output_folder, metavar="DIR", help="write the report's plots as SVG files"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="e.g. data.roots=[/moved/images]"
    )
    return parser


def _page_file(text: str) -> Path:
    if "=" in text:
        raise argparse.ArgumentTypeError(f"{text} reads as a setting; put settings first, or name the page's file")
    return output_file(text)


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints a table, writes JSON; 0 done, 2 bad input, 1 anything else."""
    options = _parser().parse_intermixed_args(arguments)
    log_to_console(logging.WARNING)
    run: Path = options.run if options.run is not None else options.checkpoint.resolve().parent.parent
    if options.checkpoint is not None and not options.checkpoint.exists():
        raise InputError(f"--checkpoint {options.checkpoint} does not exist; give a folder of a run's checkpoints/")
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run} is not a run folder: it has no config.yaml; give the folder that training printed")
    config = load_config(run / "config.yaml", options.overrides, environment={})
    check_paths(config)
    output: Path = options.output or output_file(str(run / EVALUATION_FILE))
    page: Path | None = output_file(str(run / REPORT_FILE)) if options.report is True else options.report
    for flag, place in (("--report", page), ("--create-plots", options.create_plots)):
        if place is not None:
            require_libraries(flag)
    evaluation, vocabulary, name = evaluate_weights(
        config,
        run,
        options.checkpoint,
        options.weights == "ema",
        options.suspects,
        page=page,
        plots=options.create_plots,
    )
    write_json(output, report(evaluation, vocabulary, name))
    with reader_may_leave():
        Console().print(as_table(evaluation, vocabulary, name))
        print(f"every tag's average precision: {output}")
        if options.suspects:
            print(f"the most doubtful labels: {run / SUSPECTS_FILE}")
        if page is not None:
            print(f"the report: {page}")
        if options.create_plots is not None:
            print(f"the plots: {options.create_plots}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
