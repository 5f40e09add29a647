"""What decides the rows of an index: names, sizes and times of files, as a hash. Reads no file."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from tagger.data.scan import DatasetError, FolderScan, Problems, printable


def digest_of_scan(scans: Sequence[FolderScan], problems: Problems, source: Path | None) -> bytes:
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


def fingerprint_of(scanned: bytes, scans: Sequence[FolderScan]) -> str:
    """Hash of everything that decides the rows: names, sizes and times."""
    digest = hashlib.blake2b(scanned, digest_size=16)
    for scan in scans:
        pairs = scan.pairs
        for column in (pairs.paths, pairs.suffixes, pairs.sizes, pairs.mtimes):
            digest.update(column.data)
    return digest.hexdigest()


def _annotation_mark(path: Path) -> bytes:
    try:
        facts = path.stat()
    except OSError as error:
        raise DatasetError(f"data.annotations: cannot read {printable(path)}: {error.strerror or error}") from error
    return f"{facts.st_size}/{facts.st_mtime_ns}".encode()
