"""What a folder tree holds: images paired with their sidecars, and everything that could not be paired.

Nothing is dropped unseen: what gives no row is kept as a problem with its path and reason. Folders reached through
symbolic links are not entered (links can form loops), hidden entries are skipped; both are counted.
"""

import errno
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from pathlib import Path

from PIL import features

from tagger.data.sidecar import MAX_SIDECAR_BYTES, ParsedSidecar, SidecarError, parse_sidecar
from tagger.errors import InputError

# Failures of storage, not of a file: worth another attempt, and never a reason to leave an image out.
_TRANSIENT_NAMES = ("EIO", "ESTALE", "ETIMEDOUT", "ENOMEM", "EMFILE", "ENFILE")
TRANSIENT_ERRORS = frozenset(getattr(errno, name) for name in _TRANSIENT_NAMES if hasattr(errno, name))


class DatasetError(InputError):
    """Images or tags that their owner can mend; the message is one line that says what was found and where."""


@dataclass(frozen=True)
class Rejected:
    """A file or entry that gives no row. `reason` reads "kind: detail", or is the kind alone."""

    path: str
    reason: str

    @property
    def kind(self) -> str:
        """What this reason has in common with others of its sort."""
        return self.reason.partition(":")[0]


@dataclass
class Problems:
    """All that a scan and a build could not use. `unreadable` counts what another attempt may be able to read."""

    rejected: list[Rejected] = field(default_factory=list)
    images_without_sidecar: list[str] = field(default_factory=list)
    sidecars_without_image: list[str] = field(default_factory=list)
    unknown_ratings: list[Rejected] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    unreadable: int = 0

    def reject(self, path: str | Path, reason: str) -> None:
        """Keep what is wrong with `path`."""
        self.rejected.append(Rejected(printable(path), printable(reason)))

    def reject_unreadable(self, path: str | Path, error: OSError) -> None:
        """Keep a failure of the system, not of the content; an index with one is built anew at the next start."""
        self.unreadable += 1
        self.reject(path, f"unreadable: {error.strerror or type(error).__name__}")

    def note_rating(self, path: str | Path, parsed: ParsedSidecar) -> None:
        """Keep a rating that is not understood; its row stays, without rating."""
        if parsed.bad_rating is not None:
            self.unknown_ratings.append(Rejected(printable(path), f"rating: {parsed.bad_rating}"))


@dataclass
class FolderScan:
    """Sorted relative POSIX paths of the images of a root, and its (image, sidecar) pairs."""

    root: Path
    images: list[str] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)
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
    root: Path, fingerprint: blake2b, problems: Problems, *, with_sidecars: bool, skip: Path | None = None
) -> FolderScan:
    """Walk a root once and feed every image name, and each sidecar's name, size and time, to `fingerprint`.

    `skip` is a folder to leave out. Raises DatasetError when the root is not a folder, cannot be read or holds no
    image.
    """
    if not root.is_dir():
        fault = "is a file; name the folder that holds the images" if root.exists() else "does not exist"
        raise DatasetError(f"data.roots: {printable(root)} {fault}")
    scan = FolderScan(root)
    folders = [""]
    while folders:
        prefix = folders.pop()
        path = root / prefix
        if path == skip:
            continue
        try:
            inner = _scan_folder(path, prefix, scan, fingerprint, problems, with_sidecars=with_sidecars)
        except OSError as error:
            if error.errno in TRANSIENT_ERRORS or not prefix:
                raise DatasetError(f"data.roots: cannot read {printable(path)}: {error.strerror or error}") from error
            problems.reject_unreadable(path, error)
            continue
        folders += [f"{prefix}{name}/" for name in sorted(inner, reverse=True)]
    if not scan.images:
        raise DatasetError(f"data.roots: no images found in {printable(root)}: {_describe_files(scan)}")
    scan.images.sort()
    scan.pairs.sort()
    return scan


def _scan_folder(
    path: Path, prefix: str, scan: FolderScan, fingerprint: blake2b, problems: Problems, *, with_sidecars: bool
) -> list[str]:
    """Take in the files of one folder; gives the names of the folders in it."""
    suffixes = frozenset(image_suffixes())
    folders: list[str] = []
    images: list[str] = []
    sidecars: list[str] = []
    marks: list[str] = []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                problems.skipped["hidden entries"] += 1
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(name)
                continue
            scan.num_files += 1
            _, dot, suffix = name.rpartition(".")
            suffix = suffix.lower() if dot else ""
            if not _ask(entry.is_file):
                problems.skipped["links to folders" if _ask(entry.is_dir) else "not regular files"] += 1
            elif suffix in suffixes:
                images.append(name)
            elif suffix == "json" and with_sidecars:
                facts = entry.stat()
                sidecars.append(name)
                marks.append(f"{name}/{facts.st_size}/{facts.st_mtime_ns}")
            else:
                scan.other_suffixes[f".{suffix}" if suffix else "no suffix"] += 1
    images.sort()
    marks.sort()
    text = "\0".join((prefix, *images, "", *marks, ""))
    fingerprint.update(text.encode("utf-8", "surrogatepass"))
    scan.images += [prefix + name for name in images] if prefix else images
    if with_sidecars:
        scan.other_suffixes[".json"] += len(sidecars)
        _pair(path, prefix, images, sidecars, scan, problems)
    return folders


def _ask(kind: Callable[[], bool]) -> bool:
    """Whether an entry is of a kind, links followed; a link to itself leads to nothing."""
    try:
        return kind()
    except OSError as error:
        if error.errno in TRANSIENT_ERRORS:
            raise
        return False


def _pair(
    path: Path, prefix: str, images: list[str], sidecars: list[str], scan: FolderScan, problems: Problems
) -> None:
    """Join the (sorted) images and the sidecars of one folder by stem."""
    sidecar_of = {name[:-5]: name for name in sidecars}
    if len(sidecar_of) != len(sidecars):
        sidecar_of = _first_of_stem(path, sidecars, problems)
    image_of: dict[str, str] = {}
    rivals: dict[str, list[str]] = {}
    for name in images:
        stem = name[: name.rfind(".")]
        if image_of.setdefault(stem, name) is not name:
            rivals.setdefault(stem, [image_of[stem]]).append(name)
    for stem, names in rivals.items():
        if stem not in sidecar_of:
            problems.images_without_sidecar += [printable(path / name) for name in names[1:]]
            continue
        sidecar = path / sidecar_of[stem]
        chosen = _choose_image(sidecar, names)
        if chosen is None:
            reason = f"ambiguous image: {', '.join(names)} share this stem; 'filename' in it must name one of them"
            problems.reject(sidecar, reason)
            del image_of[stem], sidecar_of[stem]
        else:
            problems.images_without_sidecar += [printable(path / name) for name in names if name != chosen]
            image_of[stem] = chosen
    for stem, image in image_of.items():
        found = sidecar_of.pop(stem, None)
        if found is None:
            problems.images_without_sidecar.append(printable(path / image))
        else:
            scan.pairs.append((prefix + image, prefix + found))
    problems.sidecars_without_image += [printable(path / name) for name in sorted(sidecar_of.values())]


def _first_of_stem(path: Path, sidecars: list[str], problems: Problems) -> dict[str, str]:
    """One sidecar a stem, where names differ in the case of the suffix alone: x.json before x.JSON."""
    first: dict[str, str] = {}
    for name in sorted(sidecars, reverse=True):
        used = first.setdefault(name[:-5], name)
        if used != name:
            problems.reject(path / name, f"second sidecar of one image: {used} is used")
    return first


def _choose_image(sidecar: Path, names: list[str]) -> str | None:
    """Which of several images with one stem the sidecar means; None where it does not say."""
    try:
        with sidecar.open("rb") as stream:
            filename = parse_sidecar(stream.read(MAX_SIDECAR_BYTES + 1)).filename
    except (OSError, SidecarError):
        return names[0]  # the build meets the same fault at the same sidecar, and reports it
    base = (filename or "").replace("\\", "/").rpartition("/")[2]
    return base if base in names else None


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
    num_images = sum(len(scan.images) for scan in scans)
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
