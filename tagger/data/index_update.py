"""The rows of an index from a scan: what an older index still says right is taken over, the rest is read.

The outcome is that of reading everything, byte for byte: an older index saves time and changes nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagger.data.columns import offsets_of
from tagger.data.index_build import BLOCK_ROWS, RowWriter
from tagger.data.pairs import PairTable, as_int64
from tagger.data.parse_pool import ParseTask, parse_in_order
from tagger.data.ragged import gather
from tagger.data.scan import FolderScan, Problems, Rejected, printable
from tagger.data.sidecar import ExtraField, SidecarError, parse_sidecar
from tagger.data.sidecar_rows import FileReader, ParsedSidecars

_NO_ROW = -1
_REFUSED_AS_BEFORE = -2
_DROPPED = -3


@dataclass(frozen=True)
class Update:
    """How many images with sidecars are new, changed, gone or as before, compared with the index that stood."""

    new: int = 0
    changed: int = 0
    vanished: int = 0
    kept: int = 0

    @property
    def num_read(self) -> int:
        """Sidecars that had to be read."""
        return self.new + self.changed

    def __str__(self) -> str:
        return (
            f"index: +{self.new:,} new, {self.changed:,} changed, {self.vanished:,} vanished images; {self.kept:,} kept"
        )

    def __add__(self, other: "Update") -> "Update":
        return Update(
            self.new + other.new,
            self.changed + other.changed,
            self.vanished + other.vanished,
            self.kept + other.kept,
        )


@dataclass(frozen=True)
class OldRows:
    """The columns of the index that stood, with what it refused.

    `root_starts` int64 [R + 1] closes with the number of rows. `refused` are the sidecars that gave no row, with
    their marks, by path; `odd_ratings` the texts of ratings that are not understood, by row.
    """

    root_starts: Sequence[int]
    paths: NDArray[np.uint8]
    path_offsets: NDArray[np.signedinteger]
    tag_names: Sequence[str]
    tag_ids: NDArray[np.unsignedinteger]
    tag_offsets: NDArray[np.signedinteger]
    image_ids: NDArray[np.uint64]
    ratings: NDArray[np.uint8]
    sidecar_sizes: NDArray[np.uint32]
    sidecar_mtimes: NDArray[np.int64]
    refused: Mapping[str, Rejected]
    odd_ratings: Mapping[int, Rejected]


@dataclass(frozen=True)
class BuiltRows:
    """What `add_scanned_rows` did: the first row of each root, and of each row the old one it is (-1: read)."""

    root_starts: list[int]
    sources: NDArray[np.int64]
    update: Update


def add_scanned_rows(
    scans: Sequence[FolderScan],
    extra_fields: Sequence[ExtraField],
    writer: RowWriter,
    problems: Problems,
    *,
    old: OldRows | None = None,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BuiltRows:
    """Write the rows of all roots in order; what cannot be used becomes a problem. Fills in the marks of the scans.

    progress: told how many of how many pairs are done. Raises DatasetError when storage keeps failing.
    """
    assembly = _Assembly(writer, problems, old)
    plans: list[_RootPlan] = []
    for number, scan in enumerate(scans):
        dropped = _settle_rivals(scan, problems)
        plans.append(_plan_root(scan, number, old, dropped))
    total = sum(len(plan.source) for plan in plans)
    num_to_read = sum(plan.update.num_read for plan in plans)
    tasks = (task for plan in plans for task in _tasks_of(plan))
    starts: list[int] = []
    done = 0
    for task, parsed, parser in parse_in_order(tasks, extra_fields, num_to_read, processes):
        block = task.block
        if block.start == 0:
            starts.append(writer.num_rows)
        assembly.add(block, parsed, parser)
        done += block.stop - block.start
        if progress is not None:
            progress(done, total)
    starts = _starts_of_all(plans, starts, writer.num_rows)
    update = sum((plan.update for plan in plans), Update())
    return BuiltRows(starts, assembly.sources(), update)


@dataclass(frozen=True)
class _RootPlan:
    """source: int64 [N], the old row that each pair is, or _NO_ROW where its sidecar is to be read."""

    scan: FolderScan
    source: NDArray[np.int64]
    refused: Mapping[int, Rejected]
    update: Update


@dataclass(frozen=True)
class _Block:
    """Some pairs of one root; `fresh` are the places in it that are read."""

    plan: _RootPlan
    start: int
    stop: int
    fresh: NDArray[np.int64]


def _tasks_of(plan: _RootPlan) -> Iterator[ParseTask["_Block"]]:
    pairs = plan.scan.pairs
    for start in range(0, len(plan.source), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(plan.source))
        fresh = np.flatnonzero(plan.source[start:stop] == _NO_ROW)
        if len(fresh) == stop - start:
            sidecars = pairs.sidecars(range(start, stop))
        else:
            sidecars = [pairs.sidecar(row) for row in (fresh + start).tolist()]
        yield ParseTask(_Block(plan, start, stop, fresh), str(plan.scan.root), sidecars)


def _starts_of_all(plans: Sequence[_RootPlan], found: list[int], num_rows: int) -> list[int]:
    """The first row of every root, those without pairs included."""
    starts: list[int] = []
    waiting = iter([*found, num_rows])
    following = next(waiting)
    for plan in plans:
        starts.append(following)
        if len(plan.source):
            following = next(waiting)
    return starts


class _Assembly:
    """Puts blocks together from old rows and parsed sidecars, in the order of their rows."""

    def __init__(self, writer: RowWriter, problems: Problems, old: OldRows | None) -> None:
        self._writer = writer
        self._problems = problems
        self._old = old
        self._old_numbers = writer.tags.intern(old.tag_names) if old is not None else np.empty(0, dtype=np.int64)
        self._odd_rows = np.array(sorted(old.odd_ratings), dtype=np.int64) if old is not None else None
        self._numbers: dict[int, NDArray[np.int64]] = {}
        self._sources: list[NDArray[np.int64]] = []

    def sources(self) -> NDArray[np.int64]:
        """int64 [rows]: the old row that each is, or -1."""
        return np.concatenate(self._sources) if self._sources else np.empty(0, dtype=np.int64)

    def add(self, block: _Block, parsed: ParsedSidecars | None, parser: int) -> None:
        """Write the rows of a block."""
        pairs = block.plan.scan.pairs
        source = block.plan.source[block.start : block.stop]
        kept = source >= 0
        lengths = np.zeros(len(source), dtype=np.int32)
        image_ids = np.zeros(len(source), dtype=np.uint64)
        ratings = np.zeros(len(source), dtype=np.uint8)
        sizes, mtimes = pairs.sizes[block.start : block.stop], pairs.mtimes[block.start : block.stop]
        old_tags = new_tags = np.empty(0, dtype=np.int64)
        if self._old is not None and kept.any():
            rows = source[kept]
            values, _ = gather(self._old.tag_offsets, self._old.tag_ids, rows)
            old_tags = self._old_numbers[values]
            lengths[kept] = self._old.tag_offsets[rows + 1] - self._old.tag_offsets[rows]
            image_ids[kept] = self._old.image_ids[rows]
            ratings[kept] = self._old.ratings[rows]
        if parsed is not None:
            new_tags = self._provisional(parsed, parser)
            columns: tuple[tuple[NDArray[Any], NDArray[Any]], ...] = (
                (lengths, parsed.counts),
                (image_ids, parsed.image_ids),
                (ratings, parsed.ratings),
                (sizes, parsed.sizes),
                (mtimes, parsed.mtimes),
            )
            for column, found in columns:
                column[block.fresh] = found
        taken = lengths > 0
        self._note_problems(block, parsed, taken)
        if not len(new_tags) or not len(old_tags):
            tags = old_tags if len(old_tags) else new_tags
        else:
            is_old = np.repeat(kept, lengths)
            tags = np.empty(len(is_old), dtype=np.int64)
            tags[is_old] = old_tags
            tags[~is_old] = new_tags
        paths, path_lengths = pairs.image_paths(block.start, block.stop)
        if not taken.all():
            paths = paths[np.repeat(taken, path_lengths)]
        self._writer.append(
            tags,
            lengths[taken],
            paths,
            path_lengths[taken],
            image_ids=image_ids[taken],
            ratings=ratings[taken],
            sidecar_sizes=sizes[taken],
            sidecar_mtimes=mtimes[taken],
        )
        self._sources.append(source[taken])

    def _provisional(self, parsed: ParsedSidecars, parser: int) -> NDArray[np.int64]:
        """The writer's numbers of a parser's tags; the parser names each tag once."""
        numbers = self._numbers.get(parser, np.empty(0, dtype=np.int64))
        if parsed.new_tags:
            numbers = self._numbers[parser] = np.concatenate([numbers, self._writer.tags.intern(parsed.new_tags)])
        return numbers.take(parsed.tag_ids)

    def _note_problems(self, block: _Block, parsed: ParsedSidecars | None, taken: NDArray[np.bool_]) -> None:
        """Keep what is wrong with a block's sidecars, in the order of its pairs."""
        events: list[tuple[int, str, str]] = []
        if parsed is not None:
            events += [(int(block.fresh[place]), kind, text) for place, kind, text in parsed.notes]
        source = block.plan.source[block.start : block.stop]
        for place in np.flatnonzero(source == _REFUSED_AS_BEFORE).tolist():
            events.append((place, "rejected", block.plan.refused[block.start + place].reason))
        if self._old is not None and self._odd_rows is not None and len(self._odd_rows):
            for place in np.flatnonzero(np.isin(source, self._odd_rows)).tolist():
                reason = self._old.odd_ratings[int(source[place])].reason
                events.append((place, "rating", reason.partition(": ")[2]))
        if not events:
            return
        pairs, root = block.plan.scan.pairs, block.plan.scan.root
        rows = np.cumsum(taken) - 1 + self._writer.num_rows
        for place, kind, text in sorted(events):
            pair = block.start + place
            path = root / pairs.sidecar(pair)
            if kind == "rejected":
                self._problems.reject(path, text, (int(pairs.sizes[pair]), int(pairs.mtimes[pair])))
            elif kind == "unreadable":
                self._problems.reject_unreadable(path, text)
            else:
                self._problems.note_rating(path, text, int(rows[place]))


def _plan_root(scan: FolderScan, number: int, old: OldRows | None, dropped: NDArray[np.bool_]) -> _RootPlan:
    """What of a root is taken over from the old rows."""
    pairs = scan.pairs
    source = np.full(len(pairs), _NO_ROW, dtype=np.int64)
    refused: dict[int, Rejected] = {}
    changed = vanished = 0
    if old is not None:
        first, last = old.root_starts[number], old.root_starts[number + 1]
        paths, lengths = pairs.image_paths(0, len(pairs))
        source = match_paths(paths, offsets_of(lengths), old.paths, old.path_offsets[first : last + 1])
        found = np.flatnonzero((source >= 0) & ~dropped)
        vanished = (last - first) - len(found)
        source[source >= 0] += first
        rows = source[found]
        same = (old.sidecar_sizes[rows] == pairs.sizes[found]) & (old.sidecar_mtimes[rows] == pairs.mtimes[found])
        changed = int(np.count_nonzero(~same))
        source[found[~same]] = _NO_ROW
        prefix = printable(f"{scan.root / ' '}"[:-1])
        waiting = {path for path in old.refused if path.startswith(prefix)}
        if waiting:
            known = np.zeros(len(pairs), dtype=np.bool_)
            known[found] = True
            for pair in np.flatnonzero(~known & ~dropped).tolist():
                path = printable(scan.root / pairs.sidecar(pair))
                if path not in waiting:
                    continue
                waiting.remove(path)
                if old.refused[path].mark == (int(pairs.sizes[pair]), int(pairs.mtimes[pair])):
                    refused[pair] = old.refused[path]
                    source[pair] = _REFUSED_AS_BEFORE
                else:
                    changed += 1
            vanished += len(waiting)
    source[dropped] = _DROPPED
    kept = int(np.count_nonzero((source >= 0) | (source == _REFUSED_AS_BEFORE)))
    new = int(np.count_nonzero(source == _NO_ROW)) - changed
    return _RootPlan(scan, source, refused, Update(new, changed, vanished, kept))


def match_paths(
    paths: NDArray[np.uint8],
    ends: NDArray[np.signedinteger],
    old_paths: NDArray[np.uint8],
    old_ends: NDArray[np.signedinteger],
) -> NDArray[np.int64]:
    """int64 [N]: the place of each path among the old ones, or -1. Both lists ascend by their bytes.

    paths: uint8, flat. ends: [N + 1], where each begins and the last ends; `old_ends` need not begin at 0. Compares
    long runs at once, so that two lists that are nearly the same cost no step a path.
    """
    num_new, num_old = len(ends) - 1, len(old_ends) - 1
    source = np.full(num_new, -1, dtype=np.int64)
    content, old_content = paths.data, old_paths.data
    place = old_place = 0
    run = BLOCK_ROWS
    while place < num_new and old_place < num_old:
        run = min(run, num_new - place, num_old - old_place)
        start, stop = int(ends[place]), int(ends[place + run])
        old_start, old_stop = int(old_ends[old_place]), int(old_ends[old_place + run])
        if (
            stop - start == old_stop - old_start
            and content[start:stop] == old_content[old_start:old_stop]
            and np.array_equal(
                ends[place : place + run + 1] - start, old_ends[old_place : old_place + run + 1] - old_start
            )
        ):
            source[place : place + run] = np.arange(old_place, old_place + run)
            place += run
            old_place += run
            run = min(2 * run, BLOCK_ROWS)
        elif run > 1:
            run //= 2
        elif bytes(content[start:stop]) < bytes(old_content[old_start:old_stop]):
            place += 1
        else:
            old_place += 1
    return source


def _settle_rivals(scan: FolderScan, problems: Problems) -> NDArray[np.bool_]:
    """bool [pairs]: true for images whose stem another one shares and that their sidecar does not mean."""
    pairs: PairTable = scan.pairs
    dropped = np.zeros(len(pairs), dtype=np.bool_)
    if not pairs.rivals:
        return dropped
    groups = [pairs.rivals[stem] for stem in sorted(pairs.rivals)]
    sidecars = [pairs.sidecar(rows[0]) for rows in groups]
    reader = FileReader()
    try:
        position = 0
        for files in reader.read(str(scan.root), sidecars):
            for content, size, mtime_ns in zip(files.contents, files.sizes, files.mtimes, strict=True):
                rows, sidecar = groups[position], scan.root / sidecars[position]
                position += 1
                pairs.sizes[rows], pairs.mtimes[rows] = size, as_int64(mtime_ns)
                names = [name.rpartition("/")[2] for name in pairs.images(rows)]
                chosen = _choose_image(content, names)
                if chosen is None:
                    listed = ", ".join(names)
                    reason = f"ambiguous image: {listed} share this stem; 'filename' in it must name one of them"
                    problems.reject(sidecar, reason)
                    dropped[rows] = True
                    continue
                for row, name in zip(rows, names, strict=True):
                    if name != chosen:
                        dropped[row] = True
                        problems.images_without_sidecar.append(printable(sidecar.with_name(name)))
    finally:
        reader.close()
    return dropped


def _choose_image(content: bytes | Exception, names: Sequence[str]) -> str | None:
    """Which of several images with one stem a sidecar means; None where it does not say."""
    try:
        filename = parse_sidecar(content).filename if isinstance(content, bytes) else None
    except SidecarError:
        return names[0]  # the same fault is met and reported when the row is read
    if not isinstance(content, bytes):
        return names[0]
    base = (filename or "").replace("\\", "/").rpartition("/")[2]
    return base if base in names else None


def problems_by_sidecar(problems: Problems) -> tuple[dict[str, Rejected], dict[int, Rejected]]:
    """(sidecars that were refused for their content, by path; ratings that are not understood, by row)."""
    refused = {item.path: item for item in problems.rejected if item.mark is not None}
    odd: dict[int, Any] = dict(zip(problems.unknown_rating_rows, problems.unknown_ratings, strict=True))
    return refused, odd
