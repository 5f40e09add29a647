"""Make or bring up to date the shrink cache of a data set: its images once at training size, in a few large files.

Start it again after it was stopped or killed, or when images came or went: it goes on from what is committed. What
cannot be decoded is left out and listed in refused.json with its reason; training reads such files themselves.
"""

import argparse
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from Configuration_System import FullConfig, load_config
from dataset_loader import open_dataset
from tagger.command import command
from tagger.data.shrink_build import REFUSED, BuildOptions, BuildProgress, BuildReport, build_cache, check_folder
from tagger.data.shrink_cache import CacheError, CacheRecipe
from tagger.options import OptionError, Parser, number, output_folder, whole
from tagger.preprocess import Preprocess

EXAMPLE = (
    "example:\n  python -m scripts.build_cache configs/demo.yaml --folder .tagsmith/cache-448 --size 448\n"
    "then train with data.cache_dir=.tagsmith/cache-448"
)


class _Bar:
    """The progress of a build on the console."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self.progress.add_task("looking at the files", total=None, rate="")

    def show(self, state: BuildProgress) -> None:
        """Images done of those that were not in the cache, and how fast."""
        done = state.made + state.linked + state.refused
        speed = self.progress.tasks[0].speed
        self.progress.update(
            self._task,
            description=f"shrinking ({state.refused:,} refused)" if state.refused else "shrinking",
            total=state.total - state.current,
            completed=done,
            rate=f"{speed:,.0f} images/s" if speed else "",
        )


def _options(config: FullConfig, arguments: argparse.Namespace) -> BuildOptions:
    red, green, blue = config.data.background
    data, patch_size = config.data, config.model.resolved_patch_size
    needed = Preprocess.create(data.image_size, data.fit, patch_size, (red, green, blue)).longest_side
    recipe = CacheRecipe(arguments.size or needed, (red, green, blue), arguments.quality)
    return BuildOptions(
        recipe,
        max_pixels=int(config.data.max_megapixels * 1_000_000),
        form="loose" if arguments.loose else "tar",
        shard_bytes=math.ceil(arguments.shard_mb * 1_000_000),
        shard_images=arguments.shard_images,
        num_workers=arguments.workers,
        prune=arguments.prune,
        verify=arguments.verify,
    )


def _lines(report: BuildReport, folder: Path) -> list[str]:
    done = report.progress
    lines = [
        f"{folder}: {report.num_entries:,} copies, {report.num_bytes / 1e6:,.1f} MB; of {done.total:,} images "
        f"{done.current:,} were there, {done.made:,} made, {done.linked:,} known by content, {done.refused:,} refused"
    ]
    if report.damaged:
        lines.append(f"{report.damaged:,} damaged copies were dropped and made anew where their images are there")
    if report.dropped:
        lines.append(f"{report.dropped:,} copies of images that are no longer there were dropped")
    for reason, count in Counter(item.reason for item in report.refused).most_common(5):
        example = next(item.path for item in report.refused if item.reason == reason)
        lines.append(f"refused, {reason}: {count:,} (for example {example})")
    if report.refused:
        lines.append(f"all of them: {folder / REFUSED}")
    return lines


def _parser() -> Parser:
    parser = Parser(
        prog="python -m scripts.build_cache",
        description="Copy a data set's images once at training size, so that training decodes small files.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="RECIPE", help="a recipe that names the data set")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. data.roots=[/my/images]")
    parser.add_argument("--folder", type=output_folder, help="where the cache is (default: data.cache_dir)")
    size = "longest side of the copies, pixels (default: data.image_size, or the longest side of its buckets)"
    parser.add_argument("--size", type=whole(1, 65_500), help=size)
    parser.add_argument(
        "--quality", type=whole(1, 100), default=95, help="JPEG quality (default: 95; colour is kept 4:4:4)"
    )
    parser.add_argument("--loose", action="store_true", help="folders of files instead of tar shards")
    parser.add_argument(
        "--shard-mb", type=number(), default=1000, help="a shard is closed at this size (default: 1000)"
    )
    parser.add_argument("--shard-images", type=whole(), default=20_000, help="or with so many images (default: 20000)")
    workers = "processes (default: one a core; 0: none beside this one)"
    parser.add_argument("--workers", type=whole(0, 1024), help=workers)
    parser.add_argument("--prune", action="store_true", help="drop copies of images that are no longer in the data set")
    parser.add_argument("--verify", action="store_true", help="check every copy first, and make damaged ones anew")
    return parser


def _build(arguments: argparse.Namespace, console: Console) -> tuple[BuildReport, Path]:
    config = load_config(arguments.config, arguments.overrides)
    folder = arguments.folder or (Path(config.data.cache_dir) if config.data.cache_dir is not None else None)
    if folder is None:
        raise CacheError("no folder for the cache; give --folder, for example --folder .tagsmith/cache")
    try:
        output_folder(str(folder))
    except OptionError as error:
        raise CacheError(f"data.cache_dir: {error}") from error
    options = _options(config, arguments)
    check_folder(folder, options, [Path(root) for root in config.data.roots])
    index = open_dataset(config.data)
    bar = _Bar(console)
    with bar.progress:
        show: Callable[[BuildProgress], None] = bar.show
        return build_cache(folder, index, options, show), folder


@command("what is committed stays, start again to go on")
def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 done, 2 bad input, 6 failed storage; what is committed stays."""
    arguments = _parser().parse_intermixed_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    report, folder = _build(arguments, Console(stderr=True))
    print("\n".join(_lines(report, folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
