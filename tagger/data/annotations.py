"""Rows from one annotation file (JSON or JSON Lines) that names the images of a folder.

JSON: a list of objects with a file name, or an object from file name to such an object or to tags alone. JSON Lines:
one object a line. Apart from the name, an entry reads like a sidecar. Refuses names that leave the image folder, that
are not there, or that come twice.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath

from tagger.data.index_build import RowWriter
from tagger.data.scan import DatasetError, FolderScan, Problems, image_suffixes, printable
from tagger.data.sidecar import (
    MAX_SIDECAR_BYTES,
    ExtraField,
    ParsedSidecar,
    SidecarError,
    describe_type,
    parse_entry,
    parse_json,
)

LINE_SUFFIXES = (".jsonl", ".ndjson")
_NAME_KEYS = ("filename", "file_name", "image", "path")


def add_annotation_rows(
    path: Path, scan: FolderScan, extra_fields: Sequence[ExtraField], rows: RowWriter, problems: Problems
) -> None:
    """Add a row for each usable entry, in the order of image paths; what cannot be used becomes a problem.

    Raises DatasetError when the file as a whole cannot be read.
    """
    images = frozenset(scan.images)
    found: dict[str, tuple[str, ParsedSidecar]] = {}
    same: dict[str, str] = {}  # one object for equal tags: the rows are held until they can be sorted
    for position, name, content in _read_entries(path):
        try:
            entry = _as_object(content)
            image = _relative_path(_image_name(entry) if name is None else name, images)
            if image in found:
                raise SidecarError(f"image named twice: {image} is also {found[image][0]}")
            parsed = parse_entry(entry, extra_fields)
        except SidecarError as error:
            problems.reject(f"{path} {position}", error.reason)
            continue
        tags = tuple(same.setdefault(tag, tag) for tag in parsed.tags)
        found[image] = (position, ParsedSidecar(tags, parsed.rating, None, parsed.bad_rating))
    for row, (image, (position, parsed)) in enumerate(sorted(found.items())):
        rows.add(image, parsed.tags, parsed.rating)
        if parsed.bad_rating is not None:
            problems.note_rating(f"{path} {position}", parsed.bad_rating, row)
    problems.images_without_sidecar += [printable(scan.root / image) for image in scan.images if image not in found]


def _read_entries(path: Path) -> Iterator[tuple[str, str | None, object]]:
    """Where each entry stands, the image name that its key gives (if it has one), and its decoded JSON or its bytes."""
    try:
        if path.suffix.lower() in LINE_SUFFIXES:
            with path.open("rb") as stream:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield f"line {number}", None, line
            return
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise DatasetError(f"data.annotations: cannot read {printable(path)}: {error.strerror or error}") from error
    except SidecarError as error:
        hint = f"; one object a line needs a name that ends in {LINE_SUFFIXES[0]}"
        raise DatasetError(f"data.annotations: {printable(path)} is not usable: {error.reason}{hint}") from error
    if isinstance(content, list):
        for number, entry in enumerate(content, 1):
            yield f"entry {number}", None, entry
    elif isinstance(content, dict):
        for name, entry in content.items():
            yield f"entry '{name}'", name, entry if isinstance(entry, dict) else {"tags": entry}
    else:
        raise DatasetError(
            f"data.annotations: {printable(path)} holds {describe_type(content)}; "
            "expected a list of objects, or an object from file name to tags"
        )


def _as_object(content: object) -> dict[str, object]:
    if isinstance(content, bytes):
        if len(content) > MAX_SIDECAR_BYTES:
            raise SidecarError(f"too large: more than {MAX_SIDECAR_BYTES >> 20} MiB")
        content = parse_json(content)
    if not isinstance(content, dict):
        raise SidecarError(f"not a JSON object: the entry is {describe_type(content)}")
    return content


def _image_name(entry: dict[str, object]) -> str:
    for key in _NAME_KEYS:
        if key in entry:
            name = entry[key]
            if isinstance(name, str):
                return name
            raise SidecarError(f"the image name is not a string: '{key}' is {describe_type(name)}")
    raise SidecarError(f"no image name: expected one of {', '.join(_NAME_KEYS)}")


def _relative_path(name: str, images: frozenset[str]) -> str:
    """`name` as the path of an image below the folder; annotation files written on Windows have backslashes."""
    if name in images:
        return name
    windows = PureWindowsPath(name)
    parts = name.replace("\\", "/").split("/")
    if windows.drive or windows.root or ".." in parts:
        raise SidecarError(f"path outside the image folder: {name}")
    path = "/".join(part for part in parts if part not in ("", "."))
    if path in images:
        return path
    if path.rpartition(".")[2].lower() not in image_suffixes():
        raise SidecarError(f"not an image: {name}")
    raise SidecarError(f"missing image: {name}")
