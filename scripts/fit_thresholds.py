"""Fit a trained model's thresholds again: `python -m scripts.fit_thresholds --run runs/demo --objective precision`.

The run's calibration images are scored by its model, and the thresholds go into the model folder in place of those
that are there; with `--output` into a file for `scripts.predict --thresholds`, and the model stays as it is. Refuses a
run without calibration images, and a run that is being trained.
"""

if __name__ == "__main__":
    from tagger.command import start_quietly

    start_quietly()  # importing torch takes seconds

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from close_run import fit_model_thresholds
from Configuration_System import check_paths, load_config, split_changes
from tagger.artifact import attach_thresholds
from tagger.artifact.store import THRESHOLDS_FILE
from tagger.command import command
from tagger.errors import InputError
from tagger.evaluation.place import Place
from tagger.evaluation.training_part import training_part_unchanged
from tagger.files import write_atomic
from tagger.logs import log_to_console
from tagger.metrics.thresholds import TagThresholds
from tagger.options import Parser, number, output_file
from tagger.output import reader_may_leave
from tagger.run_folder import lock_path, model_dir, require_model
from tagger.run_lock import FolderLock, LockedError
from training_utils import resolve_device
from validation_loop import open_data_and_model

OBJECTIVES = ("f1", "equal", "precision", "tags_per_image")


def fit(run: Path, overrides: Sequence[str], output: Path | None) -> TagThresholds:
    """Fit and store them. Raises InputError for what the user can mend."""
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run} is not a run folder: it has no config.yaml; give the folder that training printed")
    require_model(run)
    config = load_config(run / "config.yaml", overrides, environment={})
    check_paths(config)
    if moved := split_changes(run / "config.yaml", config):
        raise InputError(
            f"{moved[0]}: the images to fit thresholds on would be among those that {run} was trained on; leave the "
            "split as it is, or train a new run with it"
        )
    try:
        lock = FolderLock(lock_path(run))
    except LockedError as error:
        raise InputError(f"{run}: {error}; wait until its training has ended") from error
    try:
        _, _, beside, model = open_data_and_model(config, run / "vocabulary.json")
        assert beside.split is not None
        training_part_unchanged(Place(run, run), beside.split)  # says so where it is not
        model.to(resolve_device(config.training.device))
        thresholds = fit_model_thresholds(config, model_dir(run), model, beside)
        if output is not None:
            write_atomic(output, thresholds.to_json())
        else:
            attach_thresholds(model_dir(run), thresholds)
    finally:
        lock.release()
    return thresholds


def as_table(thresholds: TagThresholds) -> Table:
    """What they came to on the images that they were fitted on."""
    table = Table(show_header=False, title=f"thresholds for {thresholds.goal.describe()}")
    table.add_row("fitted on", f"{thresholds.num_images:,} calibration images")
    for name, value in thresholds.on_calib.items():
        table.add_row(f"{name} there", "not a number" if value is None else f"{value:.4f}")
    low, middle, high = np.quantile(thresholds.probabilities, (0.05, 0.5, 0.95))
    table.add_row("of the tags", f"5 % below {low:.3f}, half below {middle:.3f}, 95 % below {high:.3f}")
    table.add_row("one for all", f"{thresholds.global_probability:.3f}")
    table.add_row("tags without an image", f"{int((thresholds.support == 0).sum()):,} of {len(thresholds.support):,}")
    return table


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m scripts.fit_thresholds",
        description="Fit the thresholds of a run's model to its calibration images.",
        epilog="example: python -m scripts.fit_thresholds --run runs/demo --objective precision --precision 0.9",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="a run folder, e.g. runs/demo")
    parser.add_argument("--objective", choices=OBJECTIVES, help="what for (default: the run's setting)")
    parser.add_argument("--precision", type=number(most=1), metavar="P", help="for precision: 0.9 and the like")
    parser.add_argument("--tags-per-image", type=number(), metavar="N", help="for tags_per_image: how many")
    parser.add_argument(
        "--output", type=output_file, metavar="FILE", help="write this file and leave the model as it is"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="e.g. data.roots=[/moved/images]"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.precision is not None and options.objective != "precision":
        parser.error("argument --precision: it is for --objective precision")
    if (options.tags_per_image is not None) != (options.objective == "tags_per_image"):
        parser.error("argument --tags-per-image: it goes with --objective tags_per_image, and that with it")
    return options


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parse(arguments)
    log_to_console(logging.WARNING)
    words = list(options.overrides)
    if options.objective is not None:
        wanted = "null" if options.tags_per_image is None else options.tags_per_image
        words += [
            f"validation.threshold_objective={options.objective}",
            f"validation.threshold_tags_per_image={wanted}",
        ]
    if options.precision is not None:
        words.append(f"validation.threshold_precision={options.precision}")
    thresholds = fit(options.run, words, options.output)
    with reader_may_leave():
        Console().print(as_table(thresholds))
        print(f"thresholds: {options.output or model_dir(options.run) / THRESHOLDS_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
