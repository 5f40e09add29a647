"""What a checkpoint is on disk: one folder of safetensors and JSON files, and a manifest that says what they must be.

    step-000000123/
        model.safetensors, ema.safetensors (where kept), optimizer.safetensors, rng.safetensors
        state.json       everything that is not a tensor
        manifest.json    format version, step, sequence, hashes of vocabulary and configuration, size and sha256 of each
                         file, and its own sha256

Nothing is pickled, and a reader follows no path that a checkpoint names. Refuses a folder whose manifest or files are
not byte for byte what was written, or hold numbers that are not finite (CheckpointError), and one written by a newer
program (FormatError).
"""

import hashlib
import json
import math
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

import orjson
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tagger.errors import InputError
from tagger.files import FormatError, NewerFormatError, read_json

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
TENSOR_PARTS = ("model", "ema", "optimizer", "rng")
_FINITE_PARTS = ("model", "ema", "optimizer")

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None
Tensors: TypeAlias = Mapping[str, Tensor]

_FILES = (*(f"{part}.safetensors" for part in TENSOR_PARTS), STATE_FILE)
_NAME = re.compile(r"step-(\d{9,18})(?:-(\d{1,9}))?", re.ASCII)
_CHUNK_BYTES = 16 << 20
_LARGEST_MANIFEST_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
# The names of the safetensors format for the types that training state has.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(InputError):
    """A checkpoint that cannot be used; the message is one line that says which, why and what to do."""


class NoneUsableError(CheckpointError):
    """Checkpoints are there, and the storage has spoilt them all."""

    exit_code = 6


class NotFiniteError(CheckpointError):
    """Weights, averages or optimizer state that hold a NaN or an infinity, and are therefore not saved."""


@dataclass(frozen=True)
class FileEntry:
    """What a file of a checkpoint must be."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint folder must hold. `sequence` counts the checkpoints of a run in the order they were written.

    Steps alone do not order them: a run that goes back to an earlier checkpoint passes the same steps again. `value` is
    that of the deciding metric, by name, where the step was scored, so that the best one is known without its record;
    `yardstick` is the hash of what it was scored with, since values of two yardsticks do not compare.
    """

    step: int
    sequence: int
    files: Mapping[str, FileEntry]
    vocabulary_sha256: str | None = None
    config_sha256: str | None = None
    metric: str | None = None
    value: float | None = None
    yardstick: str | None = None

    def encode(self) -> bytes:
        """The one byte string of this manifest; it ends in the sha256 of what comes before."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        content["manifest_sha256"] = _digest(content)
        return _encode(content)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A verified checkpoint in host memory: tensors by part ("model", ...) and name, and the rest as JSON values."""

    path: Path
    manifest: Manifest
    tensors: Mapping[str, Tensors]
    state: Mapping[str, Json]

    @property
    def step(self) -> int:
        """Optimizer updates made when it was taken."""
        return self.manifest.step


def checkpoint_name(step: int, copy: int = 1) -> str:
    """Folder name of a checkpoint; `copy` tells apart several of the same step."""
    return f"step-{step:09d}" if copy == 1 else f"step-{step:09d}-{copy}"


def checkpoint_step(name: str) -> int:
    """The step in a checkpoint's folder name."""
    return int(name.split("-")[1])


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of this name is a checkpoint; never true of anything with a path in it."""
    return _NAME.fullmatch(name) is not None


def list_checkpoints(folder: Path) -> list[Path]:
    """Every folder named like a checkpoint, whole or not, by step."""
    if not folder.is_dir():
        return []
    named = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(named, key=lambda each: (int(each[0][1]), int(each[0][2] or 1)))]


def write_tensors(stream: IO[bytes], tensors: Tensors) -> FileEntry:
    """Write host tensors in the safetensors format, hashing on the way, without a second copy in memory."""
    # Widest type first keeps every tensor aligned, as readers that map the file want it.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"{name} has the type {tensor.dtype}, which checkpoints do not hold")
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    size = 0
    blocks = (memoryview(len(text).to_bytes(8, "little") + text), *(_bytes_of(tensor) for _, tensor in ordered))
    for block in blocks:
        size += len(block)
        for offset in range(0, len(block), _CHUNK_BYTES):
            chunk = block[offset : offset + _CHUNK_BYTES]
            digest.update(chunk)
            stream.write(chunk)
    return FileEntry(size, digest.hexdigest())


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(cast(Any, tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()))


def encode_state(state: Mapping[str, Json]) -> bytes:
    """`state.json` of what is not a tensor. A number that is not finite becomes null: a NaN score stops no save."""
    try:
        return orjson.dumps({"format_version": FORMAT_VERSION, **state}, option=orjson.OPT_INDENT_2) + b"\n"
    except TypeError as error:
        raise CheckpointError(f"the training state is not JSON: {error}") from error


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone; the files that it lists are not looked at."""
    path = folder / MANIFEST_FILE
    size = regular_size(path)
    if size > _LARGEST_MANIFEST_BYTES:
        raise CheckpointError(f"checkpoint {folder} is broken: {MANIFEST_FILE} has {size} bytes")
    try:
        data = path.read_bytes()
        content = orjson.loads(data)
        digest = content.pop("manifest_sha256")
        # Re-encoding also finds a change that parses to the same values.
        if digest != _digest(content) or _encode({**content, "manifest_sha256": digest}) != data:
            raise ValueError("it is not what was written")
        version = content["format_version"]
        if version > FORMAT_VERSION:
            raise NewerFormatError(
                f"checkpoint {folder} has format_version {version}, this program reads up to {FORMAT_VERSION}; "
                "update the program"
            )
        files = {name: FileEntry(int(e["size"]), str(e["sha256"])) for name, e in content["files"].items()}
        manifest = Manifest(
            step=int(content["step"]),
            sequence=int(content["sequence"]),
            files=files,
            vocabulary_sha256=_optional_text(content["vocabulary_sha256"]),
            config_sha256=_optional_text(content["config_sha256"]),
            metric=_optional_text(content.get("metric")),
            value=_optional_number(content.get("value")),
            yardstick=_optional_text(content.get("yardstick")),
        )
    except FormatError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {folder} is broken: {MANIFEST_FILE} cannot be read ({error})") from error
    _check_manifest(folder, manifest)
    return manifest


def _check_manifest(folder: Path, manifest: Manifest) -> None:
    """The rules that hold whoever wrote the manifest: no file but the known ones is ever opened."""
    for name, entry in manifest.files.items():
        if name not in _FILES:
            raise CheckpointError(
                f"checkpoint {folder} is broken: its manifest lists {name!r}, not a checkpoint's file"
            )
        if entry.size < 0 or not _SHA256.fullmatch(entry.sha256):
            raise CheckpointError(f"checkpoint {folder} is broken: its manifest has no valid size and sha256 of {name}")
    missing = [name for name in ("model.safetensors", STATE_FILE) if name not in manifest.files]
    if missing:
        raise CheckpointError(f"checkpoint {folder} is broken: its manifest does not list {missing[0]}")
    named = _NAME.fullmatch(folder.name)
    if named and int(named[1]) != manifest.step:
        raise CheckpointError(f"checkpoint {folder} is broken: its manifest is of step {manifest.step}")


def verify_checkpoint(folder: Path) -> Manifest:
    """Check every file against the manifest (size, sha256) and return it. Raises CheckpointError at the first fault."""
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():  # all sizes before the first content, which may take minutes to hash
        _verify_size(folder, name, entry)
    for name, entry in manifest.files.items():
        _verify_content(folder, name, entry)
    return manifest


def _verify_size(folder: Path, name: str, entry: FileEntry) -> None:
    size = regular_size(folder / name)
    if size != entry.size:
        raise CheckpointError(f"checkpoint {folder} is broken: {name} has {size} bytes instead of {entry.size}")


def _verify_content(folder: Path, name: str, entry: FileEntry) -> None:
    path = folder / name
    try:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder} is broken: {name} cannot be read ({error})") from error
    if found != entry.sha256:
        raise CheckpointError(f"checkpoint {folder} is broken: the content of {name} is not what was written (sha256)")


def read_checkpoint(folder: Path) -> LoadedCheckpoint:
    """Verify a checkpoint and load it whole into host memory."""
    manifest = verify_checkpoint(folder)
    parts = [part for part in TENSOR_PARTS if f"{part}.safetensors" in manifest.files]
    tensors = {part: _load_tensors(folder, part) for part in parts}
    try:
        state = cast(dict[str, Json], read_json(folder / STATE_FILE, "checkpoint state", FORMAT_VERSION))
    except FormatError as error:
        raise CheckpointError(f"checkpoint {folder} is broken: {error}") from error
    return LoadedCheckpoint(folder, manifest, tensors, state)


def read_part(folder: Path, part: str) -> tuple[Manifest, Tensors]:
    """Verify and load one part ("model", "ema", ...) alone. Raises CheckpointError where the checkpoint lacks it."""
    manifest = read_manifest(folder)
    name = f"{part}.safetensors"
    if name not in manifest.files:
        raise CheckpointError(f"checkpoint {folder} holds no {name}")
    _verify_size(folder, name, manifest.files[name])
    _verify_content(folder, name, manifest.files[name])
    return manifest, _load_tensors(folder, part)


def _load_tensors(folder: Path, part: str) -> Tensors:
    path = folder / f"{part}.safetensors"
    try:
        # Clones own their memory: a loaded file stays mapped as long as one of its tensors lives.
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {folder} is broken: {path.name} is not safetensors ({error})") from error
    bad = None if part not in _FINITE_PARTS else first_nonfinite(tensors)
    if bad is not None:
        raise CheckpointError(f"checkpoint {folder} is broken: {bad} in {path.name} is not finite")
    return tensors


def first_nonfinite(tensors: Tensors) -> str | None:
    """Name of the first tensor that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def refuse_nonfinite(parts: Mapping[str, Tensors], step: int) -> None:
    """Raise NotFiniteError where weights, averages or optimizer state are not finite."""
    for part in _FINITE_PARTS:
        bad = first_nonfinite(parts.get(part, {}))
        if bad is not None:
            raise NotFiniteError(
                f"{bad} ({part}) is not finite at step {step}: not saved, earlier checkpoints stay as they are"
            )


def regular_size(path: Path) -> int:
    """Size in bytes; refuses links, pipes and devices, which could lead elsewhere or never end."""
    try:
        status = path.lstat()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path.parent} is broken: {path.name} is missing ({error.strerror})"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"checkpoint {path.parent} is broken: {path.name} is not a regular file")
    return status.st_size


def _encode(content: Mapping[str, object]) -> bytes:
    return orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS) + b"\n"


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(_encode(content)).hexdigest()


def _optional_text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise ValueError(f"expected text, found {value!r}")


def _optional_number(value: object) -> float | None:
    if value is None or (isinstance(value, int | float) and math.isfinite(value)):
        return value
    raise ValueError(f"expected a number, found {value!r}")
