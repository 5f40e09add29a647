"""The metadata index: every row of a data set, memory-mapped, with tags by the index's own numbers.

Built once from sidecars (or an annotation file) and reused while names, sizes and times of the files are the same.
Knows nothing of a vocabulary, so that changing one costs no new reading. Rows are never pickled: an index travels to
another process as its path, and the two share the pages.
"""

import hashlib
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagger.data.annotations import add_annotation_rows
from tagger.data.index_build import RowBuffer, add_sidecar_rows, write_arrays
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
from tagger.files import FormatError, read_json, write_json
from tagger.record import Record

__all__ = ["DatasetError", "MetadataIndex", "Rejected", "open_index"]

FORMAT_VERSION = 1
_KEPT_GENERATIONS = 2
_STALE_TEMPORARY_S = 86_400.0
_META = "meta.json"
_TAGS = "tags.json"
_PROBLEMS = "problems.json"

_log = logging.getLogger(__name__)


def open_index(
    roots: Sequence[str | Path],
    index_dir: Path,
    *,
    extra_fields: Sequence[str] = (),
    annotations: Path | None = None,
) -> "MetadataIndex":
    """Open the index of `roots`, building it below `index_dir` when there is none or the files have changed.

    With `annotations`, tags come from that file instead of sidecars and `roots` is its one image folder. Raises
    DatasetError when a root is missing or holds no image, or when no row is left.
    """
    folders = _resolve_roots(roots, annotations)
    try:
        fields = parse_extra_fields(extra_fields)
    except ValueError as error:
        raise DatasetError(f"data.extra_fields: {error}") from error
    source = annotations.expanduser().resolve() if annotations is not None else None
    parent = index_dir.expanduser().resolve()
    problems = Problems()
    digest = hashlib.blake2b(digest_size=16)
    if source is not None:
        digest.update(_annotation_mark(source))
    scans: list[FolderScan] = []
    for folder in folders:
        digest.update(b"\0root\0")
        scans.append(scan_root(folder, digest, problems, with_sidecars=source is None, skip=parent))
    fingerprint = digest.hexdigest()
    home = parent / _key(folders, fields, source)
    found = _find_generation(home, fingerprint)
    if found is not None:
        return found
    started = time.perf_counter()
    rows = RowBuffer()
    root_starts: list[int] = []
    for scan in scans:
        root_starts.append(rows.num_rows)
        if source is None:
            add_sidecar_rows(scan, fields, rows, problems)
        else:
            add_annotation_rows(source, scan, fields, rows, problems)
    if not rows.num_rows:
        raise DatasetError(describe_no_rows(scans, problems, source))
    facts = {
        "fingerprint": fingerprint,
        "roots": [str(folder) for folder in folders],
        "root_starts": root_starts,
        "extra_fields": list(extra_fields),
        "annotations": None if source is None else printable(source),
    }
    index = MetadataIndex.load(_write_generation(home, facts, rows, problems))
    _log.info("indexed %d rows in %.1f s: %s", index.num_rows, time.perf_counter() - started, index.path)
    return index


class MetadataIndex:
    """Rows in the order of (root, relative path of the image); all arrays are read-only and memory-mapped.

    `tag_names` are the index's own tags by number; the tags of row `r` are `tag_ids[tag_offsets[r]:tag_offsets[r+1]]`
    (uint16 or uint32; `tag_offsets` int64 [N+1]). `image_ids` uint64 [N] is `stable_id` of the stem. `ratings` uint8
    [N] is 0 for none, else 1 + the position in RATINGS. Safe to read from any thread.
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        """Use `MetadataIndex.load`."""
        self.path = path
        self.fingerprint: str = meta["fingerprint"]
        self.roots = tuple(Path(root) for root in meta["roots"])
        self.num_rows: int = meta["num_rows"]
        self.tag_names: tuple[str, ...] = tuple(read_json(path / _TAGS, "index tags", FORMAT_VERSION)["tags"])
        self.tag_ids = _open_array(path / "tag_ids.npy")
        self.tag_offsets: NDArray[np.int64] = _open_array(path / "tag_offsets.npy")
        self.image_ids: NDArray[np.uint64] = _open_array(path / "image_ids.npy")
        self.ratings: NDArray[np.uint8] = _open_array(path / "ratings.npy")
        self._paths: NDArray[np.uint8] = _open_array(path / "paths.npy")
        self._path_offsets: NDArray[np.int64] = _open_array(path / "path_offsets.npy")
        self._root_starts = np.array(meta["root_starts"], dtype=np.int64)
        # False when a file could not be read, which another attempt may mend.
        self.complete: bool = meta["complete"]

    @classmethod
    def load(cls, path: Path) -> "MetadataIndex":
        """Open the index in a folder, from any process; raises FormatError when it is damaged or newer."""
        meta = read_json(path / _META, "index", FORMAT_VERSION)
        for name, size in meta["sizes"].items():
            found = (path / name).stat().st_size if (path / name).is_file() else 0
            if found != size:
                raise FormatError(
                    f"index {path} is damaged: {name} has {found} bytes, expected {size}; delete the folder"
                )
        return cls(path, meta)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).load, (self.path,)

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
        """Rows that carry each tag, int64 [len(tag_names)]."""
        return np.bincount(self.tag_ids, minlength=len(self.tag_names)).astype(np.int64)

    def rating_counts(self) -> dict[str, int]:
        """Rows of each rating that occurs, in the order of RATINGS."""
        counts = np.bincount(self.ratings, minlength=len(RATINGS) + 1)[1:]
        return {rating: int(count) for rating, count in zip(RATINGS, counts, strict=True) if count}

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


def _find_generation(home: Path, fingerprint: str) -> MetadataIndex | None:
    for path in sorted(home.glob(f"{fingerprint}-*")):
        try:
            index = MetadataIndex.load(path)
        except FormatError as error:
            _log.warning("%s; building it anew", error)
            continue
        if index.complete and index.fingerprint == fingerprint:
            os.utime(path)  # in use: the clean-up keeps the most recent ones
            return index
    return None


def _write_generation(home: Path, facts: dict[str, Any], rows: RowBuffer, problems: Problems) -> Path:
    """Write beside the final place, then rename: a reader sees a whole generation or none."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=home))
    except OSError as error:
        raise DatasetError(_cannot_write(home, error)) from error
    try:
        sizes = write_arrays(temporary, rows.arrays())
        for name, content in (
            (_TAGS, {"format_version": FORMAT_VERSION, "tags": rows.tag_names}),
            (_PROBLEMS, _problems_content(problems)),
        ):
            write_json(temporary / name, content)
            sizes[name] = (temporary / name).stat().st_size
        meta = {
            "format_version": FORMAT_VERSION,
            **facts,
            "num_rows": rows.num_rows,
            "complete": problems.unreadable == 0,
            "sizes": sizes,
        }
        write_json(temporary / _META, meta)
        # mkdtemp makes a folder for its owner alone; an index is shared like any other file.
        temporary.chmod(0o755)
        final = home / f"{facts['fingerprint']}-{uuid.uuid4().hex[:8]}"
        temporary.rename(final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise DatasetError(_cannot_write(home, error)) from error
        raise
    _clean_up(home, final)
    return final


def _cannot_write(home: Path, error: OSError) -> str:
    return f"data.index_dir: cannot write {home}: {error.strerror or error}; name another folder or make room"


def _clean_up(home: Path, current: Path) -> None:
    """Drop old generations, but not the last ones: another run may be about to open its own by path."""
    ages = {path: path.stat().st_mtime for path in home.iterdir() if path != current and path.is_dir()}
    generations = sorted((path for path in ages if not path.name.startswith(".")), key=lambda p: -ages[p])
    abandoned = [
        path for path in ages if path.name.startswith(".tmp-") and ages[path] < time.time() - _STALE_TEMPORARY_S
    ]
    for path in (*generations[_KEPT_GENERATIONS - 1 :], *abandoned):
        shutil.rmtree(path, ignore_errors=True)


def _problems_content(problems: Problems) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "rejected": [[item.path, item.reason] for item in problems.rejected],
        "images_without_sidecar": problems.images_without_sidecar,
        "sidecars_without_image": problems.sidecars_without_image,
        "unknown_ratings": [[item.path, item.reason] for item in problems.unknown_ratings],
        "skipped": dict(problems.skipped),
        "unreadable": problems.unreadable,
    }


def _read_problems(path: Path) -> Problems:
    content = read_json(path, "index problems", FORMAT_VERSION)
    return Problems(
        [Rejected(*item) for item in content["rejected"]],
        content["images_without_sidecar"],
        content["sidecars_without_image"],
        [Rejected(*item) for item in content["unknown_ratings"]],
        Counter(content["skipped"]),
        content["unreadable"],
    )


def _open_array(path: Path) -> NDArray[Any]:
    # A plain view of the map: np.memmap's own indexing costs several times an ndarray's.
    mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    return mapped
