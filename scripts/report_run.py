"""What a run came to: its scores, a few held-out images tagged by its model, where the model lies, what to do next.

Reads the run folder and the data set that it names, writes nothing there. A run without a model yet, or one that was
killed, is summed up as it stands. Refuses a folder that is not a run.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from Configuration_System import FullConfig, load_config
from dataset_loader import open_dataset, split_dataset
from model_architecture import VisionTransformerConfig, create_model
from orientation_handler import OrientationHandler
from tagger.artifact import load_artifact
from tagger.command import command
from tagger.errors import InputError
from tagger.files import read_json
from tagger.options import Parser, whole
from tagger.output import reader_may_leave
from tagger.predict import Prediction, Tagger
from tagger.record import Record
from tagger.run_folder import model_dir, read_results
from training_utils import resolve_device

EVALUATION_FORMAT_VERSION = 2


def pick_held_out(config: FullConfig, count: int) -> list[Record]:
    """`count` held-out images (fewer where there are fewer), spread evenly over the validation rows."""
    index = open_dataset(config.data)
    rows = split_dataset(config.data, index).validation_rows
    count = min(count, len(rows))
    return [index.record(int(rows[(2 * i + 1) * len(rows) // (2 * count)])) for i in range(count)]


def tagged_table(run: Path, config: FullConfig, records: Sequence[Record]) -> Table:
    """The model's tags for each image beside the image's own: wrong ones in red, ones not in the vocabulary in ()."""
    artifact = load_artifact(model_dir(run))
    model = create_model(VisionTransformerConfig.from_dict(artifact.model_config))
    tagger = Tagger(model, artifact, resolve_device(config.training.device))
    limit = f"{artifact.threshold:g}" if artifact.thresholds is None else "the threshold of the tag"
    title = f"held-out images, tags scored at least {limit}"
    paths = [Path(record.image_path) for record in records]
    columns = (Column(name, overflow="fold") for name in ("image", "tags given", "tags it has"))
    table = Table(*columns, title=title, show_lines=True)
    known = {tag.name for tag in artifact.tags}
    for record, outcome in zip(records, tagger.predict(paths), strict=True):
        image = Text(shown_path(Path(record.image_path)))
        own = ", ".join(tag if tag in known else f"({tag})" for tag in sorted(record.tags))
        if not isinstance(outcome, Prediction):
            table.add_row(image, Text(f"not readable: {outcome.reason}", style="red"), Text(own))
            continue
        given = Text()
        for tag in outcome.tags:
            right = tag.name in record.tags or tag.name == f"rating:{record.rating}"
            given.append(", " if given else "")
            given.append(f"{tag.name} {tag.score:.2f}", style="" if right else "red")
        table.add_row(image, given, Text(own))
    return table


def summary_table(run: Path, config: FullConfig) -> Table:
    """Scores, cost, where the model lies, and the two commands that come next."""
    results = read_results(run)
    columns = (Column(overflow="fold"), Column(overflow="fold"))
    table = Table(*columns, title=f"run {run.name}: {results.status}", show_header=False)
    for name, value in results.final.items():
        table.add_row(name, "not a number" if value is None else f"{value:.4f}")
    if results.best is not None:
        table.add_row("best", f"{results.best.metric} {results.best.value:.4f} at step {results.best.step}")
    if (left_right := left_right_score(run, config)) is not None:
        table.add_row("left/right tags", left_right)
    speed = "" if results.images_per_second is None else f", {results.images_per_second:.0f} images/s"
    table.add_row("training", f"{results.steps} steps in {results.seconds / 60:.1f} minutes{speed}")
    if results.error is not None:
        table.add_row("why it ended", Text(results.error))
    if not model_dir(run).is_dir():
        table.add_row("model", "none yet: it is written when a run ends that was validated")
        return table
    table.add_row("model", Text(str(model_dir(run))))
    place, runs = shlex.quote(str(model_dir(run))), shlex.quote(str(run.parent))
    table.add_row("tag images", Text(f"{python_command()} -m scripts.predict {place} IMAGE_OR_FOLDER"))
    table.add_row("curves", Text(f"{tensorboard_command()} {runs}"))
    return table


def left_right_score(run: Path, config: FullConfig) -> str | None:
    """Average precision of the tags that swap in a mirror: whether training with mirroring still tells them apart.

    None where mirroring is off, without such tags, or without an `evaluation.json` of its model on the validation part.
    """
    path = run / "evaluation.json"
    if config.orientation.mirror_probability == 0 or not path.is_file():
        return None
    content = read_json(path, "evaluation", EVALUATION_FORMAT_VERSION)
    whole = {"mode": "full", "part": "val", "kind": "model"}
    if any(content.get(name, value) != value for name, value in whole.items()):
        return None
    handler = OrientationHandler(config.orientation.map_path, config.orientation.mode)
    scored = [
        (tag["average_precision"], tag["name"])
        for tag in content["tags"]
        if tag["average_precision"] is not None and handler.mirror_tag(tag["name"]) != tag["name"]
    ]
    if not scored:
        return None
    lowest, name = min(scored)
    mean = sum(precision for precision, _ in scored) / len(scored)
    return f"AP {mean:.4f} over {len(scored)} tags, lowest {lowest:.4f} ({name})"


def python_command() -> str:
    """How to call the Python that runs this from the working directory, its environment included."""
    # Not resolved: the link's own place is what makes it the environment's Python.
    place = shown_path(Path(sys.executable))
    if sys.platform == "win32":
        return f"& '{place}'" if " " in place else place
    return shlex.quote(place)


def tensorboard_command() -> str:
    """How this system starts TensorBoard."""
    if sys.platform == "win32":
        return r"powershell -ExecutionPolicy Bypass -File scripts\Start_TensorBoard.ps1"
    return "bash scripts/start_tensorboard.sh"


def shown_path(path: Path) -> str:
    """The path from the working directory where it lies below it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 done, 2 bad input."""
    parser = Parser(
        prog="python -m scripts.report_run",
        description="Tag a few held-out images with a run's model and sum the run up.",
        epilog="example: python -m scripts.report_run runs/demo --predict 3",
    )
    parser.add_argument("run", type=Path, help="a run folder, e.g. runs/demo")
    parser.add_argument("--predict", type=whole(0), default=3, metavar="N", help="held-out images to tag (default: 3)")
    options = parser.parse_args(arguments)
    run: Path = options.run
    console = Console()
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run} is not a run folder: it has no config.yaml; give the folder that training printed")
    config = load_config(run / "config.yaml", environment={})
    with reader_may_leave():
        if options.predict > 0 and model_dir(run).is_dir():
            console.print(tagged_table(run, config, pick_held_out(config, options.predict)))
        console.print(summary_table(run, config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
