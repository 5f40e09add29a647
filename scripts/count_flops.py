"""What a recipe asks of the machine: operations of forward and backward passes over a whole run, phase by phase.

Counted as `tagger.flops` says, for squares (aspect buckets have up to a few per cent fewer tokens) and for every image
of every epoch (training leaves out an incomplete last batch). With --images and --tags no data set is needed.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from Configuration_System import FullConfig, load_config
from model_architecture import TaggerModel, create_model
from tagger.command import command
from tagger.files import write_json
from tagger.flops import training_flops
from tagger.logs import log_to_console
from tagger.options import Parser, output_file, whole
from training_phases import Phase, resolve_phases
from validation_loop import open_data_and_model


@dataclass(frozen=True)
class PhaseCost:
    """images: of the whole run, seen in this phase. flops_an_image: operations of forward and backward."""

    phase: Phase
    images: int
    flops_an_image: float

    @property
    def flops(self) -> float:
        """Of the whole phase."""
        return self.images * self.flops_an_image


def flops_an_image(config: FullConfig, num_tags: int, image_size: int, batch_size: int, patch_dropout: float) -> float:
    """Operations of one training step over its images."""

    def build() -> TaggerModel:
        model = create_model(config.model, num_tags, config.data.image_size)
        model.patch_dropout = patch_dropout
        return model

    return training_flops(build, batch_size, image_size) / batch_size


def count(config: FullConfig, num_images: int, num_tags: int) -> list[PhaseCost]:
    """Each phase of a run over `num_images` training images with `num_tags` tags."""
    seen = num_images * config.training.num_epochs
    return [
        PhaseCost(
            phase,
            round(phase.share * seen),
            flops_an_image(config, num_tags, phase.image_size, phase.batch_size, phase.patch_dropout),
        )
        for phase in resolve_phases(config)
    ]


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints a row for each phase, their sum, and what the run would cost at its last size alone."""
    parser = Parser(
        description="Count the operations that training a recipe takes, phase by phase.",
        epilog="example: python -m scripts.count_flops --config configs/icons.yaml --images 1533 --tags 380",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="a recipe, e.g. configs/demo.yaml")
    parser.add_argument("--images", type=whole(), metavar="N", help="training images (default: those of the data set)")
    parser.add_argument("--tags", type=whole(), metavar="N", help="tags (default: those of the data set)")
    parser.add_argument("--output", type=output_file, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, over those of the file")
    options = parser.parse_intermixed_args(arguments)
    log_to_console()
    config = load_config(options.config, options.overrides)
    num_images, num_tags = options.images, options.tags
    if num_images is None or num_tags is None:
        vocabulary, train, _, _ = open_data_and_model(config, config.run.folder / "vocabulary.json")
        num_images, num_tags = num_images or train.num_rows, num_tags or len(vocabulary)
    costs = count(config, num_images, num_tags)
    flops, images = sum(cost.flops for cost in costs), sum(cost.images for cost in costs)
    whole_flops = images * flops_an_image(
        config, num_tags, config.data.image_size, config.training.batch_size, config.model.patch_dropout
    )
    title = f"{config.training.num_epochs} epochs of {num_images:,} images, {num_tags:,} tags"
    table = Table("phase", "pixels", "batch", "images", "GFLOP an image", "TFLOP", "share", title=title)
    for number, cost in enumerate(costs, 1):
        table.add_row(
            str(number), str(cost.phase.image_size), str(cost.phase.batch_size), f"{cost.images:,}",
            f"{cost.flops_an_image / 1e9:.3f}", f"{cost.flops / 1e12:,.1f}", f"{cost.flops / flops:.0%}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        f"{flops / 1e12:,.1f} TFLOP, {flops / whole_flops:.3f} of a run at {config.data.image_size} px throughout"
    )
    if options.output is not None:
        rows = [
            {
                "image_size": cost.phase.image_size,
                "batch_size": cost.phase.batch_size,
                "images": cost.images,
                "flops": cost.flops,
            }
            for cost in costs
        ]
        write_json(options.output, {"format_version": 1, "phases": rows, "flops": flops, "ratio": flops / whole_flops})
    return 0


if __name__ == "__main__":
    sys.exit(main())
