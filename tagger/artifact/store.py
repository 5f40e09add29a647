"""A model folder: written whole or not at all, and read only when its parts belong together.

    model.safetensors   the weights
    config.json         architecture, dimensions, threshold, where it comes from, and a hash of each of the other parts
    vocabulary.json     the tags in the order of the outputs
    preprocess.json     how an image becomes the model's input
    selected_tags.csv   the tags for other programs; not read here
    ontology.json       what the tags mean to each other; only where the run was given an ontology
    thresholds.json     each tag's threshold, bound to the weights; only where calibration images were held out

Refuses a folder whose parts were exchanged, changed or damaged after they were written, and one of a newer version.
"""

import contextlib
import hashlib
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import orjson
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tagger.artifact.tags import TagRow, read_tags, tags_sha256, tags_table
from tagger.checkpoint.format import write_tensors
from tagger.checkpoint.writer import fsync_folder
from tagger.files import FormatError, read_json
from tagger.metrics.thresholds import TagThresholds
from tagger.module_state import clean_name
from tagger.ontology import ONTOLOGY_FILE, Ontology
from tagger.ontology_file import read_ontology
from tagger.preprocess import Preprocess

FORMAT_VERSION = 1
ARCHITECTURE = "vit"

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
VOCABULARY_FILE = "vocabulary.json"
PREPROCESS_FILE = "preprocess.json"
TABLE_FILE = "selected_tags.csv"
THRESHOLDS_FILE = "thresholds.json"
_HASHED = (WEIGHTS_FILE, VOCABULARY_FILE, PREPROCESS_FILE)


class ArtifactMetadata(TypedDict):
    """Where a model comes from and how its scores are read."""

    run: str
    step: int
    threshold: float
    """The score, 0..1, at or above which a tag counts as present where there is no threshold of its own."""
    vocabulary_sha256: str
    metric: str | None
    """The validation score that chose these weights, e.g. "val/mAP"; None where none did."""
    metric_value: float | None
    exclusive_ratings: NotRequired[bool]
    """Whether the rating tags were trained to exclude each other (softmax over them instead of a sigmoid each)."""


@dataclass(frozen=True)
class Artifact:
    """A model as it left its run; `weights` and `model_config` are what the model's builder takes."""

    folder: Path
    weights: dict[str, Tensor]
    architecture: str
    model_config: dict[str, object]
    tags: tuple[TagRow, ...]
    vocabulary_sha256: str
    preprocess: Preprocess
    metadata: ArtifactMetadata
    weights_sha256: str
    ontology: Ontology | None = None
    thresholds: TagThresholds | None = None

    @property
    def threshold(self) -> float:
        """The score, 0..1, at or above which a tag counts as present where there is no threshold of its own."""
        return self.metadata["threshold"]


def save_artifact(
    folder: Path,
    *,
    weights: Mapping[str, Tensor],
    model_config: Mapping[str, object],
    tags: Sequence[TagRow],
    vocabulary_file: Path,
    preprocess_json: Mapping[str, object],
    metadata: ArtifactMetadata,
    ontology_file: Path | None = None,
) -> None:
    """Write a model folder, replacing an older one; a reader finds the old model or the new one.

    Raises ValueError when the parts do not belong together, OSError when the disk does not take them (the older model
    then stays).
    """
    _check_parts(model_config, tags, vocabulary_file, metadata)
    with _new_folder(folder) as temporary:
        hashes = {
            WEIGHTS_FILE: _write_weights(temporary / WEIGHTS_FILE, weights),
            VOCABULARY_FILE: _write(temporary / VOCABULARY_FILE, vocabulary_file.read_bytes()),
            PREPROCESS_FILE: _write(temporary / PREPROCESS_FILE, _json(preprocess_json)),
            TABLE_FILE: _write(temporary / TABLE_FILE, tags_table(tags)),
        }
        if ontology_file is not None:
            hashes[ONTOLOGY_FILE] = _write(temporary / ONTOLOGY_FILE, ontology_file.read_bytes())
        config = {
            "format_version": FORMAT_VERSION,
            "architecture": ARCHITECTURE,
            "num_classes": len(tags),
            "model_args": dict(model_config),
            **metadata,
            "files_sha256": hashes,
        }
        _write(temporary / CONFIG_FILE, _json(config))


def attach_thresholds(folder: Path, thresholds: TagThresholds) -> None:
    """Put thresholds into a model folder, in place of older ones; a reader finds the old model or the new one.

    The one for all tags together becomes the model's `threshold`. Raises FormatError where they are of another model.
    """
    artifact = load_artifact(folder)
    thresholds.require_model("the thresholds", artifact.weights_sha256, artifact.vocabulary_sha256)
    config = read_json(artifact.folder / CONFIG_FILE, "model configuration", FORMAT_VERSION)
    with _new_folder(folder) as temporary:
        for path in folder.iterdir():
            if path.is_file() and path.name not in (CONFIG_FILE, THRESHOLDS_FILE):
                _copy(path, temporary / path.name)
        written = _write(temporary / THRESHOLDS_FILE, thresholds.to_json())
        config["files_sha256"] = {**config["files_sha256"], THRESHOLDS_FILE: written}
        _write(temporary / CONFIG_FILE, _json({**config, "threshold": thresholds.global_probability}))


def load_artifact(folder: Path) -> Artifact:
    """Read a model folder; FormatError says what is missing, damaged, newer or does not belong to the rest."""
    older = _set_aside(folder)
    if not folder.is_dir() and older.is_dir():
        folder = older
    config = read_json(folder / CONFIG_FILE, "model configuration", FORMAT_VERSION)
    try:
        written = config["files_sha256"]
        optional = [name for name in (ONTOLOGY_FILE, THRESHOLDS_FILE) if name in written]
        hashes = {name: str(written[name]) for name in (*_HASHED, *optional)}
        model_config = dict(config["model_args"])
        num_classes = int(config["num_classes"])
        architecture = str(config["architecture"])
        metadata = _read_metadata(config)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{folder / CONFIG_FILE} is not complete ({error}); export the model anew") from error
    for name, expected in hashes.items():
        if _sha256(folder / name) != expected:
            raise FormatError(
                f"{folder / name} is not the file that was written with this model (sha256); take the run's own copy"
            )
    tags = read_tags(folder / VOCABULARY_FILE)
    if len(tags) != num_classes or tags_sha256(tags) != metadata["vocabulary_sha256"]:
        raise FormatError(
            f"{folder / VOCABULARY_FILE} has {len(tags)} tags and another vocabulary than the model, which has "
            f"{num_classes}; take the run's own copy"
        )
    thresholds = None
    if THRESHOLDS_FILE in hashes:
        thresholds = read_thresholds(folder / THRESHOLDS_FILE, hashes[WEIGHTS_FILE], metadata["vocabulary_sha256"])
    return Artifact(
        folder=folder,
        weights=_read_weights(folder / WEIGHTS_FILE),
        architecture=architecture,
        model_config=model_config,
        tags=tags,
        vocabulary_sha256=metadata["vocabulary_sha256"],
        preprocess=Preprocess.load(folder / PREPROCESS_FILE),
        metadata=metadata,
        weights_sha256=hashes[WEIGHTS_FILE],
        ontology=read_ontology(folder / ONTOLOGY_FILE) if ONTOLOGY_FILE in hashes else None,
        thresholds=thresholds,
    )


def read_thresholds(path: Path, weights_sha256: str, vocabulary_sha256: str) -> TagThresholds:
    """Thresholds of the model with these hashes; FormatError for those of another, and for a file that is none."""
    thresholds = TagThresholds.load(path)
    thresholds.require_model(f"thresholds {path}", weights_sha256, vocabulary_sha256)
    return thresholds


def _check_parts(
    model_config: Mapping[str, object], tags: Sequence[TagRow], vocabulary_file: Path, metadata: ArtifactMetadata
) -> None:
    if model_config.get("num_tags") != len(tags):
        raise ValueError(f"the model has {model_config.get('num_tags')} outputs and {len(tags)} tags were given")
    sha256 = tags_sha256(tags)
    if sha256 != metadata["vocabulary_sha256"] or sha256 != tags_sha256(read_tags(vocabulary_file)):
        raise ValueError(f"the tags, {vocabulary_file} and the model's vocabulary_sha256 do not belong together")
    if not 0 <= metadata["threshold"] <= 1:
        raise ValueError(f"threshold={metadata['threshold']} is not between 0 and 1; it is a probability, e.g. 0.5")


def _read_metadata(config: Mapping[str, object]) -> ArtifactMetadata:
    threshold, value = config["threshold"], config["metric_value"]
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold {threshold!r} is not between 0 and 1")
    return ArtifactMetadata(
        run=str(config["run"]),
        step=int(cast(int, config["step"])),
        threshold=float(threshold),
        vocabulary_sha256=str(config["vocabulary_sha256"]),
        metric=None if config["metric"] is None else str(config["metric"]),
        metric_value=float(value) if isinstance(value, int | float) and math.isfinite(value) else None,
        exclusive_ratings=bool(config.get("exclusive_ratings", False)),
    )


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name of `folder` once it is whole and on the disk; removed where it is not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _settle(folder)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        fsync_folder(temporary)
        _replace_folder(folder, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(folder.parent)


def _set_aside(folder: Path) -> Path:
    """Where the older model is while the new one takes its name: a folder cannot be replaced in one operation."""
    return folder.with_name(f".{folder.name}.old")


def _replace_folder(folder: Path, temporary: Path) -> None:
    older = _set_aside(folder)
    if not folder.exists():
        temporary.rename(folder)
        return
    folder.rename(older)
    try:
        temporary.rename(folder)
    except OSError:
        older.rename(folder)
        raise
    shutil.rmtree(older, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Finish or clear away what a process that was killed here left."""
    older = _set_aside(folder)
    if older.is_dir() and not folder.exists():
        older.rename(folder)
    for stray in (older, *folder.parent.glob(f".{folder.name}.*.tmp")):
        shutil.rmtree(stray, ignore_errors=True)


def _write_weights(path: Path, weights: Mapping[str, Tensor]) -> str:
    # Under the plain model's names: a compiled model wraps them, and then loads nowhere else.
    tensors = {clean_name(name): tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with path.open("xb") as stream:
        entry = write_tensors(stream, tensors)
        stream.flush()
        os.fsync(stream.fileno())
    return entry.sha256


def _write(path: Path, content: bytes) -> str:
    with path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return hashlib.sha256(content).hexdigest()


def _copy(path: Path, target: Path) -> None:
    with path.open("rb") as source, target.open("xb") as stream:
        shutil.copyfileobj(source, stream, 1 << 20)
        stream.flush()
        os.fsync(stream.fileno())


def _json(content: Mapping[str, object]) -> bytes:
    return orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise FormatError(f"{path} is missing; take the run's own copy") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        # Clones own their memory: a loaded file stays mapped, and on Windows locked, while one of its tensors lives.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise FormatError(f"{path} is not safetensors ({error}); take the run's own copy") from error
