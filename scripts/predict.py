"""Tag images with a trained model: `python -m scripts.predict MODEL IMAGE_OR_FOLDER...`.

Exit codes: 0 every image was tagged, 1 some could not be read (each is named on stderr), 2 bad input or no image.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import orjson

from model_architecture import VisionTransformerConfig, create_model
from tagger.artifact import Artifact, load_artifact, read_thresholds
from tagger.command import command
from tagger.contact_sheet import Card, SheetTag, draw_sheet
from tagger.data.scan import printable
from tagger.devices import resolve_device
from tagger.errors import InputError
from tagger.metrics.thresholds import TagThresholds
from tagger.options import Parser, input_file, number, output_file, whole
from tagger.output import reader_may_leave
from tagger.predict import Prediction, Tagger, Unreadable, find_images
from tagger.run_folder import require_model

EXAMPLE = "example: python -m scripts.predict runs/demo data/demo --top 5"
SHEET_IMAGES = 48
SHEET_TAGS = 8


def find_model(place: Path) -> Path:
    """The model folder that `place` is or, for a run, has. Raises InputError for anything else."""
    if (place / "config.json").is_file():
        return place
    if (place / "config.yaml").is_file():
        return require_model(place)
    if not place.is_dir():
        raise InputError(f"{printable(place)} is not a folder; give a run folder, e.g. runs/demo, or its model folder")
    raise InputError(f"{printable(place)} is no run and no model: it has neither config.yaml nor config.json")


def as_json(prediction: Prediction) -> str:
    """One line of JSON."""
    tags = [{"name": tag.name, "category": tag.category, "score": tag.score} for tag in prediction.tags]
    return orjson.dumps({"path": printable(prediction.path), "tags": tags}).decode()


def as_table(prediction: Prediction) -> str:
    """The path, and a line for each tag."""
    lines = [f"  {tag.score:.2f}  {tag.name}" for tag in prediction.tags]
    return "\n".join([printable(prediction.path), *(lines or ["  no tag at or above the threshold"])])


def as_card(prediction: Prediction) -> Card:
    """The image as the model saw it, with its first tags."""
    tags = tuple(SheetTag(tag.name, tag.score) for tag in prediction.tags[:SHEET_TAGS])
    image = np.ascontiguousarray(prediction.image.permute(1, 2, 0).numpy())
    return Card(image, printable(prediction.path.name), tags, len(prediction.tags) - len(tags))


def _thresholds(options: argparse.Namespace, artifact: Artifact) -> tuple[float | TagThresholds, str]:
    """What a tag must reach, and that in words."""
    chosen: float | TagThresholds | None = options.threshold
    if options.thresholds is not None:
        chosen = read_thresholds(options.thresholds, artifact.weights_sha256, artifact.vocabulary_sha256)
    elif chosen is None:
        chosen = artifact.thresholds or artifact.threshold
    if isinstance(chosen, TagThresholds):
        return chosen, f"tags at or above their own thresholds ({chosen.goal.describe()})"
    return chosen, f"tags at or above {chosen:.2f}"


def tag_images(options: argparse.Namespace) -> int:
    """Tag what the options name and write it out; the exit code. Raises InputError for what the user can mend."""
    paths = find_images(options.images)
    if not paths:
        raise InputError(f"no images found in {', '.join(printable(place) for place in options.images)}")
    artifact = load_artifact(find_model(options.model))
    model = create_model(VisionTransformerConfig.from_dict(artifact.model_config))
    device = resolve_device(options.device)
    tagger = Tagger(model, artifact, device, options.batch_size, closure=options.closure)
    threshold, shown = _thresholds(options, artifact)
    cards: list[Card] = []
    num_unreadable = 0
    for outcome in tagger.predict(paths, threshold, options.top):
        if isinstance(outcome, Unreadable):
            num_unreadable += 1
            print(f"{printable(outcome.path)}: {outcome.reason}", file=sys.stderr)
            continue
        print(as_json(outcome) if options.json else as_table(outcome))
        if options.sheet is not None and len(cards) < SHEET_IMAGES:
            cards.append(as_card(outcome))
    if cards:
        draw_sheet(cards, artifact.metadata["run"], shown).save(options.sheet)
        more = f" (the first {len(cards)} of {len(paths)} images)" if len(paths) - num_unreadable > len(cards) else ""
        print(f"picture: {options.sheet}{more}", file=sys.stderr)
    if num_unreadable:
        print(f"{num_unreadable} of {len(paths)} images could not be read", file=sys.stderr)
    return 1 if num_unreadable else 0


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(prog="python -m scripts.predict", description="Tag images with a trained model.", epilog=EXAMPLE)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a run folder, e.g. runs/demo, or its model folder")
    parser.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE_OR_FOLDER", help="image files, and folders of them"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line: path, tags with name and score")
    limits = parser.add_mutually_exclusive_group()
    limits.add_argument(
        "--threshold", type=number(least=0, most=1), metavar="P", help="lowest score shown, 0..1 (default: the model's)"
    )
    limits.add_argument(
        "--thresholds", type=input_file, metavar="FILE", help="other thresholds of this model (scripts.fit_thresholds)"
    )
    parser.add_argument(
        "--closure", action="store_true", help="raise each tag to the score of tags that imply it (model's ontology)"
    )
    parser.add_argument("--top", type=whole(), metavar="K", help="at most K tags an image")
    parser.add_argument(
        "--batch-size", type=whole(1, 65_536), default=16, metavar="N", help="images at a time (default: 16)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: auto")
    parser.add_argument(
        "--sheet",
        type=output_file,
        metavar="FILE.png",
        help=f"also draw the first {SHEET_IMAGES} images with their tags",
    )
    options = parser.parse_args(arguments)
    if options.sheet is not None and options.sheet.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        parser.error(f"--sheet {options.sheet}: name a .png file")
    with reader_may_leave():
        return tag_images(options)


if __name__ == "__main__":
    sys.exit(main())
