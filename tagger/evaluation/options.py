"""The command line of evaluation: its options, and which of them go together. Refuses the rest in one line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tagger.data.split import Part
from tagger.errors import InputError
from tagger.evaluation.predictions import SUFFIXES, check_prediction_file
from tagger.options import Parser, number, output_file, output_folder, whole
from tagger.report import require_libraries

PARTS = tuple(part.name.lower() for part in (Part.VAL, Part.TEST, Part.CALIB))
DEFAULT_FRACTION = 0.1
_OF_ONE_MODEL = ("save_predictions", "suspects", "report", "create_plots")
_EPILOG = """examples:
  python validation_loop.py --run runs/demo
  python validation_loop.py --run runs/demo --mode tags --tags "red circle" arrow
  python validation_loop.py --compare runs/demo runs/other
"""


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a call, checked against each other; a fault in one of them ends the command (SystemExit)."""
    options = _parser().parse_intermixed_args(arguments)
    _check(options)
    if options.mode == "fast" and options.fraction is None and options.images is None:
        options.fraction = DEFAULT_FRACTION
    return options


def _check(options: argparse.Namespace) -> None:
    if options.compare is None and options.run is None and options.checkpoint is None:
        raise InputError("say what to score: --run DIR, --checkpoint DIR, or --compare A B")
    if options.compare is not None:
        others = ("checkpoint", "tags", "weights", *_OF_ONE_MODEL)
        extra = [f"--{name.replace('_', '-')}" for name in others if getattr(options, name)]
        extra += [f"--mode {options.mode}"] if options.mode not in ("full", "fast") else []
        if extra:
            raise InputError(f"--compare says which scores to show by itself; leave out {' and '.join(extra)}")
    if options.fraction is not None and options.images is not None:
        raise InputError("--fraction and --images both choose images; give one of them")
    if options.mode == "full" and (options.fraction is not None or options.images is not None):
        raise InputError("--mode full scores every image of the part; for some of them add --mode fast")
    if options.mode == "tags" and not options.tags:
        raise InputError('--mode tags: name the tags, e.g. --tags "red circle" arrow')
    if options.mode != "tags" and options.tags:
        raise InputError("--tags goes with --mode tags")
    if options.save_predictions is not None:
        check_prediction_file(options.save_predictions)
    elif options.min_score is not None or options.top is not None:
        raise InputError("--min-score and --top say what --save-predictions writes; add it")
    single = [f"--{name.replace('_', '-')}" for name in _OF_ONE_MODEL if getattr(options, name)]
    if options.weights == "both" and single:
        verb = "is" if len(single) == 1 else "are"
        raise InputError(f"{' and '.join(single)} {verb} of one kind of weights; use --weights ema or --weights online")
    for name in ("report", "create_plots"):
        if getattr(options, name):
            require_libraries(f"--{name.replace('_', '-')}")


def _page_file(text: str) -> Path:
    if "=" in text:
        raise argparse.ArgumentTypeError(f"{text} reads as a setting; put settings first, or name the page's file")
    return output_file(text)


def _parser() -> Parser:
    parser = Parser(
        prog="validation_loop.py",
        description="Score a trained model on the held-out images of its run, or compare two models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_argument_group("what to score").add_mutually_exclusive_group()
    source.add_argument("--run", type=Path, metavar="DIR", help="a run folder; its model/ is scored")
    source.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="a checkpoint, e.g. runs/demo/checkpoints/step-000000900"
    )
    chosen = parser.add_argument_group("how")
    chosen.add_argument(
        "--mode",
        choices=("full", "fast", "tags", "hierarchical"),
        default="full",
        help="full (default): everything; fast: the same on some images; tags: all about named tags; "
        "hierarchical: with what tags imply",
    )
    chosen.add_argument(
        "--weights",
        choices=("ema", "online", "both"),
        help="of the checkpoint, or of the run's best (default: its model)",
    )
    chosen.add_argument("--part", choices=PARTS, default="val", help="which held-out images (default: val)")
    chosen.add_argument(
        "--fraction", type=number(most=1), metavar="F", help=f"share of them, by hash (fast: {DEFAULT_FRACTION:g})"
    )
    chosen.add_argument("--images", type=whole(), metavar="N", help="so many of them, by hash")
    chosen.add_argument("--tags", nargs="+", metavar="TAG", help="for --mode tags")
    chosen.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="two runs, checkpoints or model folders on the same images; images: those of --run, else of A, else of B",
    )
    written = parser.add_argument_group("what is written")
    written.add_argument(
        "--output",
        type=output_file,
        metavar="FILE",
        help="the JSON file (default: evaluation.json in the run, evaluation-online-test.json and so on)",
    )
    written.add_argument(
        "--save-predictions", type=output_file, metavar="FILE", help=f"every image's scores: {' or '.join(SUFFIXES)}"
    )
    written.add_argument("--min-score", type=number(most=1), metavar="P", help="of these, the scores from P on")
    written.add_argument("--top", type=whole(), metavar="K", help="of these, the K highest of each image")
    written.add_argument(
        "--suspects", type=whole(0), default=0, metavar="N", help="the N most doubtful labels, to suspects.jsonl"
    )
    written.add_argument(
        "--report",
        nargs="?",
        const=True,
        type=_page_file,
        metavar="FILE",
        help="a page with plots and mistakes (default: report.html in the run); needs the extra 'report'",
    )
    written.add_argument("--create-plots", type=output_folder, metavar="DIR", help="the page's plots as SVG files")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="e.g. data.roots=[/moved/images]"
    )
    return parser
