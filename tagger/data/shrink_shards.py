"""The shards of a shrink cache: a tar file (webdataset's form) or a folder, of `<key>.jpg` and `<key>.json` in pairs.

A shard is written under another name, brought to the disk and then renamed, so one that has its name is whole and never
changes. It describes itself: the index of a cache can be made again from its shards. Refuses to read a shard whose
members are not such pairs.
"""

import io
import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import orjson

from tagger.checkpoint.writer import fsync_folder
from tagger.files import FormatError

Form = Literal["tar", "loose"]

_PART = ".part"
_NAME = re.compile(r"shard-(\d{6,})(\.tar)?")
_BLOCK = 512


@dataclass(frozen=True)
class SourceFacts:
    """What `<key>.json` says of the file that an entry was made from.

    path: relative to its root, for people; path_id: 32 hexadecimal digits, see `path_id`. size: bytes. sha256: of the
    file's content. width, height: pixels, upright. crc32: of the entry's JPEG.
    """

    path: str
    path_id: str
    size: int
    mtime_ns: int
    sha256: str
    width: int
    height: int
    crc32: int


@dataclass(frozen=True)
class Member:
    """An entry in a shard: its 16-byte key, and where its JPEG lies (offset 0 in a folder)."""

    key: bytes
    offset: int
    length: int
    facts: SourceFacts


class ShardWriter(Protocol):
    """A shard in the making."""

    num_entries: int
    num_bytes: int

    def add(self, key: bytes, jpeg: bytes, facts: SourceFacts) -> int:
        """Append an entry; gives the offset of its JPEG."""

    def commit(self) -> None:
        """Bring everything to the disk and give the shard its name."""

    def discard(self) -> None:
        """Remove what was written."""


def shard_path(folder: Path, number: int, form: Form) -> Path:
    """Where a shard lies in the folder of its cache."""
    return folder / f"shard-{number:06}{'.tar' if form == 'tar' else ''}"


def shard_numbers(folder: Path, form: Form) -> list[int]:
    """The numbers of the committed shards of a folder, ascending."""
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match and (match[2] is not None) == (form == "tar"))


def shard_size(folder: Path, number: int, form: Form) -> int:
    """Bytes of a tar shard, 0 for a folder that is there, -1 where there is none."""
    path = shard_path(folder, number, form)
    if form == "loose":
        return 0 if path.is_dir() else -1
    return path.stat().st_size if path.is_file() else -1


def create_shard(folder: Path, number: int, form: Form) -> ShardWriter:
    """Begin a shard."""
    path = shard_path(folder, number, form)
    return _TarWriter(path) if form == "tar" else _FolderWriter(path)


def remove_shard(folder: Path, number: int, form: Form) -> None:
    """Delete a shard; where the system keeps an open file, a later call does it."""
    path = shard_path(folder, number, form)
    try:
        path.unlink() if form == "tar" else shutil.rmtree(path)
    except PermissionError:  # Windows, while another process reads it
        return


def remove_unfinished(folder: Path) -> None:
    """Delete what interrupted writers left."""
    for path in folder.iterdir():
        if path.name.endswith(_PART) and _NAME.fullmatch(path.name.removesuffix(_PART)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def scan_shard(folder: Path, number: int, form: Form) -> Iterator[Member]:
    """The entries of a committed shard, from its headers and its small files; FormatError when they are not pairs."""
    path = shard_path(folder, number, form)
    try:
        yield from _scan_tar(path) if form == "tar" else _scan_folder(path)
    except (tarfile.TarError, ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{path} is not a shard of this cache ({error}); move it away") from error


def jpeg_name(key: bytes) -> str:
    """File or member name of an entry's JPEG."""
    return f"{key.hex()}.jpg"


def _facts_json(facts: SourceFacts) -> bytes:
    return orjson.dumps(asdict(facts))


class _TarWriter:
    def __init__(self, path: Path) -> None:
        self.num_entries = 0
        self.num_bytes = 0
        self._path = path
        self._part = path.with_name(path.name + _PART)
        self._stream: BinaryIO = self._part.open("wb")

    def add(self, key: bytes, jpeg: bytes, facts: SourceFacts) -> int:
        offset = self._append(jpeg_name(key), jpeg)
        self._append(f"{key.hex()}.json", _facts_json(facts))
        self.num_entries += 1
        return offset

    def _append(self, name: str, content: bytes) -> int:
        member = tarfile.TarInfo(name)  # owner 0 and time 0: the same images give the same bytes
        member.size = len(content)
        header = member.tobuf(tarfile.USTAR_FORMAT)
        self._stream.write(header + content + bytes(-len(content) % _BLOCK))
        offset = self.num_bytes + len(header)
        self.num_bytes = offset + len(content) + -len(content) % _BLOCK
        return offset

    def commit(self) -> None:
        with self._stream as stream:
            stream.write(bytes(2 * _BLOCK))
            stream.flush()
            os.fsync(stream.fileno())
        self._part.replace(self._path)
        fsync_folder(self._path.parent)

    def discard(self) -> None:
        self._stream.close()
        self._part.unlink(missing_ok=True)


class _FolderWriter:
    def __init__(self, path: Path) -> None:
        self.num_entries = 0
        self.num_bytes = 0
        self._path = path
        self._part = path.with_name(path.name + _PART)
        self._part.mkdir()

    def add(self, key: bytes, jpeg: bytes, facts: SourceFacts) -> int:
        for name, content in ((jpeg_name(key), jpeg), (f"{key.hex()}.json", _facts_json(facts))):
            with (self._part / name).open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            self.num_bytes += len(content)
        self.num_entries += 1
        return 0

    def commit(self) -> None:
        fsync_folder(self._part)
        self._part.rename(self._path)
        fsync_folder(self._path.parent)

    def discard(self) -> None:
        shutil.rmtree(self._part, ignore_errors=True)


def read_members(folder: Path, number: int, form: Form) -> Iterator[tuple[Member, bytes]]:
    """The entries of a committed shard with their JPEGs."""
    path = shard_path(folder, number, form)
    stream = path.open("rb") if form == "tar" else io.BytesIO()
    with stream:
        for member in scan_shard(folder, number, form):
            if form == "loose":
                yield member, (path / jpeg_name(member.key)).read_bytes()
            else:
                stream.seek(member.offset)
                yield member, stream.read(member.length)


def _scan_tar(path: Path) -> Iterator[Member]:
    with tarfile.open(path, "r:") as tar:
        jpeg: tarfile.TarInfo | None = None
        while (member := tar.next()) is not None:
            stem, _, suffix = member.name.partition(".")
            if jpeg is None:
                if suffix != "jpg":
                    raise ValueError(f"{member.name} stands where a .jpg is expected")
                jpeg = member
                continue
            content = tar.extractfile(member)
            if member.name != f"{jpeg.name[:-4]}.json" or content is None:
                raise ValueError(f"{member.name} follows {jpeg.name}")
            yield _member(stem, jpeg.offset_data, jpeg.size, content.read())
            jpeg = None
        if jpeg is not None:
            raise ValueError(f"{jpeg.name} is the last member")


def _scan_folder(path: Path) -> Iterator[Member]:
    for facts in sorted(path.glob("*.json")):
        jpeg = facts.with_suffix(".jpg")
        if not jpeg.is_file():
            raise ValueError(f"{jpeg.name} is missing")
        yield _member(facts.stem, 0, jpeg.stat().st_size, facts.read_bytes())


def _member(stem: str, offset: int, length: int, facts: bytes) -> Member:
    key = bytes.fromhex(stem)
    if len(key) != 16:
        raise ValueError(f"{stem} is not a key")
    return Member(key, offset, length, SourceFacts(**orjson.loads(facts)))
