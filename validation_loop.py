"""Validation: the one path from a model and held-out images to scores, for the trainer and for this command.

The trainer and the command both call `evaluate_all`, so both give the same numbers bit for bit on one machine. Refuses
a run without weights, weights that do not belong to the run's vocabulary, and images that a model was trained on.
"""

if __name__ == "__main__":
    from tagger.command import start_quietly

    start_quietly()  # importing torch takes seconds

import contextlib
import logging
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console, RenderableType
from torch import Tensor, nn

from Configuration_System import FullConfig, check_paths, load_config, split_changes
from dataset_loader import DataLoader, LoadOptions, create_dataloaders, create_part_loader, open_dataset, split_dataset
from evaluation_metrics import MetricComputer, MetricResult
from loss_functions import MultiTaskLoss, TagLoss, create_loss
from model_architecture import TaggerModel, VisionTransformerConfig, create_model
from tagger.batch import Batch
from tagger.command import command
from tagger.data.scan import printable
from tagger.data.split import Part
from tagger.devices import PrecisionMode
from tagger.distributed import ALONE, Ranks
from tagger.errors import InputError
from tagger.evaluation.comparison import common_tags, compare
from tagger.evaluation.contender import Contender
from tagger.evaluation.document import TagList, comparison_document, evaluation_document, image_facts, page_facts
from tagger.evaluation.names import default_comparison, default_file
from tagger.evaluation.options import parse_options
from tagger.evaluation.place import (
    NamedWeights,
    Place,
    choose_weights,
    find_place,
    fitted_thresholds,
    sees_alike,
)
from tagger.evaluation.predictions import Keep, PredictionFile
from tagger.evaluation.samples import FirstSamples, Samples
from tagger.evaluation.subset import hashed_subset
from tagger.evaluation.tables import comparison_tables, evaluation_tables
from tagger.evaluation.training_part import training_part_unchanged
from tagger.evaluation.watch import Collector, Watch
from tagger.files import write_json
from tagger.logs import log_to_console
from tagger.metrics.keys import logit_of
from tagger.metrics.thresholds import Decisions, decide
from tagger.module_state import check_weights, named_tensors
from tagger.ontology import relate
from tagger.output import reader_may_leave
from tagger.report.collect import ReportCollector
from tagger.suspects import Suspects, write_suspects
from training_utils import MixedPrecisionTrainer, compile_model, resolve_device
from vocabulary import TagVocabulary, configured_vocabulary, open_ontology, tag_shares

logger = logging.getLogger(__name__)

Criterion = TagLoss | MultiTaskLoss


@dataclass(frozen=True)
class Evaluation:
    """What one pass over the held-out images gives; `scalars`, at one threshold for all tags, are what is logged.

    at_one: what that threshold decides, where `metrics` and `computer` are at each tag's own.
    """

    scalars: Mapping[str, float]
    metrics: MetricResult
    samples: Samples
    computer: MetricComputer
    at_one: Decisions | None = None


class EvaluationStopped(Exception):
    """The pass was asked to stop before its end; it has no result."""


@dataclass(frozen=True)
class Subject:
    """A model to score. F1 is at `threshold`, a probability, or at each tag's own of `logit_thresholds`, [C].

    criterion: None where no loss is wanted. The scalars are at `threshold` in either case.
    """

    model: nn.Module
    criterion: Criterion | None
    num_tags: int
    threshold: float = 0.5
    logit_thresholds: NDArray[np.float64] | None = None
    collectors: Sequence[Collector] = ()


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Batch, object]],
    criterion: Criterion,
    precision: MixedPrecisionTrainer,
    device: torch.device,
    *,
    num_tags: int,
    threshold: float,
    logit_thresholds: NDArray[np.float64] | None = None,
    num_samples: int = 0,
    collectors: Sequence[Collector] = (),
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> Evaluation | None:
    """Score one model on every batch of `loader`; see `Subject` and `evaluate_all`. None on ranks other than 0."""
    subject = Subject(model, criterion, num_tags, threshold, logit_thresholds, collectors)
    done = evaluate_all([subject], loader, precision, device, num_samples=num_samples, stop=stop, ranks=ranks)
    return done[0] if done else None


def evaluate_all(
    subjects: Sequence[Subject],
    loader: Iterable[tuple[Batch, object]],
    precision: MixedPrecisionTrainer,
    device: torch.device,
    *,
    num_samples: int = 0,
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> list[Evaluation]:
    """Score models on every batch of `loader`, which is read once; their training mode is put back afterwards.

    `val/loss` is the criterion summed over tags, averaged over images. Raises DivergedError when a logit is NaN,
    EvaluationStopped when `stop`, asked before each batch and while others score theirs, says so. Where there are
    several `ranks`, each scores the batches of its own loader; rank 0 has the scores of all images, bit for bit those
    of one rank, the others none.
    """
    passes = [_Pass(subject, num_samples) for subject in subjects]
    stopped, were_training = False, [subject.model.training for subject in subjects]
    for subject in subjects:
        subject.model.eval()
    try:
        with torch.inference_mode():
            for host, _ in loader:
                if stopped := stop():
                    break
                batch = host.to(device, non_blocking=True)
                for each in passes:
                    with precision.autocast():
                        logits = each.subject.model(batch.images, batch.valid_sizes)
                    each.add(host, batch, logits)
    finally:
        for subject, was_training in zip(subjects, were_training, strict=True):
            subject.model.train(was_training)
    if ranks.any_of(stopped, meanwhile=stop):
        raise EvaluationStopped
    return [done for each in passes if (done := each.result(ranks)) is not None]


class _Pass:
    """What is kept of one model while the batches go by."""

    def __init__(self, subject: Subject, num_samples: int) -> None:
        self.subject = subject
        self._computer = MetricComputer(subject.num_tags, subject.threshold, logit_thresholds=subject.logit_thresholds)
        self._losses: list[float] = []
        self._samples = FirstSamples(num_samples)

    def add(self, host: Batch, batch: Batch, logits: Tensor) -> None:
        """Take in a batch on the host, the same on the device, and its logits there."""
        if self.subject.criterion is not None:
            self._losses.append(self.subject.criterion(logits, batch.tag_indices, batch.tag_offsets).item())
        self._computer.update(logits, host.tag_indices, host.tag_offsets, host.row_ids)
        self._samples.add(host, logits)
        if self.subject.collectors:
            scores = logits.float().cpu()
            for collector in self.subject.collectors:
                collector.add(host, scores)

    def result(self, ranks: Ranks) -> Evaluation | None:
        """The scores of what all ranks have taken in; None on ranks other than 0."""
        losses = ranks.gather(self._computer, self._losses)
        if losses is None:
            return None
        subject, metrics = self.subject, self._computer.compute()
        scalars = {f"val/{name}": metrics[name] for name in ("mAP", "f1_macro", "f1_micro")}
        at_one = None
        if subject.logit_thresholds is not None:
            at_one = decide(self._computer, np.full(subject.num_tags, logit_of(subject.threshold)))
            scalars |= {"val/f1_macro": at_one.f1_macro, "val/f1_micro": at_one.f1_micro}
        if subject.criterion is not None:
            # Rounded once, so that it does not matter which rank scored which batch.
            scalars["val/loss"] = math.fsum(losses) / metrics["num_images"]
        return Evaluation(scalars, metrics, self._samples.joined(), self._computer, at_one)


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
    config: FullConfig, known_vocabulary: Path, quarantine_file: Path | None = None, share: tuple[int, int] = (0, 1)
) -> tuple[TagVocabulary, DataLoader, DataLoader, TaggerModel]:
    """(vocabulary, training loader, validation loader, model) of a run that starts, goes on or is looked at.

    The vocabulary is the run's own where `known_vocabulary` exists. The model is new: it starts from the tags' shares
    of the images. `quarantine_file`, `share`: see `create_dataloaders`. Raises InputError for data that cannot be used.
    """
    index = open_dataset(config.data)
    ontology = open_ontology(config.vocabulary, index, known_vocabulary)
    if known_vocabulary.exists():
        vocabulary = TagVocabulary.load(known_vocabulary)
    else:
        vocabulary = configured_vocabulary(config.vocabulary, index, ontology)
    train, validation = create_dataloaders(
        config, vocabulary, index, quarantine_file=quarantine_file, ontology=ontology, share=share
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


def open_run(place: Place, overrides: Sequence[str]) -> tuple[Path, FullConfig]:
    """The run of a place and its settings. Raises InputError for a model folder by itself."""
    if place.run is None:
        raise InputError(f"{place.path} is a model without its run, which names the images; use --compare with a run")
    config = load_config(place.run / "config.yaml", overrides, environment={})
    check_paths(config)
    if moved := split_changes(place.run / "config.yaml", config):
        raise InputError(f"{moved[0]}: images that were trained on would count as held out; leave the split as it is")
    return place.run, config


def put_weights(model: TaggerModel, weights: NamedWeights, config: FullConfig, device: torch.device) -> nn.Module:
    """The model on its device with these weights, compiled as in training. Raises InputError where they do not fit."""
    check_weights(named_tensors(model), weights.tensors, weights.name)
    model.load_state_dict(weights.tensors)
    model.to(device)
    compile_model(model, config.training.compile, device)
    return model


def choose_images(options: Namespace, validation: DataLoader) -> tuple[DataLoader, NDArray[np.integer]]:
    """A loader of the part that the options ask for, and which of its rows: all, or some chosen by hash."""
    part, split = Part[options.part.upper()], validation.split
    assert split is not None
    beside = validation if part == Part.VAL else create_part_loader(validation, part)
    rows = split.rows(part)
    if options.fraction is not None or options.images is not None:
        rows = hashed_subset(rows, split.keys, fraction=options.fraction, count=options.images)
    return beside, rows


def serve(rows: NDArray[np.integer], config: FullConfig, beside: DataLoader, load: LoadOptions) -> DataLoader:
    """A loader of some rows of the part that `beside` serves, as the trainer makes it."""
    batch_size = config.validation.batch_size or config.training.batch_size
    return DataLoader(beside.dataset, rows, batch_size, load, split=beside.split, quarantine=beside.ledger.quarantine)


def evaluate_place(options: Namespace) -> tuple[Path, list[RenderableType]]:
    """Score the weights of a run or checkpoint as the options ask: the JSON file that was written, and what to show."""
    place = find_place(options.run or options.checkpoint)
    run, config = open_run(place, options.overrides)
    output: Path = options.output or default_file("evaluation.json", place, options)
    chosen = choose_weights(place, options.weights)
    vocabulary, train, validation, model = open_data_and_model(config, run / "vocabulary.json")
    for weights in chosen:
        weights.require_vocabulary(vocabulary.sha256)
    beside, rows = choose_images(options, validation)
    loader = serve(rows, config, beside, beside.options)
    split, part, index, ontology = loader.split, loader.part, loader.dataset.index, loader.dataset.ontology
    assert split is not None and part is not None
    if options.mode == "hierarchical" and ontology is None:
        raise InputError(f"--mode hierarchical: {run} has no ontology; train with vocabulary.ontology_file")
    relations = None if ontology is None or options.mode == "tags" else relate(ontology, vocabulary.tags)
    named = [vocabulary.index(tag if ontology is None else ontology.canonical(tag)) for tag in options.tags or ()]
    num_tags, threshold, trained_on = len(vocabulary), config.validation.threshold, split.training_rows
    tags = TagList(vocabulary.tags, vocabulary.categories, train.dataset.table.count(trained_on))
    facts: dict[str, object] = {
        "mode": options.mode,
        **image_facts(run, options.overrides, split, part, len(rows)),
        "num_training_images": len(trained_on),
        "training_part_unchanged": training_part_unchanged(place, split),
        "vocabulary_sha256": vocabulary.sha256,
    }
    device = resolve_device(config.training.device)
    criterion = build_criterion(config, vocabulary).to(device)
    # Two models rather than one whose weights are exchanged for each batch: that would copy all weights three times,
    # and training this model has taken four times their memory.
    models = [model, *(create_model(model.config) for _ in chosen[1:])]
    ready = [put_weights(each, weights, config, device) for each, weights in zip(models, chosen, strict=True)]
    # Where a model has its own thresholds for these images, everything but the scalars is at them.
    fitted = [fitted_thresholds(each, split, part, loader.preprocess) for each in chosen]
    suspects = Suspects(num_tags, options.suspects) if options.suspects else None
    with contextlib.ExitStack() as stack:
        stack.callback(loader.close)
        predictions = None
        if options.save_predictions is not None:
            exclusive = vocabulary.rating_indices if config.loss.rating_weight is not None else ()
            keep, about = Keep(options.min_score, options.top), {**facts, "weights": chosen[0].name}
            predictions = PredictionFile(options.save_predictions, index, vocabulary.tags, keep, about, exclusive)
            stack.enter_context(predictions)
        page: Path | None = default_file("report.html", place, options) if options.report is True else options.report
        drawn = None
        if page is not None or options.create_plots is not None:
            drawn = ReportCollector(
                page,
                options.create_plots,
                names=tags.names,
                categories=tags.categories,
                training_counts=tags.training_counts,
                num_training_images=len(trained_on),
                logit_thresholds=logit_of(threshold) if fitted[0] is None else fitted[0].logits,
            )
        others = (suspects, predictions, drawn)
        watches = [Watch.create(num_tags, threshold, own, named, relations, others) for own in fitted]
        subjects = [
            Subject(each, criterion, num_tags, threshold, None if own is None else own.logits, watch.collectors)
            for each, own, watch in zip(ready, fitted, watches, strict=True)
        ]
        precision = MixedPrecisionTrainer(config.training.mixed_precision, device)
        evaluations = evaluate_all(subjects, loader, precision, device)
    results = []
    for weights, done, watch in zip(chosen, evaluations, watches, strict=True):
        scalars = {name.replace("val/", f"{options.part}/"): value for name, value in done.scalars.items()}
        results.append(
            watch.scores(weights.name, weights.kind, scalars, done.metrics, done.computer, tags, done.at_one)
        )
    facts["num_images_refused"] = loader.refused
    write_json(output, evaluation_document(facts, results, tags, index))
    shown = list(evaluation_tables(facts, results, tags, index))
    if suspects is not None:
        about = {"run": str(run), "roots": [str(root) for root in index.roots], "weights": chosen[0].name}
        about |= {"vocabulary_sha256": vocabulary.sha256, "num_images": suspects.num_images}
        doubtful = default_file("suspects.jsonl", place, options)
        write_suspects(doubtful, suspects.strongest(), index, vocabulary.tags, about, ontology)
        shown.append(f"the most doubtful labels: {doubtful}")
    if drawn is not None:
        drawn.write(
            evaluations[0].computer,
            title=f"Evaluation of {run.resolve().name}",
            facts=page_facts(facts, results[0]),
            describe_image=lambda row: (printable(index.image_path(row)), index.rating(row)),
            everything_in=output.name,
            summary=results[0].summary,
            scores=results[0].tags,
            hierarchy=results[0].hierarchy,
            chosen=named,
        )
        shown += [
            f"{what}: {place}" for what, place in (("the report", page), ("the plots", options.create_plots)) if place
        ]
    if predictions is not None:
        shown.append(f"every image's scores: {predictions.path}")
    return output, shown


def open_contender(
    place: Place, overrides: Sequence[str], beside: DataLoader, home: FullConfig, device: torch.device
) -> tuple[Contender, LoadOptions, PrecisionMode]:
    """A model to compare on the images of `beside`, a loader of the run of `home`, and how it sees them."""
    weights, config, split, unchanged = choose_weights(place)[0], home, None, None
    if place.run is None:
        assert weights.artifact is not None
        model = create_model(VisionTransformerConfig.from_dict(weights.artifact.model_config))
        tags, threshold = tuple(tag.name for tag in weights.artifact.tags), weights.artifact.threshold
        load = replace(beside.options, preprocess=weights.artifact.preprocess, cache=None)
    else:
        run, config = open_run(place, overrides)
        vocabulary = TagVocabulary.load(run / "vocabulary.json")
        weights.require_vocabulary(vocabulary.sha256)
        split = split_dataset(config.data, open_dataset(config.data))
        if beside.split is None or split.key != beside.split.key:
            raise InputError(f"{run} is split by {split.key}, the other run is not: what both hold out cannot be told")
        unchanged = training_part_unchanged(place, split)
        load = LoadOptions.from_config(config.data, config.model.resolved_patch_size, on_cuda=device.type == "cuda")
        mean, std = load.preprocess.mean, load.preprocess.std
        model = create_model(config.model, len(vocabulary), config.data.image_size, mean=mean, std=std)
        tags, threshold = vocabulary.tags, config.validation.threshold
    own = None if weights.artifact is None or beside.part == Part.CALIB else weights.artifact.thresholds
    own = own if sees_alike(weights, load.preprocess) else None
    logits = np.full(len(tags), logit_of(threshold)) if own is None else own.logits
    ready = put_weights(model, weights, config, device)
    side = Contender(weights.name, tags, ready, logits, own is not None, split, unchanged)
    return side, load, config.training.mixed_precision


def compare_places(options: Namespace) -> tuple[Path, list[RenderableType]]:
    """Score two models on the same images and tags: the JSON file that was written, and what to show."""
    places = [find_place(path) for path in options.compare]
    asked = [] if options.run is None else [find_place(options.run)]
    home = next((place for place in (*asked, *places) if place.run is not None), None)
    if home is None:
        raise InputError("--compare of two models without their runs: add --run DIR, whose images both are to score")
    run, config = open_run(home, options.overrides)
    output: Path = options.output or default_comparison(run, places, options)
    vocabulary, _, validation, _ = open_data_and_model(config, run / "vocabulary.json")
    beside, rows = choose_images(options, validation)
    split, part, device = beside.split, beside.part, resolve_device(config.training.device)
    assert split is not None and part is not None
    opened = [open_contender(place, options.overrides, beside, config, device) for place in places]
    sides = [side for side, _, _ in opened]
    common = common_tags(vocabulary.tags, [side.tags for side in sides])
    image_ids = split.keys[rows]
    kept = rows[~np.logical_or.reduce([side.was_made_from(image_ids) for side in sides])]
    if not len(kept):
        raise InputError(f"none of the {len(rows):,} images is held out by both; compare runs of one split")
    subjects = []
    for side in sides:
        model, thresholds = side.on_tags(common)
        subjects.append(Subject(model, None, len(common), logit_thresholds=thresholds))
    numbers = torch.full((len(vocabulary),), -1)
    numbers[[vocabulary.index(tag) for tag in common]] = torch.arange(len(common))
    # Images are decoded once where both models see the same pixels.
    views = [(load.preprocess, load.decoding, load.cache, mode) for _, load, mode in opened]
    counts: list[MetricComputer] = []
    for group in [subjects] if views[0] == views[1] else [subjects[:1], subjects[1:]]:
        _, load, mode = opened[len(counts)]
        with contextlib.closing(serve(kept, config, beside, load)) as loader:
            batches = ((batch.with_tags(numbers), position) for batch, position in loader)
            counts += [e.computer for e in evaluate_all(group, batches, MixedPrecisionTrainer(mode, device), device)]
    found = compare(counts[0], counts[1])
    facts = {
        **image_facts(run, options.overrides, split, part, len(rows)),
        "sides": [side.facts(common, image_ids) for side in sides],
    }
    write_json(output, comparison_document(facts, found, common))
    return output, list(comparison_tables(facts, found, common))


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints tables, writes JSON; 0 done, 2 bad input, 1 anything else."""
    options = parse_options(arguments)
    log_to_console(logging.WARNING)
    output, shown = evaluate_place(options) if options.compare is None else compare_places(options)
    with reader_may_leave():
        console = Console(markup=False, highlight=False)
        for each in shown:
            console.print(each)
        print(f"every number: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
