"""The metadata index: every row of a data set, memory-mapped, with tags by the index's own numbers.

Built from sidecars (or an annotation file) and reused while names, sizes and times of the files are the same; when
some of them change, those are read and the rest is taken over. Knows nothing of a vocabulary, so that changing one
costs no new reading. Rows are never pickled: an index travels to another process as its path, and the two share the
pages.
"""

import contextlib
import hashlib
import logging
import os
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagger.data.annotations import add_annotation_rows
from tagger.data.columns import open_column
from tagger.data.corrections import Corrections, read_corrections
from tagger.data.generations import Generation, check_writable, clean_up, newest_first
from tagger.data.header_columns import ImageHeaders, carry_headers, newest_headers, read_headers
from tagger.data.index_build import RowWriter
from tagger.data.index_fingerprint import digest_of_scan, fingerprint_of
from tagger.data.index_problems import problems_content, read_problems
from tagger.data.index_progress import Ahead, Of, Progress
from tagger.data.index_update import OldRows, Update, add_scanned_rows, problems_by_sidecar
from tagger.data.manifest import read_manifest, verify_files, write_manifest
from tagger.data.ragged import Numbers, gather
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

FORMAT_VERSION = 3
_TAGS = "tags.json"
_PROBLEMS = "problems.json"

_log = logging.getLogger(__name__)


def open_index(
    roots: Sequence[str | Path],
    index_dir: Path,
    *,
    extra_fields: Sequence[str] = (),
    annotations: Path | None = None,
    corrections: Path | None = None,
    headers: bool = False,
    processes: int | None = None,
    progress: Progress | None = None,
) -> "MetadataIndex":
    """Open the index of `roots` below `index_dir`, built or brought up to date where the files have changed.

    With `annotations`, tags come from that file instead of sidecars and `roots` is its one image folder. `corrections`
    is a journal of corrected tags to lay over them. With `headers`, the width and height of each image are read too,
    where the file is new or has changed. `processes` parse sidecars (None: several where there are many to read).
    Raises DatasetError when a root is missing or holds no image, or when no row is left, InputError for a bad journal.
    """
    index = _open_rows(roots, index_dir, extra_fields, annotations, processes, progress)
    for field in parse_extra_fields(extra_fields):
        if not index.has_tag_prefix(f"{field.prefix}:"):
            _log.warning("data.extra_fields: no image has a tag by the field '%s'; check its spelling", field.name)
    if corrections is not None:
        index.correct(read_corrections(corrections.expanduser(), index))
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
    while generations and not generations[0]._is_sound():
        del generations[0]
    if not generations:
        check_writable(home)
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
                progress=None if progress is None else Ahead(progress, "looking for files", num_before),
            )
        )
    scanned = digest_of_scan(scans, problems, source)
    fingerprint = fingerprint_of(scanned, scans)
    for index in generations:
        if index.complete and index.fingerprint == fingerprint and index._is_sound():
            with contextlib.suppress(PermissionError):  # an index that others made
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
                progress=None if progress is None else Of(progress, "reading sidecars"),
            )
            root_starts, update = built.root_starts, built.update
            fingerprint = fingerprint_of(scanned, scans)  # the marks of what was read
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
    for name, content in ((_TAGS, {"tags": rows.tags.names}), (_PROBLEMS, problems_content(problems))):
        sizes[name] = generation.write_json(name, {"format_version": FORMAT_VERSION, **content})
    meta = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        **facts,
        "num_rows": rows.num_rows,
        "num_refused": sum(item.mark is not None for item in problems.rejected),
        "rating_counts": rows.rating_counts,
        "complete": problems.unreadable == 0,
    }
    write_manifest(generation.folder, sizes, meta)
    return generation.commit(fingerprint)


class MetadataIndex:
    """Rows in the order of (root, relative path of the image); all arrays are read-only and memory-mapped.

    `tag_names` are the index's own tags by number, in the order of their first occurrence; when files change, a tag
    may get another number, so numbers are good for this index alone. The tags of row `r` are
    `tag_ids[tag_offsets[r]:tag_offsets[r+1]]` (uint16 or uint32; `tag_offsets` int32 or int64 [N+1]). `image_ids`
    uint64 [N] is `stable_id` of the stem. `ratings` uint8 [N] is 0 for none, else 1 + the position in RATINGS.
    `sidecar_sizes` uint32 [N] in bytes and `sidecar_mtimes` int64 [N] in ns are those of the sidecar when it was read;
    None where the rows come from an annotation file. Safe to read from any thread.

    `tag_ids` and `tag_offsets` are what the sidecars say, and so is the split by them; everything else has the
    `corrections`, where there are any: `gather_tags` and `tag_lengths` are what to read tags with.
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        """Use `MetadataIndex.load`."""
        self.path = path
        self._files: dict[str, Any] = meta["files"]
        self._verified = False
        self.fingerprint: str = meta["fingerprint"]
        self.roots = tuple(Path(root) for root in meta["roots"])
        # What an image without labels lacks, in words.
        self.label_source = "sidecar" if meta["annotations"] is None else "an entry"
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
        self.sidecar_ratings: NDArray[np.uint8] = open_column(path / "ratings.npy")
        self.ratings = self.sidecar_ratings
        self.corrections: Corrections | None = None
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
        if not self._fits_together():
            raise FormatError(f"index {path} is damaged: its columns do not fit together")

    @classmethod
    def load(cls, path: Path, headers: Path | None = None, corrections: Corrections | None = None) -> "MetadataIndex":
        """Open the index in a folder, from any process, and its image headers in another, if that is named.

        Takes the same time for any number of rows, so it sees wrong sizes and lengths; `verify` sees all damage.
        Raises FormatError for that, or when one is newer.
        """
        meta = read_manifest(path, "index", FORMAT_VERSION)
        try:
            index = cls(path, meta)
        except KeyError as error:
            raise FormatError(f"index {path} is damaged: {_TAGS} has no {error}") from error
        index.headers = None if headers is None else ImageHeaders.load(headers)
        if corrections is not None:
            index.correct(corrections)
        return index

    def correct(self, corrections: Corrections) -> None:
        """Lay corrections that were made for this index over its rows, once."""
        assert self.corrections is None
        self.corrections = corrections
        if not len(corrections.rows):
            return
        self.tag_names += corrections.new_tags
        grown = np.concatenate([self._tag_counts, np.zeros(len(corrections.new_tags), dtype=np.int64)])
        self._tag_counts = grown + corrections.tag_changes
        self._rating_counts = (np.array(self._rating_counts) + corrections.rating_changes).tolist()
        self.ratings = corrections.correct_ratings(self.sidecar_ratings)

    def verify(self) -> None:
        """Read every byte once, and raise FormatError unless all are as they were written; at once where that was done.

        `open_index` does so for an index that it finds. The sizes of images have checksums of their own.
        """
        if not self._verified:
            try:
                verify_files(self.path, self._files, "index")
            except FormatError as error:
                raise FormatError(f"{error}; a start builds it anew") from error
            self._verified = True

    def read_headers(self, progress: Progress | None = None) -> ImageHeaders:
        """Width and height of every image, read now where a file is new or has changed; kept as `headers`."""
        if self.headers is None:
            told = None if progress is None else Of(progress, "reading image headers")
            self.headers = read_headers(self.path, self.num_rows, self.image_paths, told)
        return self.headers

    def __reduce__(self) -> tuple[Any, ...]:
        headers = None if self.headers is None else self.headers.path
        return type(self).load, (self.path, headers, self.corrections)

    def __len__(self) -> int:
        return self.num_rows

    def relative_path(self, row: int) -> str:
        """POSIX path of the image below its root."""
        return self._path_bytes(self._check_row(row)).decode("utf-8", "surrogatepass")

    def _path_bytes(self, row: int) -> bytes:
        return self._paths[self._path_offsets[row] : self._path_offsets[row + 1]].tobytes()

    def locate(self, row: int) -> tuple[int, str]:
        """(place in `roots`, POSIX path below it) of an image."""
        return int(np.searchsorted(self._root_starts, self._check_row(row), side="right")) - 1, self.relative_path(row)

    def find_row(self, root: int, image: str) -> int | None:
        """The row of an image by its place in `roots` and its path below it, or None: the inverse of `locate`."""
        first, end = [*self._root_starts.tolist(), self.num_rows][root : root + 2]
        wanted = image.encode("utf-8", "surrogatepass")
        row = first + bisect_left(range(first, end), wanted, key=self._path_bytes)
        return row if row < end and self._path_bytes(row) == wanted else None

    def image_path(self, row: int) -> Path:
        """Absolute path of the image."""
        root, path = self.locate(row)
        return self.roots[root] / path

    def image_paths(self, rows: range) -> list[Path]:
        """Absolute paths of the images of consecutive rows."""
        return [self.image_path(row) for row in rows]

    def stem(self, row: int) -> str:
        """File name of the image without suffix, which its sidecar shares."""
        return self.relative_path(row).rpartition("/")[2].rpartition(".")[0]

    def row_tag_ids(self, row: int) -> NDArray[np.integer]:
        """Tag numbers of a row (a view)."""
        corrected = None if self.corrections is None else self.corrections.row_tags(self._check_row(row))
        return self._sidecar_tag_ids(row) if corrected is None else corrected

    def _sidecar_tag_ids(self, row: int) -> NDArray[np.integer]:
        row = self._check_row(row)
        return self.tag_ids[self.tag_offsets[row] : self.tag_offsets[row + 1]]

    def gather_tags(self, rows: Numbers) -> tuple[Numbers, Numbers]:
        """Tag numbers of rows: (numbers [T], the place in `rows` that each belongs to [T], ascending); int64."""
        values, places = gather(self.tag_offsets, self.tag_ids, rows)
        if self.corrections is None or not len(self.corrections.rows):
            return values, places
        return self.corrections.replace(rows, values, places)

    def tag_lengths(self) -> Numbers:
        """How many tags each row has, int64 [N]."""
        lengths = np.diff(self.tag_offsets).astype(np.int64)
        if self.corrections is not None:
            lengths[self.corrections.rows] = np.diff(self.corrections.tag_offsets)
        return lengths

    def rating(self, row: int) -> str | None:
        """The row's rating, one of RATINGS."""
        return _rating_of(int(self.ratings[self._check_row(row)]))

    def record(self, row: int) -> Record:
        """A row in full, for people and exports; the loader reads the arrays."""
        tags = tuple(self.tag_names[number] for number in self.row_tag_ids(row))
        return Record(str(self.image_path(row)), self.stem(row), tags, self.rating(row))

    def sidecar_record(self, row: int) -> Record:
        """A row in full as its sidecar says, corrections aside."""
        tags = tuple(self.tag_names[number] for number in self._sidecar_tag_ids(row))
        return Record(str(self.image_path(row)), self.stem(row), tags, _rating_of(int(self.sidecar_ratings[row])))

    def tag_counts(self) -> NDArray[np.int64]:
        """Rows that carry each tag, int64 [len(tag_names)], counted when the index was built and corrected."""
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

    def has_tag_prefix(self, prefix: str) -> bool:
        """Whether an image has a tag that begins so."""
        counted = zip(self.tag_names, self._tag_counts.tolist(), strict=True)
        return any(count and name.startswith(prefix) for name, count in counted)

    def report(self) -> tuple[str, ...]:
        """What was indexed and what was not, in lines for people."""
        folders = "1 folder" if len(self.roots) == 1 else f"{len(self.roots)} folders"
        num_tags = int(np.count_nonzero(self._tag_counts))  # corrections may have left none of one
        lines = [f"{self.num_rows:,} images with {num_tags:,} distinct tags in {folders}"]
        lines += describe_problems(self._problems, self.label_source)
        lines += self.corrections.report if self.corrections is not None else ()
        return tuple(lines)

    @cached_property
    def _problems(self) -> Problems:
        return read_problems(self.path / _PROBLEMS, FORMAT_VERSION)

    def _old_rows(self) -> OldRows:
        """These rows as what a new index can take over."""
        assert self.sidecar_sizes is not None and self.sidecar_mtimes is not None and self.corrections is None
        refused, odd_ratings = problems_by_sidecar(self._problems)
        return OldRows(
            [*self._root_starts.tolist(), self.num_rows],
            self._paths,
            self._path_offsets,
            self.tag_names,
            self.tag_ids,
            self.tag_offsets,
            self.image_ids,
            self.sidecar_ratings,
            self.sidecar_sizes,
            self.sidecar_mtimes,
            refused,
            odd_ratings,
        )

    def _is_sound(self) -> bool:
        """Whether all bytes are as they were written; a line says what is not."""
        try:
            self.verify()
        except FormatError as error:
            _log.warning("%s", error)
            return False
        return True

    def _fits_together(self) -> bool:
        rows, lengths = self.num_rows, (self.image_ids, self.ratings, self.sidecar_sizes, self.sidecar_mtimes)
        return (
            all(column is None or len(column) == rows for column in lengths)
            and len(self._tag_counts) == len(self.tag_names)
            and all(
                len(offsets) == rows + 1 and offsets[0] == 0 and offsets[-1] == len(content)
                for offsets, content in ((self.tag_offsets, self.tag_ids), (self._path_offsets, self._paths))
            )
        )

    def _check_row(self, row: int) -> int:
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} is not in 0..{self.num_rows - 1}")
        return row


def _rating_of(code: int) -> str | None:
    return RATINGS[code - 1] if code else None


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


def _key(roots: tuple[Path, ...], fields: tuple[ExtraField, ...], annotations: Path | None) -> str:
    """Name of the folder that holds the generations of one data set read in one way."""
    parts = [str(FORMAT_VERSION), *image_suffixes(), "roots", *map(str, roots), "fields"]
    parts += [f"{field.name}={field.prefix}" for field in fields]
    parts += [] if annotations is None else ["annotations", printable(annotations)]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _readable_generations(home: Path) -> list[MetadataIndex]:
    """What stands, the latest first."""
    found: list[MetadataIndex] = []
    for path in newest_first(home):
        try:
            found.append(MetadataIndex.load(path))
        except FormatError as error:
            _log.warning("%s; building it anew", error)
    return found
