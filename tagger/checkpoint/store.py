"""The checkpoints of one run: which is newest, which is best, which go. Readers need no lock; a run has one writer.

`last.json` and `best.json` name checkpoints for people and tools. They are replaced after what they name is complete,
so the newest checkpoint is found by its manifest's sequence number, and the best one, where its record is lost, by the
scores in the manifests. A broken checkpoint is never used and never deleted.
"""

import difflib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tagger.checkpoint.format import (
    MANIFEST_FILE,
    CheckpointError,
    LoadedCheckpoint,
    Manifest,
    NoneUsableError,
    Tensors,
    is_checkpoint_name,
    list_checkpoints,
    read_checkpoint,
    read_manifest,
    refuse_nonfinite,
    regular_size,
    verify_checkpoint,
)
from tagger.checkpoint.retention import SavePolicy
from tagger.checkpoint.writer import (
    CheckpointContent,
    fsync_folder,
    remove_checkpoint,
    remove_temporaries,
    write_checkpoint,
)
from tagger.files import FormatError, NewerFormatError, read_json, write_json

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
    yardstick: str | None = None  # hash of what it was scored with; values of two yardsticks do not compare


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
    _refuse_irregular(path)
    content = read_json(path, "record of the best checkpoint", FORMAT_VERSION)
    try:
        record = BestRecord(
            str(content["checkpoint"]),
            str(content["metric"]),
            float(content["value"]),
            int(content["step"]),
            None if content.get("yardstick") is None else str(content["yardstick"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"record of the best checkpoint {path} is incomplete ({error})") from error
    if not is_checkpoint_name(record.checkpoint):
        raise FormatError(f"record of the best checkpoint {path} names {record.checkpoint!r}, which is none")
    return record


def _refuse_irregular(path: Path) -> None:
    try:
        regular_size(path)
    except CheckpointError as error:
        raise FormatError(f"record {path} is not a regular file") from error


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
            "yardstick": record.yardstick,
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


def find_best(
    folder: Path,
    candidates: Sequence[tuple[Path, Manifest]],
    metric: str | None = None,
    yardstick: str | None = None,
) -> BestRecord | None:
    """The best checkpoint by its record and, where that is lost, wrong or behind, by the scores in the manifests.

    `candidates` as `newest_first` gives them. `metric` and `yardstick`: those to choose by; without a metric, both are
    those of the record or of the newest score. What is wrong with the record is logged. Raises NewerFormatError for one
    of a newer program.
    """
    best_of = _best_of_each(candidates)
    manifests = {path.name: manifest for path, manifest in candidates}
    record: BestRecord | None = None
    try:
        record = read_best(folder)
        fault = None if record is None else _fault_of(record, manifests, metric, yardstick)
    except NewerFormatError:
        raise
    except FormatError as error:
        fault = str(error)
    if record is not None and fault is None:
        found = best_of.get((record.metric, record.yardstick))
        higher = higher_is_better(record.metric)
        # A crash after a better checkpoint was written, before it was recorded, leaves the record behind.
        return found if found is not None and is_better(found.value, record.value, higher=higher) else record
    scored = ((manifest.metric, manifest.yardstick) for _, manifest in candidates if manifest.value is not None)
    found = best_of.get((metric, yardstick) if metric is not None else next(scored, (None, None)))
    if fault is not None:
        then = "the best starts afresh" if found is None else f"by its score {found.checkpoint} is the best"
        logger.warning("%s: %s", fault, then)
    return found


def _fault_of(
    record: BestRecord, manifests: Mapping[str, Manifest], metric: str | None, yardstick: str | None
) -> str | None:
    name = record.checkpoint
    if metric not in (None, record.metric):
        return f"the best checkpoint ({name}, which stays) was chosen by {record.metric}, this run chooses by {metric}"
    if metric is not None and record.yardstick != yardstick:
        return (
            f"the best checkpoint ({name}, which stays) has {metric} {record.value:.4f} on other held-out images, or "
            "with other tags of theirs or settings of validation"
        )
    if name not in manifests:
        return f"the best checkpoint ({name}) is gone or broken"
    manifest = manifests[name]
    if manifest.value is not None and (manifest.metric, manifest.value) != (record.metric, record.value):
        return f"{BEST_FILE} says {record.metric} {record.value} of {name}, its manifest {manifest.value}"
    return None


def _best_of_each(
    candidates: Sequence[tuple[Path, Manifest]],
) -> dict[tuple[str | None, str | None], BestRecord]:
    """By the scores in the manifests, the best checkpoint for each metric and yardstick that a score is of."""
    best: dict[tuple[str | None, str | None], BestRecord] = {}
    for path, manifest in reversed(candidates):
        metric, value, key = manifest.metric, manifest.value, (manifest.metric, manifest.yardstick)
        if metric is None or value is None:
            continue
        if is_better(value, best[key].value if key in best else None, higher=higher_is_better(metric)):
            best[key] = BestRecord(path.name, metric, value, manifest.step, manifest.yardstick)
    return best


def load_checkpoint(folder: Path, which: str, best: BestRecord | None = None) -> LoadedCheckpoint | None:
    """Load "latest", "best", or the checkpoint at a path (or of that name in `folder`), verified.

    `best`: where it is known already; None: as `find_best` finds it. Where the one asked for is broken, the newest good
    one is loaded instead and a warning says so; a path is taken at its word. None where `folder` holds no checkpoint at
    all; CheckpointError where none of those it holds is usable.
    """
    if which not in ("latest", "best"):
        return read_checkpoint(named_checkpoint(folder, which))
    candidates, broken = newest_first(folder)
    faults = [str(error) for error in broken]
    paths = [path for path, _ in candidates]
    wanted = folder / best.checkpoint if which == "best" and best is not None else _wanted(folder, which, candidates)
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
            raise NoneUsableError(
                f"none of the {len(faults)} checkpoints in {folder} is usable; {faults[0]}; bring one back from a "
                "copy, or start another run (run.name=), with --init-from where you have a copy of its weights"
            )
        return None
    if wanted is not None and found.path != wanted:
        faults.append(f"checkpoint {wanted} is recorded as {which} but cannot be used")
    for fault in faults:
        logger.warning("%s", fault)
    if faults:
        logger.warning("using %s, the newest good checkpoint (asked for: %s)", found.path, which)
    return found


def named_checkpoint(folder: Path, which: str) -> Path:
    """The checkpoint at a path, or of that name in `folder`. Raises CheckpointError where there is none."""
    path = folder / which if (folder / which / MANIFEST_FILE).is_file() else Path(which)
    for run in (path, folder.parent.parent / which):
        if list_checkpoints(run / folder.name):
            meant = f"run.name={run.name} --resume latest"
            raise CheckpointError(f"{which} is a run, not a checkpoint; did you mean {meant}?")
    if not path.is_dir():
        close = difflib.get_close_matches(which, ("latest", "best", "auto", "none"), n=1)
        guess = f"did you mean {close[0]}? " if close else ""
        choices = ", ".join(each.name for each in list_checkpoints(folder)[-3:])
        held = f"{folder} holds {choices}" if choices else f"{folder} holds no checkpoint"
        raise CheckpointError(f"there is no checkpoint folder {which} ({held}); {guess}use latest, best or a path")
    return path


def _wanted(folder: Path, which: str, candidates: Sequence[tuple[Path, Manifest]]) -> Path | None:
    """The checkpoint that the records name; None where they name none, or one that the newest has overtaken."""
    if which == "best":
        record = find_best(folder, candidates)
        if record is None and candidates:
            logger.warning("no checkpoint in %s is marked best yet; the newest one is used", folder)
        return folder / record.checkpoint if record is not None else None
    try:
        _refuse_irregular(folder / LAST_FILE)
        name = str(read_json(folder / LAST_FILE, "record of the last checkpoint", FORMAT_VERSION)["checkpoint"])
    except (FormatError, KeyError):
        return None
    # A crash between writing a checkpoint and writing last.json leaves the latter one behind; that is no fault.
    return None if not is_checkpoint_name(name) or name in {path.name for path, _ in candidates} else folder / name


class CheckpointStore:
    """The writer's side of a folder of checkpoints. Everything but `commit` belongs to the thread that made it.

    Refuses to commit a state that is not finite, and to load a checkpoint of another vocabulary. `best` is the best
    checkpoint on disk, `commits` counts those that were written and read back, `newest_step` is the step of the last.

    `yardstick` is the hash of what scores are measured with: the held-out images, their tags, the settings of
    validation. Scores of another one are not compared with; the best checkpoint of each is kept.
    """

    def __init__(
        self,
        folder: Path,
        policy: SavePolicy,
        best_metric: str,
        vocabulary_sha256: str | None = None,
        config_sha256: str | None = None,
        yardstick: str | None = None,
    ) -> None:
        self.folder = folder
        self.policy = policy
        self.best_metric = best_metric
        self.vocabulary_sha256 = vocabulary_sha256
        self.config_sha256 = config_sha256
        self.yardstick = yardstick
        stray = remove_temporaries(folder)
        if stray:
            logger.info("%s: removed %d unfinished file(s) of an interrupted run", folder, stray)
        candidates, _ = newest_first(folder)
        self._next_sequence = 1 + max((manifest.sequence for _, manifest in candidates), default=0)
        self.best = find_best(folder, candidates, best_metric, yardstick)
        self.commits = 0
        self.newest_step: int | None = None

    def is_better(self, value: float, than: float | None) -> bool:
        """Whether a value of the deciding metric beats another."""
        return is_better(value, than, higher=higher_is_better(self.best_metric))

    def commit(self, step: int, tensors: Mapping[str, Tensors], state: bytes, value: float | None = None) -> Path:
        """Write a checkpoint, read it back, record it, and only then delete what has become old.

        `value` of the deciding metric makes it the best one where it beats the best on disk. An error after `commits`
        has grown is one of the records or of deleting: the checkpoint itself is safe.
        """
        started = time.monotonic()
        refuse_nonfinite(tensors, step)
        scored = value is not None and math.isfinite(value)
        content = CheckpointContent(
            step,
            self._next_sequence,
            tensors,
            state,
            self.vocabulary_sha256,
            self.config_sha256,
            self.best_metric if scored else None,
            value if scored else None,
            self.yardstick if scored else None,
        )
        self._next_sequence += 1
        path = write_checkpoint(self.folder, content)
        verify_checkpoint(path)
        self.commits += 1
        self.newest_step = step
        is_best = value is not None and self.is_better(value, None if self.best is None else self.best.value)
        if value is not None and is_best:
            self.best = BestRecord(path.name, self.best_metric, value, step, self.yardstick)
        try:
            self._record(path, step)
        finally:
            self._prune()  # also where the records failed: on a full disk this is what makes room
        logger.info(
            "saved %s%s in %.1f s", path.name, ", the best so far," if is_best else "", time.monotonic() - started
        )
        return path

    def _record(self, path: Path, step: int) -> None:
        if self.best is not None and self.best != self._best_on_disk():
            write_best(self.folder, self.best)
        write_last(self.folder, path, step)
        # The names must be durable before what the old ones stood for goes.
        fsync_folder(self.folder)

    def _best_on_disk(self) -> BestRecord | None:
        try:
            return read_best(self.folder)
        except FormatError:
            return None

    def _prune(self) -> None:
        """Delete what the policy lets go. The newest checkpoint has been read back when this is called."""
        candidates, _ = newest_first(self.folder)
        records = (self.best, self._best_on_disk(), *_best_of_each(candidates).values())
        protected = {record.checkpoint for record in records if record is not None}
        for name in self.policy.removable([(path.name, manifest.step) for path, manifest in candidates], protected):
            remove_checkpoint(self.folder / name)

    def load(self, which: str) -> LoadedCheckpoint | None:
        """`load_checkpoint` of this folder, for a run of this vocabulary; a changed configuration is logged."""
        loaded = load_checkpoint(self.folder, which, self.best)
        if loaded is None:
            return None
        found, here = loaded.manifest.vocabulary_sha256, self.vocabulary_sha256
        if found is not None and here is not None and found != here:
            raise CheckpointError(
                f"checkpoint {loaded.path} is of another vocabulary ({found[:12]}) than this run ({here[:12]}); its "
                "outputs mean other tags: use the vocabulary it was trained with, or start a new run with --init-from, "
                "which carries over the tags that both know"
            )
        if loaded.manifest.config_sha256 != self.config_sha256:
            logger.info("the configuration differs from the one that %s was saved with", loaded.path.name)
        return loaded
