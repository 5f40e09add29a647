"""The manifest of a folder that is written once: what its files hold, so that damage is found before they are used.

Sizes are compared whenever a folder is opened, which takes the same time for any number of rows. CRC-32 of blocks
finds what sizes cannot (a zeroed page, a flipped bit); it costs one reading of everything, at several GB/s where the
files are in the page cache. Not against an attacker, who writes a manifest of his own.
"""

import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson

from tagger.files import FormatError, read_json, write_json

_META = "meta.json"
BLOCK_BYTES = 1 << 24
# What is read at a time stays in the processor's cache, and zlib works on it without the interpreter's lock.
_PIECE_BYTES = 1 << 20
_MAX_THREADS = 4


def write_manifest(folder: Path, sizes: Mapping[str, int], content: Mapping[str, Any]) -> None:
    """Complete a folder: `content`, which has its format_version, with sizes and checksums of the files, and its own.

    sizes: bytes of each file, by name, as they were written.
    """
    blocks = _blocks(sizes)
    sums = _checksums(folder, blocks)
    files: dict[str, dict[str, Any]] = {name: {"bytes": size, "crc32": []} for name, size in sizes.items()}
    for (name, _), checksum in zip(blocks, sums, strict=True):
        files[name]["crc32"].append(checksum)
    whole = {**content, "files": files}
    write_json(folder / _META, {**whole, "crc32": _own_checksum(whole)})


def read_manifest(folder: Path, kind: str, format_version: int) -> dict[str, Any]:
    """The content of a folder's manifest. Raises FormatError where it, or the size of a file, is not as it was written.

    kind: names the folder for people ("index").
    """
    meta = read_json(folder / _META, kind, format_version)
    found = meta.pop("crc32", None)
    if found != _own_checksum(meta):
        raise FormatError(f"{kind} {folder} is damaged: {_META} is not as it was written")
    for name, facts in meta["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if size != facts["bytes"]:
            raise FormatError(f"{kind} {folder} is damaged: {name} has {size} bytes, expected {facts['bytes']}")
    return meta


def verify_files(folder: Path, files: Mapping[str, Mapping[str, Any]], kind: str) -> None:
    """Read every file of a folder. Raises FormatError where a byte is not as it was written, or cannot be read.

    files: the entry of that name in the manifest.
    """
    blocks = _blocks({name: facts["bytes"] for name, facts in files.items()})
    wanted = [checksum for facts in files.values() for checksum in facts["crc32"]]
    try:
        sums = _checksums(folder, blocks)
    except OSError as error:
        raise FormatError(f"{kind} {folder} cannot be read: {error.strerror or error}") from error
    for (name, start), found, checksum in zip(blocks, sums, wanted, strict=True):
        if found != checksum:
            stop = min(start + BLOCK_BYTES, files[name]["bytes"])
            raise FormatError(f"{kind} {folder} is damaged: {name} is not as it was written (bytes {start} to {stop})")


def _blocks(sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    """(file, first byte) of every block."""
    return [(name, start) for name, size in sizes.items() for start in range(0, size, BLOCK_BYTES)]


def _checksums(folder: Path, blocks: Sequence[tuple[str, int]]) -> list[int]:
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="checksum") as pool:
        return list(pool.map(lambda block: _checksum(folder / block[0], block[1]), blocks))


def _checksum(path: Path, start: int) -> int:
    # Read, not mapped: a sector that cannot be read is an OSError here and would kill the process there.
    checksum, left = 0, BLOCK_BYTES
    piece = memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as stream:
        stream.seek(start)
        while left and (count := stream.readinto(piece[: min(left, _PIECE_BYTES)])):
            checksum = zlib.crc32(piece[:count], checksum)
            left -= count
    return checksum


def _own_checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(orjson.dumps(content, option=orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY))
