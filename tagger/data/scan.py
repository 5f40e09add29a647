"""What a folder tree holds: images paired with their sidecars, and everything that could not be paired.

Nothing is dropped unseen: what gives no row is kept as a problem with its path and reason. Folders reached through
symbolic links are not entered (links can form loops), nor hidden ones; both are counted.
"""

import errno
import os
from array import array
from bisect import bisect, bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from PIL import features

from tagger.data.pairs import NO_MARK, SUFFIX_NUMBERS, SUFFIXES, PairTable, as_column
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
    suffixes: bytes = b""
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    mtimes: "array[int]" = field(default_factory=lambda: array("q"))
    rivals: frozenset[str] = frozenset()
    image_suffixes: frozenset[str] = frozenset()

    def with_sidecars(self, suffixes: bytes, marks: Sequence[tuple[int, int]] | None) -> "_Run":
        """The same images with what is known of their sidecars; marks: None where nobody has looked."""
        if marks is None:
            sizes, mtimes = array("q", NO_MARK[:1]) * len(suffixes), array("q", NO_MARK[1:]) * len(suffixes)
        else:
            sizes, mtimes = as_column(size for size, _ in marks), as_column(time for _, time in marks)
        return replace(self, suffixes=suffixes, sizes=sizes, mtimes=mtimes)

    def part(self, start: int, stop: int) -> "_Run":
        cut = slice(start, stop)
        columns = self.suffixes[cut], self.sizes[cut], self.mtimes[cut]
        return _Run(self.prefix, self.names[cut], *columns, self.rivals, self.image_suffixes)


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
        self._with_marks = with_marks and with_sidecars
        self._kinds = _Kinds()
        self._root = os.fspath(scan.root)

    def take(self, run: _Run) -> None:
        """Append images to the scan."""
        if self._with_sidecars:
            columns = run.suffixes, run.sizes, run.mtimes
            self.scan.pairs.extend(run.prefix, run.names, *columns, run.rivals, run.image_suffixes)
        else:
            self.scan.images += [run.prefix + name for name in run.names]

    def enter(self, prefix: str) -> list[str | _Run]:
        """Look through one folder ("" or a path with a slash at the end); gives its images and folders in order."""
        files, folders, marks = self._list(f"{self._root}/{prefix}")
        files.sort()
        # The hidden ones go: "/" is what follows "." and stands in no name.
        del files[bisect_left(files, ".") : bisect_left(files, "/")]
        self.scan.num_files += len(files)
        # Sidecars of the usual form first, at one comparison a name; the rest is mostly images of one suffix.
        sidecars = [name for name in files if name[-5:] == ".json"]
        images = [name for name in files if name[-5:] != ".json"]
        odd: list[str] = []
        suffixes = {name[name.rfind(".") :] for name in images}
        if not all(suffix[0] == "." and self._kinds[suffix[1:]] == 1 for suffix in suffixes):
            images, odd = self._sort_out(images)
            suffixes = {name[name.rfind(".") :] for name in images}
        self.scan.num_images += len(images)
        if self._with_sidecars:
            run = self._pair(_Run(prefix, images, image_suffixes=frozenset(suffixes)), sidecars, odd, marks)
        else:
            self.scan.other_suffixes[".json"] += len(sidecars)
            run = _Run(prefix, images)
        return _interleave(run, folders)

    def _list(self, path: str) -> tuple[list[str], list[str], dict[str, tuple[int, int]]]:
        """A folder's files, its folders with a slash at the end, and the marks of its sidecars where they are wanted.

        A link to a file is a file. What is neither is counted.
        """
        others: list[os.DirEntry[str]] = []
        folders: list[str] = []
        marks: dict[str, tuple[int, int]] = {}

        def set_aside(entry: "os.DirEntry[str]") -> bool:
            others.append(entry)
            return False

        def mark(entry: "os.DirEntry[str]") -> bool:
            if entry.name[-5:].lower() == ".json" and entry.name[0] != ".":
                facts = entry.stat()
                marks[entry.name] = facts.st_size, facts.st_mtime_ns
            return True

        with _listing(path) as entries:
            if self._with_marks:
                files = [e.name for e in entries if (mark if e.is_file(follow_symlinks=False) else set_aside)(e)]
            else:
                files = [e.name for e in entries if e.is_file(follow_symlinks=False) or set_aside(e)]
            for entry in others:
                is_folder = entry.is_dir(follow_symlinks=False)
                if entry.name[0] == ".":
                    # A hidden file (.DS_Store, a marker) is nobody's image; a hidden folder may hold some.
                    self._problems.skipped.update(["hidden folders"] if is_folder else [])
                elif is_folder:
                    folders.append(f"{entry.name}/")
                elif _ask(entry.is_file):
                    files.append(entry.name)
                    if self._with_marks:
                        mark(entry)
                else:
                    self.scan.num_files += 1
                    self._problems.skipped["links to folders" if _ask(entry.is_dir) else "not regular files"] += 1
        return files, sorted(folders), marks

    def _sort_out(self, names: list[str]) -> tuple[list[str], list[str]]:
        """(images, sidecars with another suffix than .json) among names; the rest is counted."""
        images: list[str] = []
        odd: list[str] = []
        for name in names:
            stem, _, suffix = name.rpartition(".")
            kind = self._kinds[suffix] if stem else 0
            if kind == 1:
                images.append(name)
            elif kind and self._with_sidecars:
                odd.append(name)
            else:
                self.scan.other_suffixes[f".{suffix.lower()}" if stem else "no suffix"] += 1
        return images, odd

    def _pair(self, run: _Run, sidecars: list[str], odd: list[str], marks: Mapping[str, tuple[int, int]]) -> _Run:
        """Join the images and the sidecars of one folder; where each image has its own, names are compared at once."""
        text = "\0".join([*run.names, ""])
        for suffix in run.image_suffixes:
            text = text.replace(f"{suffix}\0", ".json\0")
        names = text.split("\0")[:-1]
        if odd or len(names) != len(sidecars) or frozenset(names) != frozenset(sidecars):
            return self._pair_by_stem(run, [*sidecars, *odd], marks)
        self.scan.other_suffixes[".json"] += len(sidecars)
        return run.with_sidecars(bytes(len(names)), [marks[name] for name in names] if marks else None)

    def _pair_by_stem(self, run: _Run, names: list[str], marks: Mapping[str, tuple[int, int]]) -> _Run:
        """The same for a folder where something is missing or there twice."""
        sidecars: dict[str, tuple[int, tuple[int, int]]] = {}
        second: list[tuple[str, tuple[int, tuple[int, int]]]] = []
        for name in names:
            stem, _, suffix = name.rpartition(".")
            one = SUFFIX_NUMBERS[suffix], marks.get(name, NO_MARK)
            if sidecars.setdefault(stem, one) is not one:
                second.append((stem, one))
        if second:
            self._keep_first(run.prefix, sidecars, second)
        self.scan.other_suffixes[".json"] += len(sidecars)
        images = run.names
        stems = [name[: name.rfind(".")] for name in images]
        found = [sidecars.get(stem) for stem in stems]
        missing = [name for name, facts in zip(images, found, strict=True) if facts is None]
        self._problems.images_without_sidecar += [self._named(run.prefix, name) for name in missing]
        paired = [(name, facts) for name, facts in zip(images, found, strict=True) if facts is not None]
        unique = frozenset(stems)
        rivals: frozenset[str] = frozenset()
        if len(unique) != len(stems):
            rivals = frozenset(stem for stem, count in Counter(stems).items() if count > 1 and stem in sidecars)
        for stem in sorted(sidecars.keys() - unique):
            name = stem + SUFFIXES[sidecars[stem][0]]
            self._problems.sidecars_without_image.append(self._named(run.prefix, name))
        run = _Run(run.prefix, [name for name, _ in paired], rivals=rivals, image_suffixes=run.image_suffixes)
        return run.with_sidecars(bytes(facts[0] for _, facts in paired), [facts[1] for _, facts in paired])

    def _keep_first(
        self,
        prefix: str,
        sidecars: dict[str, tuple[int, tuple[int, int]]],
        second: list[tuple[str, tuple[int, tuple[int, int]]]],
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


def describe_problems(problems: Problems, label_source: str = "sidecar") -> list[str]:
    """One line for each sort of problem: how many, and up to three of them. label_source: what some images lack."""
    lines: list[str] = []
    kinds: dict[str, list[Rejected]] = {}
    for item in problems.rejected:
        kinds.setdefault(item.kind, []).append(item)
    for kind, items in sorted(kinds.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        lines.append(_count_line(f"rejected, {kind}", [_with_detail(item) for item in items]))
    for title, paths in (
        (f"images without {label_source}", problems.images_without_sidecar),
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
