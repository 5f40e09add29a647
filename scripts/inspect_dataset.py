"""What is in a data set: formats, sizes, tags, ratings, what is left out and why, near-duplicates; and a page of it.

Reads the folders and keeps an index and the images' hashes, so a second look is quick. Changes nothing in the folders.
Refuses a data set without a single usable image.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import orjson
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from tagger.command import command
from tagger.data.index import open_index
from tagger.data.near_duplicates import MAX_BITS
from tagger.data.survey import Distribution, Survey, survey
from tagger.errors import InputError
from tagger.options import OptionError, Parser, input_file, number, output_file, whole
from tagger.output import reader_may_leave
from tagger.report import INSTALL_HINT, libraries_missing
from vocabulary import DEFAULT_INDEX_DIR

JSON_FORMAT_VERSION = 1
DEFAULT_PAGE = Path("inspect.html")
_LISTED_TAGS = 15
_LISTED_GROUPS = 5
_BAR_WIDTH = 30


def look(options: argparse.Namespace, console: Console) -> Survey:
    """The survey of the folders on the command line, with a progress bar where `console` is a terminal."""
    index = open_index(
        options.roots,
        options.index_dir,
        extra_fields=options.extra_fields,
        annotations=options.annotations,
        corrections=options.corrections,
    )
    columns = (TextColumn("images read"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        return survey(
            index,
            bits=None if options.no_duplicates else options.bits,
            max_pixels=int(options.max_megapixels * 1e6),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def show(found: Survey, console: Console) -> None:
    """The survey in tables for a terminal."""
    console.print(f"[bold]{escape(', '.join(found.roots))}[/bold]")
    counted = f"{found.num_images:,} images with tags, {len(found.tag_counts):,} distinct tags"
    console.print(f"{counted}, {found.total_bytes / 1e6:,.1f} MB")
    sizes = Table(
        "", Column("5 %", justify="right"), Column("median", justify="right"), Column("95 %", justify="right")
    )
    sizes.add_column("least .. most", justify="right")
    for name, values in (
        ("width", found.widths),
        ("height", found.heights),
        ("megapixels", found.megapixels),
        ("width / height", found.aspect_ratios),
        ("bytes a file", found.file_bytes),
        ("tags an image", found.tags_per_image),
    ):
        if values is not None:
            sizes.add_row(name, *_figures(values))
    console.print(sizes)
    for title, counts in (("formats, by content", found.formats), ("ratings", found.ratings)):
        if counts:
            console.print(_counts(title, list(counts.items()), found.num_images))
    console.print(_counts("most frequent tags", found.tag_counts[:_LISTED_TAGS], found.tag_counts[0][1]))
    rare = ", ".join(f"{count:,} on fewer than {limit}" for limit, count in found.rare_tags.items() if count)
    console.print(f"rare tags: {rare or 'none'}")
    if found.co_occurring:
        pairs = [(f"{pair.first} + {pair.second}", pair.count) for pair in found.co_occurring[:_LISTED_TAGS]]
        console.print(_counts("most often together", pairs, pairs[0][1]))
    if found.problems:
        problems = Table("problem", Column("files", justify="right"), Column("for example", overflow="fold"))
        for problem in found.problems:
            problems.add_row(escape(problem.kind), f"{problem.count:,}", escape(problem.examples[0]))
        console.print(problems)
    else:
        console.print("no problems: every image has a sidecar that can be used, and every sidecar an image")
    if found.duplicates is not None:
        _show_duplicates(found, console)


def _show_duplicates(found: Survey, console: Console) -> None:
    assert found.duplicates is not None
    seen = found.duplicates
    console.print(
        f"near-duplicates within {seen.bits} bits: {seen.num_groups:,} groups of {seen.num_images:,} images, "
        f"{seen.num_pairs:,} pairs, {seen.num_identical:,} images with the very hash of another"
    )
    for group in seen.largest[:_LISTED_GROUPS]:
        names = ", ".join(escape(name) for name, _ in group.images[:3])
        console.print(f"  {group.size}: {names}{', ...' if group.size > 3 else ''}", soft_wrap=True)


def _figures(values: Distribution) -> list[str]:
    low, median, high, least, most = (
        f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
        for value in (values.low, values.median, values.high, values.least, values.most)
    )
    return [low, median, high, f"{least} .. {most}"]


def _counts(title: str, counts: Sequence[tuple[str, int]], full: int) -> Table:
    table = Table(Column(title, overflow="fold"), Column("images", justify="right"), Column("", width=_BAR_WIDTH))
    for name, count in counts:
        table.add_row(escape(name), f"{count:,}", "█" * max(1, round(_BAR_WIDTH * count / full)))
    return table


def _page(options: argparse.Namespace) -> Path | None:
    """Where the page goes, None for no page. Raises InputError where it was asked for and cannot be."""
    if options.no_page:
        return None
    if libraries_missing():
        if options.output is not None:
            raise InputError(f"--output {options.output}: {INSTALL_HINT}")
        print(f"no page: {INSTALL_HINT}", file=sys.stderr)
        return None
    if options.output is not None:
        return Path(options.output)
    try:
        return output_file(str(DEFAULT_PAGE))
    except OptionError as error:
        raise InputError(f"the page: {error}, with --output FILE; --no-page is for none") from error


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m scripts.inspect_dataset",
        description="Say what is in a data set, and write a page of it.",
        epilog="example: python -m scripts.inspect_dataset data/demo --output demo.html",
    )
    parser.add_argument("roots", nargs="+", type=Path, metavar="ROOT", help="folders with images and sidecars")
    parser.add_argument("--output", type=output_file, metavar="FILE", help=f"the page (default: {DEFAULT_PAGE})")
    parser.add_argument("--no-page", action="store_true", help="write no page")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--annotations", type=input_file, metavar="FILE", help="JSON or JSONL file instead of sidecars")
    parser.add_argument(
        "--corrections", type=input_file, metavar="FILE", help="journal of corrected tags to lay over them"
    )
    parser.add_argument(
        "--extra-fields", nargs="+", default=[], metavar="FIELD", help="sidecar fields that become tags, as in a recipe"
    )
    parser.add_argument(
        "--bits", type=whole(0, MAX_BITS), default=3, help=f"threshold of near-duplicates, 0 to {MAX_BITS} (default: 3)"
    )
    parser.add_argument("--no-duplicates", action="store_true", help="do not read every image for near-duplicates")
    parser.add_argument(
        "--max-megapixels", type=number(), default=200.0, help="larger images are not decoded (default: 200)"
    )
    parser.add_argument("--index-dir", type=Path, default=Path(DEFAULT_INDEX_DIR), help="where the index is kept")
    options = parser.parse_args(arguments)
    if options.no_page and options.output is not None:
        parser.error("--output and --no-page exclude each other")
    return options


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 done, 2 bad input."""
    options = _parse(arguments)
    page = _page(options)
    found = look(options, Console(stderr=True))
    with reader_may_leave():
        if options.json:
            content = {"format_version": JSON_FORMAT_VERSION, **dataclasses.asdict(found)}
            sys.stdout.write(
                orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS).decode() + "\n"
            )
        else:
            show(found, Console())
    if page is not None:
        from tagger.survey_page import write_page  # needs the extra

        write_page(found, page, max_pixels=int(options.max_megapixels * 1e6))
        print(f"page: {page}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
