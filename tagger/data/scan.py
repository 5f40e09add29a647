"""What a folder tree holds: images paired with their sidecars, and everything that could not be paired.

Nothing is dropped unseen: what gives no row is kept as a problem with its path and reason. Folders reached through
symbolic links are not entered (links can form loops), nor hidden ones; both are counted.
"""

import errno
import os
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import features

from tagger.data.pairs import NO_MARK, SUFFIX_NUMBERS, SUFFIXES, PairTable
from tagger.errors import InputError

# Failures of storage, not of a file: worth another attempt, and never a reason to leave an image out.
_TRANSIENT_NAMES = ("EIO", "ESTALE", "ETIMEDOUT", "ENOMEM", "EMFILE", "ENFILE")
TRANSIENT_ERRORS = frozenset(getattr(errno, name) for name in _TRANSIENT_NAMES if hasattr(errno, name))


class DatasetError(InputError):
    """Images or tags that their owner can mend; the message is one line that says what was found and where."""


@dataclass(frozen=True)
class Rejected:
    """A file or entry that gives no row. `reason` reads "kind: detail", or is the kind alone.

    `mark` is the sidecar's (size, mtime_ns) when it was refused; None where another attempt may end otherwise.
    """

    path: str
    reason: str
    mark: tuple[int, int] | None = None

    @property
    def kind(self) -> str:
        """What this reason has in common with others of its sort."""
        return self.reason.partition(":")[0]


@dataclass
class Problems:
    """All that a scan and a build could not use. `unreadable` counts what another attempt may be able to read.

    `unknown_rating_rows` are the rows of `unknown_ratings`.
    """

    rejected: list[Rejected] = field(default_factory=list)
    images_without_sidecar: list[str] = field(default_factory=list)
    sidecars_without_image: list[str] = field(default_factory=list)
    unknown_ratings: list[Rejected] = field(default_factory=list)
    unknown_rating_rows: list[int] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    unreadable: int = 0

    def reject(self, path: str | Path, reason: str, mark: tuple[int, int] | None = None) -> None:
        """Keep what is wrong with `path`."""
        self.rejected.append(Rejected(printable(path), printable(reason), mark))

    def reject_unreadable(self, path: str | Path, reason: str) -> None:
        """Keep a failure of the system, not of the content; an index with one is completed at the next start."""
        self.unreadable += 1
        self.reject(path, f"unreadable: {reason}")

    def note_rating(self, path: str | Path, text: str, row: int) -> None:
        """Keep a rating that is not understood; its row stays, without rating."""
        self.unknown_ratings.append(Rejected(printable(path), f"rating: {printable(text)}"))
        self.unknown_rating_rows.append(row)


@dataclass
class FolderScan:
    """What a root holds: its (image, sidecar) pairs, or, where sidecars do not count, the sorted paths of its images.

    `num_images` counts all images, paired or not.
    """

    root: Path
    pairs: PairTable = field(default_factory=PairTable)
    images: list[str] = field(default_factory=list)
    num_images: int = 0
    num_files: int = 0
    other_suffixes: Counter[str] = field(default_factory=Counter)


@cache
def image_suffixes() -> tuple[str, ...]:
    """Lower-case suffixes, without the dot, of the files that count as images."""
    known = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
    return (*known, "avif") if features.check("avif") else known


def printable(path: str | Path) -> str:
    """A path as text that every file and terminal takes; undecodable bytes become backslash escapes."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode("utf-8")


def scan_root(
    root: Path,
    problems: Problems,
    *,
    with_sidecars: bool,
    with_marks: bool = True,
    skip: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> FolderScan:
    """Walk a root once; images come in the order of their paths.

    `with_marks` looks at the size and time of each sidecar, a fifth of what reading it costs. `skip` is a folder to
    leave out. `progress` is told the number of files after each folder. Raises DatasetError when the root is not a
    folder, cannot be read or holds no image.
    """
    if not root.is_dir():
        fault = "is a file; name the folder that holds the images" if root.exists() else "does not exist"
        raise DatasetError(f"data.roots: {printable(root)} {fault}")
    walk = _Walk(FolderScan(root), problems, with_sidecars=with_sidecars, with_marks=with_marks)
    left_out = None if skip is None or not skip.is_relative_to(root) else f"{skip.relative_to(root).as_posix()}/"
    # What is still to do, the next last: folders to enter, and images that stand behind an inner folder.
    waiting: list[str | _Run] = [""]
    while waiting:
        item = waiting.pop()
        if isinstance(item, _Run):
            walk.take(item)
            continue
        if item == left_out:
            continue
        try:
            waiting += reversed(walk.enter(item))
        except OSError as error:
            path = root / item
            if error.errno in TRANSIENT_ERRORS or not item:
                raise DatasetError(f"data.roots: cannot read {printable(path)}: {error.strerror or error}") from error
            problems.reject_unreadable(path, error.strerror or type(error).__name__)
        if progress is not None:
            progress(walk.scan.num_files)
    if not walk.scan.num_images:
        raise DatasetError(f"data.roots: no images found in {printable(root)}: {_describe_files(walk.scan)}")
    return walk.scan


@dataclass
class _Run:
    """Images of one folder, sorted by name, with their sidecars' suffixes and marks."""

    prefix: str
    names: Sequence[str]
    suffixes: Sequence[int] = ()
    sizes: Sequence[int] = ()
    mtimes: Sequence[int] = ()
    rivals: frozenset[str] = frozenset()

    def part(self, start: int, stop: int) -> "_Run":
        cut = slice(start, stop)
        return _Run(self.prefix, self.names[cut], self.suffixes[cut], self.sizes[cut], self.mtimes[cut], self.rivals)


class _Kinds(dict[str, int]):
    """What the suffix of a file says: 0 nothing, 1 an image, 2 + SUFFIX_NUMBERS a sidecar."""

    def __missing__(self, suffix: str) -> int:
        number = 0
        if suffix.lower() in image_suffixes():
            number = 1
        elif suffix.lower() == "json":
            number = 2 + SUFFIX_NUMBERS[suffix]
        if number:
            self[suffix] = number
        return number


class _Walk:
    """One walk through a root."""

    def __init__(self, scan: FolderScan, problems: Problems, *, with_sidecars: bool, with_marks: bool) -> None:
        self.scan = scan
        self._problems = problems
        self._with_sidecars = with_sidecars
        self._with_marks = with_marks
        self._kinds = _Kinds()
        self._root = os.fspath(scan.root)

    def take(self, run: _Run) -> None:
        """Append images to the scan."""
        if self._with_sidecars:
            self.scan.pairs.extend(run.prefix, run.names, run.suffixes, run.sizes, run.mtimes, run.rivals)
        else:
            self.scan.images += [run.prefix + name for name in run.names]

    def enter(self, prefix: str) -> list[str | _Run]:
        """Look through one folder ("" or a path with a slash at the end); gives its images and folders in order."""
        images: list[str] = []
        sidecars: dict[str, tuple[int, int, int]] = {}
        folders: list[str] = []
        second: list[tuple[str, tuple[int, int, int]]] = []
        kinds, with_marks = self._kinds, self._with_marks
        wanted = 18 if self._with_sidecars else 2
        mark = NO_MARK
        num_files = 0
        with _listing(f"{self._root}/{prefix}") as entries:
            for entry in entries:
                name = entry.name
                if name[0] == ".":
                    # A hidden file (.DS_Store, a marker) is nobody's image; a hidden folder may hold some.
                    if entry.is_dir(follow_symlinks=False):
                        self._problems.skipped["hidden folders"] += 1
                    continue
                if not entry.is_file(follow_symlinks=False):
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{name}/")
                        continue
                    if not _ask(entry.is_file):
                        num_files += 1
                        self._problems.skipped["links to folders" if _ask(entry.is_dir) else "not regular files"] += 1
                        continue
                num_files += 1
                stem, _, suffix = name.rpartition(".")
                kind = kinds[suffix] if stem else 0
                if kind == 1:
                    images.append(name)
                elif 2 <= kind < wanted:
                    if with_marks:
                        facts = entry.stat()
                        mark = facts.st_size, facts.st_mtime_ns
                    found = (kind - 2, *mark)
                    if sidecars.setdefault(stem, found) is not found:
                        second.append((stem, found))
                else:
                    self.scan.other_suffixes[f".{suffix.lower()}" if stem else "no suffix"] += 1
        self.scan.num_files += num_files
        self.scan.num_images += len(images)
        images.sort()
        if second:
            self._keep_first(prefix, sidecars, second)
        if self._with_sidecars:
            self.scan.other_suffixes[".json"] += len(sidecars)
            run = self._pair(prefix, images, sidecars)
        else:
            run = _Run(prefix, images)
        return _interleave(run, sorted(folders))

    def _pair(self, prefix: str, images: list[str], sidecars: dict[str, tuple[int, int, int]]) -> _Run:
        """Join the images and the sidecars of one folder by stem."""
        stems = [name[: name.rfind(".")] for name in images]
        found = [sidecars.get(stem) for stem in stems]
        if None in found:
            missing = (name for name, facts in zip(images, found, strict=True) if facts is None)
            self._problems.images_without_sidecar += [self._named(prefix, name) for name in missing]
            images = [name for name, facts in zip(images, found, strict=True) if facts is not None]
            found = [facts for facts in found if facts is not None]
        unique = frozenset(stems)
        rivals: frozenset[str] = frozenset()
        if len(unique) != len(stems):
            rivals = frozenset(stem for stem, count in Counter(stems).items() if count > 1 and stem in sidecars)
        if rivals or len(found) != len(sidecars):
            for stem in sorted(sidecars.keys() - unique):
                name = stem + SUFFIXES[sidecars[stem][0]]
                self._problems.sidecars_without_image.append(self._named(prefix, name))
        suffixes, sizes, mtimes = zip(*found, strict=True) if found else ((), (), ())
        return _Run(prefix, images, suffixes, sizes, mtimes, rivals)

    def _keep_first(
        self, prefix: str, sidecars: dict[str, tuple[int, int, int]], second: list[tuple[str, tuple[int, int, int]]]
    ) -> None:
        """Keep one sidecar a stem, where names differ in the case of the suffix alone: x.json before x.JSON."""
        for stem, found in sorted(second):
            used, refused = sidecars[stem], found
            if SUFFIXES[found[0]] > SUFFIXES[used[0]]:
                used, refused = found, used
            sidecars[stem] = used
            reason = f"second sidecar of one image: {stem}{SUFFIXES[used[0]]} is used"
            self._problems.reject(self._named(prefix, stem + SUFFIXES[refused[0]]), reason)

    def _named(self, prefix: str, name: str) -> str:
        return printable(self.scan.root / (prefix + name))


def _ask(kind: Callable[[], bool]) -> bool:
    """Whether an entry is of a kind, links followed; a link to itself leads to nothing."""
    try:
        return kind()
    except OSError as error:
        if error.errno in TRANSIENT_ERRORS:
            raise
        return False


@contextmanager
def _listing(path: str) -> Iterator[Iterable["os.DirEntry[str]"]]:
    """The entries of a folder; through a handle where the system can, which spares each look at a file the path."""
    if os.scandir not in os.supports_fd:
        with os.scandir(path) as entries:
            yield entries
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with os.scandir(handle) as entries:
            yield entries
    finally:
        os.close(handle)


def _interleave(run: _Run, folders: list[str]) -> list[str | _Run]:
    """The images and (sorted, slash at the end) folders of a folder in the order of full paths."""
    items: list[str | _Run] = []
    start = 0
    for folder in folders:
        stop = bisect(run.names, folder)
        if stop > start:
            items.append(run.part(start, stop))
            start = stop
        items.append(run.prefix + folder)
    if start < len(run.names):
        items.append(run.part(start, len(run.names)) if start else run)
    return items


def _describe_files(scan: FolderScan) -> str:
    if not scan.num_files:
        return "it holds no files"
    counts = sorted((-count, suffix) for suffix, count in scan.other_suffixes.items() if count)
    listed = ", ".join(f"{suffix} {-count:,}" for count, suffix in counts[:5])
    return f"it holds {scan.num_files:,} files{f' ({listed})' if listed else ''}"


def describe_problems(problems: Problems) -> list[str]:
    """One line for each sort of problem: how many, and up to three of them."""
    lines: list[str] = []
    kinds: dict[str, list[Rejected]] = {}
    for item in problems.rejected:
        kinds.setdefault(item.kind, []).append(item)
    for kind, items in sorted(kinds.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        lines.append(_count_line(f"rejected, {kind}", [_with_detail(item) for item in items]))
    for title, paths in (
        ("images without sidecar", problems.images_without_sidecar),
        ("sidecars without image", problems.sidecars_without_image),
        ("ratings not understood (rows kept without)", [_with_detail(item) for item in problems.unknown_ratings]),
    ):
        if paths:
            lines.append(_count_line(title, paths))
    if problems.skipped:
        lines.append("skipped: " + ", ".join(f"{count:,} {what}" for what, count in sorted(problems.skipped.items())))
    return lines


def describe_no_rows(scans: Sequence[FolderScan], problems: Problems, annotations: Path | None) -> str:
    """One line for a data set that has images and not a single row."""
    where = ", ".join(printable(scan.root) for scan in scans)
    num_images = sum(scan.num_images for scan in scans)
    found = f"data.roots: none of the {num_images:,} images in {where} has usable tags"
    if not problems.rejected:
        if annotations is not None:
            return f"{found}: {printable(annotations)} has no entry"
        return f"{found}: there is no sidecar; put a .json of the same stem beside each image"
    kinds = Counter(item.kind for item in problems.rejected)
    counts = ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common(5))
    first = problems.rejected[0]
    return f"{found}: rejected {len(problems.rejected):,} ({counts}), the first {first.path}: {first.reason}"


def _with_detail(item: Rejected) -> str:
    detail = item.reason.partition(":")[2].strip()
    return f"{item.path} ({detail})" if detail else item.path


def _count_line(title: str, examples: Sequence[str]) -> str:
    more = ", ..." if len(examples) > 3 else ""
    return f"{title}: {len(examples):,} ({', '.join(examples[:3])}{more})"
