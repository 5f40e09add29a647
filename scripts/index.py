"""Index folders of images with sidecars, and say what was found and what was not usable, and why.

Does what the start of a training does anyway, with a progress bar and with every rejected file by name.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tagger.command import command
from tagger.data.index import MetadataIndex, open_index
from tagger.data.scan import printable
from tagger.files import write_atomic
from tagger.options import Parser, input_file, output_file
from vocabulary import DEFAULT_INDEX_DIR

TOP_REASONS = 10
EXAMPLES = 3
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Bars:
    """One progress bar a stage; a stage whose end nobody knows counts up."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if stage not in self._tasks:
            self.close()
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)

    def close(self) -> None:
        """Fill the bars: what they stand for has ended."""
        for task in self._progress.tasks:
            self._progress.update(task.id, total=task.completed)


def show(index: MetadataIndex, console: Console) -> None:
    """Print counts, the reasons for what was rejected, and what has no partner."""
    report = index.report()
    console.print(report[0], highlight=False)
    for line in report[1:]:
        if line.startswith("skipped: "):
            console.print(line, highlight=False)
    if index.corrections is not None:
        for line in index.corrections.report:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if index.update is not None:
        console.print(str(index.update), highlight=False)
    ratings = ", ".join(f"{name} {count:,}" for name, count in index.rating_counts().items())
    console.print(f"ratings: {ratings or 'none'}", highlight=False)
    if index.headers is not None:
        console.print(f"image headers: {len(index):,} read, {index.headers.num_broken:,} broken", highlight=False)
    groups: dict[str, list[str]] = {}
    for kind, line in problem_lines(index):
        groups.setdefault(kind, []).append(line)
    if not groups:
        console.print("nothing was rejected")
        return
    table = Table("why", "files", "for example", title="not usable", title_justify="left")
    counts = Counter({kind: len(lines) for kind, lines in groups.items()})
    for kind, count in counts.most_common(TOP_REASONS):
        examples = "\n".join(line.replace("\t", ": ") for line in groups[kind][:EXAMPLES])
        table.add_row(kind, f"{count:,}", Text(examples, overflow="fold"))  # names may look like markup
    console.print(table)
    if len(counts) > TOP_REASONS:
        rest = sum(count for _, count in counts.most_common()[TOP_REASONS:])
        console.print(f"and {rest:,} for {len(counts) - TOP_REASONS} other reasons")


def problem_lines(index: MetadataIndex) -> Iterator[tuple[str, str]]:
    """(kind, "path<tab>reason") of every file that gives no row, no rating or no size."""
    for item in index.rejected:
        yield item.kind, _line(item.path, item.reason)
    for title, paths in (
        (f"image without {index.label_source}", index.images_without_sidecar),
        ("sidecar without image", index.sidecars_without_image),
    ):
        for path in paths:
            yield title, _line(path, title)
    for item in index.unknown_ratings:
        yield (
            "rating not understood (row kept)",
            _line(item.path, f"rating not understood{item.reason[len('rating') :]}"),
        )
    if index.headers is not None:
        for row, reason in index.headers.broken.items():
            yield f"image header: {reason.partition(':')[0]}", _line(printable(index.image_path(row)), reason)


def _line(path: str, reason: str) -> str:
    """One line of a list, whatever a file is called."""
    return "\t".join(_CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text) for text in (path, reason))


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives the exit code: 0 done, 2 bad input."""
    parser = Parser(
        prog="python -m scripts.index",
        description="Index folders of images with sidecars; a second call reads only what has changed.",
        epilog="example: python -m scripts.index data/demo --extra-fields categories --list-rejected rejected.txt",
    )
    parser.add_argument("roots", nargs="+", metavar="ROOT", help="folder of images with sidecars")
    parser.add_argument("--extra-fields", default="", metavar="a,b", help="sidecar fields that become prefixed tags")
    parser.add_argument(
        "--annotations", type=input_file, metavar="FILE", help="JSON or JSON Lines file instead of sidecars"
    )
    parser.add_argument(
        "--corrections", type=input_file, metavar="FILE", help="journal of corrected tags to lay over them"
    )
    parser.add_argument("--index-dir", type=Path, default=DEFAULT_INDEX_DIR, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--headers", action="store_true", help="also read the width and height of every image")
    parser.add_argument(
        "--list-rejected", type=output_file, metavar="FILE", help="write each unusable file and why, one a line"
    )
    options = parser.parse_args(arguments)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bars = Bars(progress)
        index = open_index(
            options.roots,
            options.index_dir,
            extra_fields=[name for name in options.extra_fields.split(",") if name.strip()],
            annotations=options.annotations,
            corrections=options.corrections,
            headers=options.headers,
            progress=bars,
        )
        bars.close()
    show(index, console)
    if options.list_rejected is not None:
        lines = [line for _, line in problem_lines(index)]
        write_atomic(options.list_rejected, "".join(f"{line}\n" for line in lines).encode())
        written = f"{len(lines):,} lines written to {printable(options.list_rejected)}"
        console.print(written, highlight=False, markup=False)
    console.print(f"index: {index.path}", highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
