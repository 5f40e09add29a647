"""The metadata index: every row of a data set, memory-mapped, with tags by the index's own numbers.

Built from sidecars (or an annotation file) and reused while names, sizes and times of the files are the same; when
some of them change, those are read and the rest is taken over. Knows nothing of a vocabulary, so that changing one
costs no new reading. Rows are never pickled: an index travels to another process as its path, and the two share the
pages.
"""

import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagger.data.annotations import add_annotation_rows
from tagger.data.columns import open_column
from tagger.data.generations import Generation, clean_up, newest_first
from tagger.data.header_columns import ImageHeaders, carry_headers, check_sizes, newest_headers, read_headers
from tagger.data.index_build import RowWriter
from tagger.data.index_update import OldRows, Update, add_scanned_rows, problems_by_sidecar
from tagger.data.scan import (
    DatasetError,
    FolderScan,
    Problems,
    Rejected,
    describe_no_rows,
    describe_problems,
    image_suffixes,
    printable,
    scan_root,
)
from tagger.data.sidecar import RATINGS, ExtraField, parse_extra_fields
from tagger.files import FormatError, read_json
from tagger.record import Record

__all__ = ["DatasetError", "MetadataIndex", "Rejected", "Update", "open_index"]

FORMAT_VERSION = 2
_META = "meta.json"
_TAGS = "tags.json"
_PROBLEMS = "problems.json"

_log = logging.getLogger(__name__)

# Told what is going on, and how many of how many files are done (None: nobody knows yet).
Progress = Callable[[str, int, int | None], None]


def open_index(
    roots: Sequence[str | Path],
    index_dir: Path,
    *,
    extra_fields: Sequence[str] = (),
    annotations: Path | None = None,
    headers: bool = False,
    processes: int | None = None,
    progress: Progress | None = None,
) -> "MetadataIndex":
    """Open the index of `roots` below `index_dir`, built or brought up to date where the files have changed.

    With `annotations`, tags come from that file instead of sidecars and `roots` is its one image folder. With
    `headers`, the width and height of each image are read too, where the file is new or has changed. `processes` parse
    sidecars (None: several where there are many to read). Raises DatasetError when a root is missing or holds no
    image, or when no row is left.
    """
    index = _open_rows(roots, index_dir, extra_fields, annotations, processes, progress)
    if headers:
        index.read_headers(progress)
    return index


def _open_rows(
    roots: Sequence[str | Path],
    index_dir: Path,
    extra_fields: Sequence[str],
    annotations: Path | None,
    processes: int | None,
    progress: Progress | None,
) -> "MetadataIndex":
    folders = _resolve_roots(roots, annotations)
    try:
        fields = parse_extra_fields(extra_fields)
    except ValueError as error:
        raise DatasetError(f"data.extra_fields: {error}") from error
    source = annotations.expanduser().resolve() if annotations is not None else None
    parent = index_dir.expanduser().resolve()
    home = parent / _key(folders, fields, source)
    generations = _readable_generations(home)
    old = generations[0] if generations and source is None else None
    problems = Problems()
    scans: list[FolderScan] = []
    for folder in folders:
        num_before = sum(scan.num_files for scan in scans)
        scans.append(
            scan_root(
                folder,
                problems,
                with_sidecars=source is None,
                with_marks=old is not None,
                skip=parent,
                progress=None if progress is None else _Ahead(progress, "looking for files", num_before),
            )
        )
    scanned = _digest_of_scan(scans, problems, source)
    fingerprint = _fingerprint(scanned, scans)
    for index in generations:
        if index.complete and index.fingerprint == fingerprint:
            os.utime(index.path)  # in use: the clean-up keeps the most recent ones
            index.update = Update(kept=index.num_rows + index.num_refused)
            _log.info("%s", index.update)
            return index
    started = time.perf_counter()
    with Generation(home) as generation, RowWriter(generation.folder, with_marks=source is None) as rows:
        if source is None:
            built = add_scanned_rows(
                scans,
                fields,
                rows,
                problems,
                old=None if old is None else old._old_rows(),
                processes=processes,
                progress=None if progress is None else _Of(progress, "reading sidecars"),
            )
            root_starts, update = built.root_starts, built.update
            fingerprint = _fingerprint(scanned, scans)  # the marks of what was read
            carried = None if old is None else newest_headers(old.path)
            if carried is not None:
                carry_headers(carried, built.sources, generation.folder)
        else:
            add_annotation_rows(source, scans[0], fields, rows, problems)
            root_starts, update = [0], Update(new=rows.num_rows)
        if not rows.num_rows:
            raise DatasetError(describe_no_rows(scans, problems, source))
        facts = {
            "roots": [str(folder) for folder in folders],
            "root_starts": root_starts,
            "extra_fields": list(extra_fields),
            "annotations": None if source is None else printable(source),
        }
        path = finish_index(generation, rows, problems, fingerprint, facts)
    clean_up(home, path)
    index = MetadataIndex.load(path)
    index.update = update
    _log.info("%s", update)
    _log.info("indexed %d rows in %.1f s: %s", index.num_rows, time.perf_counter() - started, index.path)
    return index


def finish_index(
    generation: Generation, rows: RowWriter, problems: Problems, fingerprint: str, facts: Mapping[str, Any]
) -> Path:
    """Complete an index whose rows are written, and give it its final place.

    facts: roots, root_starts (the first row of each), extra_fields, and annotations (None: the rows have marks).
    """
    sizes = rows.close()
    for name, content in ((_TAGS, {"tags": rows.tags.names}), (_PROBLEMS, _problems_content(problems))):
        sizes[name] = generation.write_json(name, {"format_version": FORMAT_VERSION, **content})
    meta = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        **facts,
        "num_rows": rows.num_rows,
        "num_refused": sum(item.mark is not None for item in problems.rejected),
        "rating_counts": rows.rating_counts,
        "complete": problems.unreadable == 0,
        "sizes": sizes,
    }
    generation.write_json(_META, meta)
    return generation.commit(fingerprint)


class MetadataIndex:
    """Rows in the order of (root, relative path of the image); all arrays are read-only and memory-mapped.

    `tag_names` are the index's own tags by number, in the order of their first occurrence; when files change, a tag
    may get another number, so numbers are good for this index alone. The tags of row `r` are
    `tag_ids[tag_offsets[r]:tag_offsets[r+1]]` (uint16 or uint32; `tag_offsets` int32 or int64 [N+1]). `image_ids`
    uint64 [N] is `stable_id` of the stem. `ratings` uint8 [N] is 0 for none, else 1 + the position in RATINGS.
    `sidecar_sizes` uint32 [N] in bytes and `sidecar_mtimes` int64 [N] in ns are those of the sidecar when it was read;
    None where the rows come from an annotation file. Safe to read from any thread.
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        """Use `MetadataIndex.load`."""
        self.path = path
        self.fingerprint: str = meta["fingerprint"]
        self.roots = tuple(Path(root) for root in meta["roots"])
        self.num_rows: int = meta["num_rows"]
        # Sidecars that were refused for what they hold.
        self.num_refused: int = meta["num_refused"]
        # False when a file could not be read, which another attempt may mend.
        self.complete: bool = meta["complete"]
        # What opening it has found changed; None for an index that was loaded by its path.
        self.update: Update | None = None
        # Sizes of the images, where they were asked for.
        self.headers: ImageHeaders | None = None
        self.tag_names: tuple[str, ...] = tuple(read_json(path / _TAGS, "index tags", FORMAT_VERSION)["tags"])
        self.tag_ids = open_column(path / "tag_ids.npy")
        self.tag_offsets: NDArray[np.signedinteger] = open_column(path / "tag_offsets.npy")
        self.image_ids: NDArray[np.uint64] = open_column(path / "image_ids.npy")
        self.ratings: NDArray[np.uint8] = open_column(path / "ratings.npy")
        self.sidecar_sizes: NDArray[np.uint32] | None = None
        self.sidecar_mtimes: NDArray[np.int64] | None = None
        if meta["annotations"] is None:
            self.sidecar_sizes = open_column(path / "sidecar_sizes.npy")
            self.sidecar_mtimes = open_column(path / "sidecar_mtimes.npy")
        self._paths: NDArray[np.uint8] = open_column(path / "paths.npy")
        self._path_offsets: NDArray[np.signedinteger] = open_column(path / "path_offsets.npy")
        self._tag_counts: NDArray[np.int64] = open_column(path / "tag_counts.npy")
        self._root_starts = np.array(meta["root_starts"], dtype=np.int64)
        self._rating_counts: list[int] = meta["rating_counts"]

    @classmethod
    def load(cls, path: Path, headers: Path | None = None) -> "MetadataIndex":
        """Open the index in a folder, from any process, and its image headers in another, if that is named.

        Takes the same time for any number of rows. Raises FormatError when one is damaged or newer.
        """
        meta = read_json(path / _META, "index", FORMAT_VERSION)
        check_sizes(path, meta["sizes"], "index")
        index = cls(path, meta)
        index.headers = None if headers is None else ImageHeaders.load(headers)
        return index

    def read_headers(self, progress: Progress | None = None) -> ImageHeaders:
        """Width and height of every image, read now where a file is new or has changed; kept as `headers`."""
        if self.headers is None:
            told = None if progress is None else _Of(progress, "reading image headers")
            self.headers = read_headers(self.path, self.num_rows, self.image_paths, told)
        return self.headers

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).load, (self.path, None if self.headers is None else self.headers.path)

    def __len__(self) -> int:
        return self.num_rows

    def relative_path(self, row: int) -> str:
        """POSIX path of the image below its root."""
        row = self._check_row(row)
        content = self._paths[self._path_offsets[row] : self._path_offsets[row + 1]]
        return content.tobytes().decode("utf-8", "surrogatepass")

    def image_path(self, row: int) -> Path:
        """Absolute path of the image."""
        row = self._check_row(row)
        root = int(np.searchsorted(self._root_starts, row, side="right")) - 1
        return self.roots[root] / self.relative_path(row)

    def image_paths(self, rows: range) -> list[Path]:
        """Absolute paths of the images of consecutive rows."""
        return [self.image_path(row) for row in rows]

    def stem(self, row: int) -> str:
        """File name of the image without suffix, which its sidecar shares."""
        return self.relative_path(row).rpartition("/")[2].rpartition(".")[0]

    def row_tag_ids(self, row: int) -> NDArray[np.uint16] | NDArray[np.uint32]:
        """Tag numbers of a row (a view)."""
        row = self._check_row(row)
        return self.tag_ids[self.tag_offsets[row] : self.tag_offsets[row + 1]]

    def rating(self, row: int) -> str | None:
        """The row's rating, one of RATINGS."""
        code = int(self.ratings[self._check_row(row)])
        return RATINGS[code - 1] if code else None

    def record(self, row: int) -> Record:
        """A row in full, for people and exports; the loader reads the arrays."""
        tags = tuple(self.tag_names[number] for number in self.row_tag_ids(row))
        return Record(str(self.image_path(row)), self.stem(row), tags, self.rating(row))

    def tag_counts(self) -> NDArray[np.int64]:
        """Rows that carry each tag, int64 [len(tag_names)], counted when the index was built."""
        return self._tag_counts

    def rating_counts(self) -> dict[str, int]:
        """Rows of each rating that occurs, in the order of RATINGS."""
        return {rating: count for rating, count in zip(RATINGS, self._rating_counts[1:], strict=True) if count}

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        """Sidecars and entries that give no row, and why."""
        return tuple(self._problems.rejected)

    @property
    def images_without_sidecar(self) -> tuple[str, ...]:
        """Images that no sidecar or entry describes."""
        return tuple(self._problems.images_without_sidecar)

    @property
    def sidecars_without_image(self) -> tuple[str, ...]:
        """Sidecars with no image of their stem beside them."""
        return tuple(self._problems.sidecars_without_image)

    @property
    def unknown_ratings(self) -> tuple[Rejected, ...]:
        """Rows whose rating is not understood; they are kept, without rating."""
        return tuple(self._problems.unknown_ratings)

    def report(self) -> tuple[str, ...]:
        """What was indexed and what was not, in lines for people."""
        folders = "1 folder" if len(self.roots) == 1 else f"{len(self.roots)} folders"
        lines = [f"{self.num_rows:,} images with {len(self.tag_names):,} distinct tags in {folders}"]
        lines += describe_problems(self._problems)
        return tuple(lines)

    @cached_property
    def _problems(self) -> Problems:
        return _read_problems(self.path / _PROBLEMS)

    def _old_rows(self) -> OldRows:
        """These rows as what a new index can take over."""
        assert self.sidecar_sizes is not None and self.sidecar_mtimes is not None
        refused, odd_ratings = problems_by_sidecar(self._problems)
        return OldRows(
            [*self._root_starts.tolist(), self.num_rows],
            self._paths,
            self._path_offsets,
            self.tag_names,
            self.tag_ids,
            self.tag_offsets,
            self.image_ids,
            self.ratings,
            self.sidecar_sizes,
            self.sidecar_mtimes,
            refused,
            odd_ratings,
        )

    def _check_row(self, row: int) -> int:
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} is not in 0..{self.num_rows - 1}")
        return row


def _resolve_roots(roots: Sequence[str | Path], annotations: Path | None) -> tuple[Path, ...]:
    if not roots:
        raise DatasetError("data.roots is empty; name the folder of your images, for example data.roots=[data/demo]")
    folders = tuple(Path(root).expanduser().resolve() for root in roots)
    if annotations is not None and len(folders) != 1:
        raise DatasetError(f"data.annotations needs one image folder; data.roots names {len(folders)}")
    for position, folder in enumerate(folders):
        if printable(folder) != str(folder):
            raise DatasetError(f"data.roots: the path {printable(folder)} is not UTF-8 text; rename the folder")
        for other in folders[:position]:
            if folder.is_relative_to(other) or other.is_relative_to(folder):
                raise DatasetError(f"data.roots: {folder} and {other} overlap; name each image once")
    return folders


def _annotation_mark(path: Path) -> bytes:
    try:
        facts = path.stat()
    except OSError as error:
        raise DatasetError(f"data.annotations: cannot read {printable(path)}: {error.strerror or error}") from error
    return f"{facts.st_size}/{facts.st_mtime_ns}".encode()


def _key(roots: tuple[Path, ...], fields: tuple[ExtraField, ...], annotations: Path | None) -> str:
    """Name of the folder that holds the generations of one data set read in one way."""
    parts = [str(FORMAT_VERSION), *image_suffixes(), "roots", *map(str, roots), "fields"]
    parts += [f"{field.name}={field.prefix}" for field in fields]
    parts += [] if annotations is None else ["annotations", printable(annotations)]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


class _Ahead:
    """Tells of files that are found, on top of those of other roots."""

    def __init__(self, progress: Progress, what: str, before: int) -> None:
        self._progress, self._what, self._before = progress, what, before

    def __call__(self, num_files: int) -> None:
        self._progress(self._what, self._before + num_files, None)


class _Of:
    """Tells how many of how many are done."""

    def __init__(self, progress: Progress, what: str) -> None:
        self._progress, self._what = progress, what

    def __call__(self, done: int, total: int) -> None:
        self._progress(self._what, done, total)


def _digest_of_scan(scans: Sequence[FolderScan], problems: Problems, source: Path | None) -> bytes:
    """What a scan found beside its pairs."""
    digest = hashlib.blake2b(b"" if source is None else _annotation_mark(source), digest_size=16)
    lists = [problems.images_without_sidecar, problems.sidecars_without_image]
    lists += [[f"{item.path}/{item.reason}" for item in problems.rejected]]
    lists += [scan.images for scan in scans]
    for names in lists:
        digest.update(f"\0{len(names)}\0".encode())
        for name in names:
            digest.update(name.encode("utf-8", "surrogatepass") + b"\0")
    return digest.digest()


def _fingerprint(scanned: bytes, scans: Sequence[FolderScan]) -> str:
    """Hash of everything that decides the rows: names, sizes and times."""
    digest = hashlib.blake2b(scanned, digest_size=16)
    for scan in scans:
        pairs = scan.pairs
        for column in (pairs.paths, pairs.suffixes, pairs.sizes, pairs.mtimes):
            digest.update(column.data)
    return digest.hexdigest()


def _readable_generations(home: Path) -> list[MetadataIndex]:
    """What stands, the latest first."""
    found: list[MetadataIndex] = []
    for path in newest_first(home):
        try:
            found.append(MetadataIndex.load(path))
        except FormatError as error:
            _log.warning("%s; building it anew", error)
    return found


def _problems_content(problems: Problems) -> dict[str, Any]:
    return {
        "rejected": [[item.path, item.reason, *(item.mark or ())] for item in problems.rejected],
        "images_without_sidecar": problems.images_without_sidecar,
        "sidecars_without_image": problems.sidecars_without_image,
        "unknown_ratings": [
            [item.path, item.reason, row]
            for item, row in zip(problems.unknown_ratings, problems.unknown_rating_rows, strict=True)
        ],
        "skipped": dict(problems.skipped),
        "unreadable": problems.unreadable,
    }


def _read_problems(path: Path) -> Problems:
    content = read_json(path, "index problems", FORMAT_VERSION)
    return Problems(
        [Rejected(path, reason, tuple(mark) or None) for path, reason, *mark in content["rejected"]],
        content["images_without_sidecar"],
        content["sidecars_without_image"],
        [Rejected(path, reason) for path, reason, _ in content["unknown_ratings"]],
        [row for *_, row in content["unknown_ratings"]],
        Counter(content["skipped"]),
        content["unreadable"],
    )
