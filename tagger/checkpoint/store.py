"""The checkpoints of one run: which is newest, which is best, which go. Readers need no lock; a run has one writer.

`last.json` and `best.json` name checkpoints for people and tools. They are replaced after what they name is complete,
so the newest checkpoint is found by its manifest's sequence number and not through them. A broken checkpoint is never
used and never deleted.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tagger.checkpoint.format import (
    MANIFEST_FILE,
    CheckpointError,
    LoadedCheckpoint,
    Manifest,
    Tensors,
    list_checkpoints,
    read_checkpoint,
    read_manifest,
    verify_checkpoint,
)
from tagger.checkpoint.writer import CheckpointContent, remove_checkpoint, remove_temporaries, write_checkpoint
from tagger.files import FormatError, read_json, write_json

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
LAST_FILE = "last.json"
BEST_FILE = "best.json"


@dataclass(frozen=True)
class BestRecord:
    """What `best.json` says: a checkpoint's folder name, and the metric by its name and value that made it best."""

    checkpoint: str
    metric: str
    value: float
    step: int


def higher_is_better(metric: str) -> bool:
    """Losses go down, every other metric up."""
    return not metric.lower().endswith("loss")


def is_better(value: float, than: float | None, *, higher: bool, min_delta: float = 0.0) -> bool:
    """Whether a finite value beats the best so far (None before the first) by more than `min_delta`."""
    if not math.isfinite(value):
        return False
    if than is None:
        return True
    return value > than + min_delta if higher else value < than - min_delta


def read_best(folder: Path) -> BestRecord | None:
    """The record of the best checkpoint; None where there is none yet. Raises FormatError where it is unreadable."""
    path = folder / BEST_FILE
    if not path.exists():
        return None
    content = read_json(path, "record of the best checkpoint", FORMAT_VERSION)
    try:
        return BestRecord(
            str(content["checkpoint"]), str(content["metric"]), float(content["value"]), int(content["step"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"record of the best checkpoint {path} is incomplete ({error}); delete it") from error


def write_best(folder: Path, record: BestRecord) -> None:
    """Replace `best.json` atomically."""
    write_json(
        folder / BEST_FILE,
        {
            "format_version": FORMAT_VERSION,
            "checkpoint": record.checkpoint,
            "metric": record.metric,
            "value": record.value,
            "step": record.step,
        },
    )


def write_last(folder: Path, path: Path, step: int) -> None:
    """Replace `last.json` atomically."""
    write_json(folder / LAST_FILE, {"format_version": FORMAT_VERSION, "checkpoint": path.name, "step": step})


def newest_first(folder: Path) -> tuple[list[tuple[Path, Manifest]], list[CheckpointError]]:
    """Checkpoints whose manifest is whole, newest first, and what is wrong with the others."""
    whole: list[tuple[Path, Manifest]] = []
    broken: list[CheckpointError] = []
    for path in list_checkpoints(folder):
        try:
            whole.append((path, read_manifest(path)))
        except CheckpointError as error:
            broken.append(error)
    whole.sort(key=lambda each: (each[1].sequence, each[1].step), reverse=True)
    return whole, broken


def load_checkpoint(folder: Path, which: str) -> LoadedCheckpoint | None:
    """Load "latest", "best", or the checkpoint at a path (or of that name in `folder`), verified.

    Where the one asked for is broken, the newest good one is loaded instead and a warning says so; a path is taken at
    its word. None where `folder` holds no checkpoint at all; CheckpointError where none of those it holds is usable.
    """
    if which not in ("latest", "best"):
        return read_checkpoint(_named(folder, which))
    candidates, broken = newest_first(folder)
    faults = [str(error) for error in broken]
    paths = [path for path, _ in candidates]
    wanted = _wanted(folder, which, paths)
    if which == "best" and wanted in paths:
        paths = [wanted, *(path for path in paths if path != wanted)]
    found: LoadedCheckpoint | None = None
    for path in paths:
        try:
            found = read_checkpoint(path)
            break
        except CheckpointError as error:
            faults.append(str(error))
    if found is None:
        if faults:
            raise CheckpointError(f"none of the {len(faults)} checkpoints in {folder} is usable; {faults[0]}")
        return None
    if wanted is not None and found.path != wanted:
        faults.append(f"checkpoint {wanted} is recorded as {which} but cannot be used")
    for fault in faults:
        logger.warning("%s", fault)
    if faults:
        logger.warning("using %s, the newest good checkpoint (asked for: %s)", found.path, which)
    return found


def _named(folder: Path, which: str) -> Path:
    path = folder / which if (folder / which / MANIFEST_FILE).is_file() else Path(which)
    if not path.is_dir():
        choices = ", ".join(each.name for each in list_checkpoints(folder)[-3:])
        held = f"{folder} holds {choices}" if choices else f"{folder} holds no checkpoint"
        raise CheckpointError(f"there is no checkpoint folder {which} ({held}); use latest, best or a folder's path")
    return path


def _wanted(folder: Path, which: str, paths: list[Path]) -> Path | None:
    """The checkpoint that the records name; None where they name none, or one that the newest has overtaken."""
    if which == "best":
        record = read_best(folder)
        if record is None and paths:
            logger.warning("no checkpoint in %s is marked best yet; the newest one is used", folder)
        return folder / record.checkpoint if record is not None else None
    try:
        name = str(read_json(folder / LAST_FILE, "record of the last checkpoint", FORMAT_VERSION)["checkpoint"])
    except (FormatError, KeyError):
        return None
    # A crash between writing a checkpoint and writing last.json leaves the latter one behind; that is no fault.
    return None if folder / name in paths else folder / name


def prune(folder: Path, keep_last: int) -> list[Path]:
    """Delete all but the newest `keep_last` steps and the best checkpoint; returns what went.

    Only after the newest is known to be good. Several checkpoints of one step count once, the newest standing.
    """
    record = read_best(folder)
    candidates, _ = newest_first(folder)
    kept: set[int] = set()
    removed: list[Path] = []
    for path, manifest in candidates:
        if len(kept) < keep_last and manifest.step not in kept:
            kept.add(manifest.step)
        elif record is None or path.name != record.checkpoint:
            remove_checkpoint(path)
            removed.append(path)
    return removed


class CheckpointStore:
    """The writer's side of a folder of checkpoints. Everything but `commit` belongs to the thread that made it.

    Refuses to commit weights that are not finite, and to load a checkpoint of another vocabulary.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int,
        best_metric: str,
        vocabulary_sha256: str | None = None,
        config_sha256: str | None = None,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last} is below 1; the newest checkpoint is always kept")
        self.folder = folder
        self.keep_last = keep_last
        self.best_metric = best_metric
        self.vocabulary_sha256 = vocabulary_sha256
        self.config_sha256 = config_sha256
        stray = remove_temporaries(folder)
        if stray:
            logger.info("%s: removed %d unfinished checkpoint(s) of an interrupted run", folder, stray)
        self._next_sequence = 1 + max((manifest.sequence for _, manifest in newest_first(folder)[0]), default=0)
        self.best = self._recorded_best()

    def _recorded_best(self) -> BestRecord | None:
        record = read_best(self.folder)
        if record is None:
            return None
        if record.metric != self.best_metric:
            logger.warning(
                "the best checkpoint (%s) was chosen by %s, this run chooses by %s: the best starts afresh",
                record.checkpoint,
                record.metric,
                self.best_metric,
            )
            return None
        if not (self.folder / record.checkpoint).is_dir():
            logger.warning("the best checkpoint (%s) is gone: the best starts afresh", record.checkpoint)
            return None
        return record

    def is_better(self, value: float, than: float | None) -> bool:
        """Whether a value of the deciding metric beats another."""
        return is_better(value, than, higher=higher_is_better(self.best_metric))

    def commit(self, step: int, tensors: Mapping[str, Tensors], state: bytes, value: float | None = None) -> Path:
        """Write a checkpoint, read it back, record it, and only then delete what has become old.

        `value` of the deciding metric makes it the best one where it beats the best on disk.
        """
        started = time.monotonic()
        for part in ("model", "ema"):
            _refuse_nonfinite(tensors.get(part, {}), step)
        content = CheckpointContent(
            step, self._next_sequence, tensors, state, self.vocabulary_sha256, self.config_sha256
        )
        path = write_checkpoint(self.folder, content)
        self._next_sequence += 1
        verify_checkpoint(path)
        is_best = value is not None and self.is_better(value, None if self.best is None else self.best.value)
        if value is not None and is_best:
            record = BestRecord(path.name, self.best_metric, value, step)
            write_best(self.folder, record)
            self.best = record
        write_last(self.folder, path, step)
        prune(self.folder, self.keep_last)
        logger.info(
            "saved %s%s in %.1f s", path.name, ", the best so far," if is_best else "", time.monotonic() - started
        )
        return path

    def load(self, which: str) -> LoadedCheckpoint | None:
        """`load_checkpoint` of this folder, for a run of this vocabulary; a changed configuration is logged."""
        loaded = load_checkpoint(self.folder, which)
        if loaded is None:
            return None
        found, here = loaded.manifest.vocabulary_sha256, self.vocabulary_sha256
        if found is not None and here is not None and found != here:
            raise CheckpointError(
                f"checkpoint {loaded.path} is of another vocabulary ({found[:12]}) than this run ({here[:12]}); its "
                "outputs mean other tags: use the vocabulary it was trained with, or start a new run"
            )
        if loaded.manifest.config_sha256 != self.config_sha256:
            logger.info("the configuration differs from the one that %s was saved with", loaded.path.name)
        return loaded


def _refuse_nonfinite(tensors: Tensors, step: int) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{name} is not finite at step {step}: not saved, earlier checkpoints stay as they are"
            )
