"""One run, one folder: where everything of a run lies, who may write there, and how the run went (`results.json`).

Refuses a folder that exists unless the run is continued, and a folder in which another process is at work.
"""

import contextlib
import difflib
import errno
import logging
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import get_args

from tagger.checkpoint.format import list_checkpoints
from tagger.checkpoint.store import named_checkpoint
from tagger.data.scan import printable
from tagger.endings import KILLED_REASON, Status
from tagger.errors import PATH_ERRORS, InputError, LostFolderError
from tagger.files import FormatError, read_json, write_atomic, write_json
from tagger.logs import RunLogHandler
from tagger.ontology import ONTOLOGY_FILE
from tagger.run_lock import FolderLock, LockedError, is_held

FORMAT_VERSION = 1

logger = logging.getLogger(__name__)

_NAMES_SHOWN = 5


class RunFolderError(InputError):
    """A run folder that may not be used as asked; the message is one line that says what to do."""


@dataclass(frozen=True)
class BestResult:
    """The best validation of a run: `metric` names the scalar, `step` counts optimizer steps."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True)
class RunResults:
    """How a run went so far; `exit_code` is None while it runs.

    Numbers that are not finite are stored, and read again, as None.
    """

    status: Status
    best: BestResult | None = None
    final: Mapping[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0
    images_per_second: float | None = None
    steps: int = 0
    commit: str | None = None
    vocabulary_sha256: str | None = None
    error: str | None = None
    exit_code: int | None = None
    format_version: int = FORMAT_VERSION

    def write(self, path: Path) -> None:
        """Replace `results.json` atomically; while the run goes on, without waiting for the disk."""
        content = asdict(self)
        durable = self.status != "running"
        write_json(path, {"format_version": content.pop("format_version"), **content}, durable=durable)

    @classmethod
    def read(cls, path: Path) -> "RunResults":
        """Raises FormatError when the file is missing, damaged or newer than this program."""
        content = read_json(path, "results", FORMAT_VERSION)
        try:
            if content["status"] not in get_args(Status):
                raise ValueError(f"status {content['status']!r}")
            best = content["best"]
            return cls(
                status=content["status"],
                best=None if best is None else BestResult(best["metric"], best["value"], best["step"]),
                final=dict(content["final"]),
                seconds=float(content["seconds"]),
                images_per_second=content["images_per_second"],
                steps=int(content["steps"]),
                commit=content["commit"],
                vocabulary_sha256=content["vocabulary_sha256"],
                error=content["error"],
                exit_code=content.get("exit_code"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"results {path} cannot be read ({error}); delete it, or restore it from a copy"
            ) from error


class RunFolder:
    """A run's folder, locked and with its `train.log` open until `close` (or the end of a `with` block).

    Everything logged by this process goes to `train.log` meanwhile, tracebacks included.
    """

    def __init__(self, path: Path, lock: FolderLock | None, is_new: bool) -> None:
        """lock: None for a process that only reads here."""
        self.path = path
        self.is_new = is_new
        self._lock = lock
        self._log_handler: RunLogHandler | None = None
        if lock is None:
            return
        self._log_handler = RunLogHandler(self.log_path)
        root = logging.getLogger()
        root.setLevel(min(root.level, logging.INFO))
        root.addHandler(self._log_handler)

    @classmethod
    def open(cls, path: Path, resume: bool) -> "RunFolder":
        """Make and lock the folder; with `resume` it may exist already. Raises RunFolderError otherwise."""
        try:
            path.mkdir(parents=True)
            is_new = True
        except FileExistsError as error:
            if not path.is_dir():
                raise RunFolderError(f"{path} is a file; a run needs a folder of that name") from error
            if not resume:
                raise RunFolderError(
                    f"{path} already exists ({describe_run(path)}); {_way_on(path)}, "
                    f"or start another run with run.name={_free_name(path)}"
                ) from error
            is_new = False
        except OSError as error:
            if error.errno not in PATH_ERRORS:
                raise
            raise RunFolderError(
                f"run.output_dir: cannot make {path}: {error.strerror}; name another folder with run.output_dir="
            ) from error
        try:
            lock = FolderLock(lock_path(path))
        except LockedError as error:
            raise RunFolderError(
                f"{path}: {error}; wait for it or stop it, or start another run with run.name={_free_name(path)} "
                f"(if that process is surely gone, delete {lock_path(path)})"
            ) from error
        return cls(path, lock, is_new)

    @classmethod
    def beside(cls, path: Path) -> "RunFolder":
        """The folder that another process of this run has open: to read there, and to name what it writes."""
        return cls(path, None, is_new=False)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return config_path(self.path)

    @property
    def log_path(self) -> Path:
        """What happened, in words."""
        return self.path / "train.log"

    @property
    def metrics_path(self) -> Path:
        """What was measured, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard_dir(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints_dir(self) -> Path:
        """What the run continues from."""
        return checkpoints_dir(self.path)

    @property
    def vocabulary_path(self) -> Path:
        """The tags in the order of the model's outputs."""
        return self.path / "vocabulary.json"

    @property
    def ontology_path(self) -> Path:
        """What the tags mean to each other; only where the run was given an ontology."""
        return self.path / ONTOLOGY_FILE

    @property
    def quarantine_path(self) -> Path:
        """Images that cannot be decoded; see tagger/data/quarantine_log.py."""
        return self.path / "quarantine.jsonl"

    @property
    def results_path(self) -> Path:
        """How the run went."""
        return results_path(self.path)

    @property
    def stop_path(self) -> Path:
        """A file of this name asks the run to stop."""
        return self.path / "STOP"

    @property
    def diverged_path(self) -> Path:
        """Which images the run met when it diverged."""
        return self.path / "diverged.json"

    @property
    def model_dir(self) -> Path:
        """The artifact that prediction reads."""
        return model_dir(self.path)

    def require_ours(self) -> None:
        """Raise LostFolderError where the folder was deleted or replaced: nothing may be written into another run."""
        loss = None if self._lock is None else self._lock.loss()
        if loss is not None:
            raise LostFolderError(
                f"the run's folder was deleted, replaced or taken over while it trained ({loss}); "
                "nothing more is written there"
            )

    def close(self) -> None:
        """Close `train.log` and let go of the lock; a second call does nothing."""
        if self._log_handler is not None:
            logging.getLogger().removeHandler(self._log_handler)
            self._log_handler.close()
        if self._lock is not None:
            self._lock.release()

    def discard_if_new(self) -> None:
        """Close, and remove a folder that this process made: a start that was refused leaves nothing behind."""
        ours = self._lock is not None and self._lock.loss() is None
        self.close()
        if self.is_new and ours:
            shutil.rmtree(self.path)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def lock_path(run: Path) -> Path:
    """The lock of the run in folder `run`."""
    return run / "run.lock"


def config_path(run: Path) -> Path:
    """The resolved configuration of the run in folder `run`."""
    return run / "config.yaml"


def checkpoints_dir(run: Path) -> Path:
    """The checkpoints of the run in folder `run`."""
    return run / "checkpoints"


def results_path(run: Path) -> Path:
    """`results.json` of the run in folder `run`."""
    return run / "results.json"


def model_dir(run: Path) -> Path:
    """The artifact of the run in folder `run`."""
    return run / "model"


def read_results(run: Path) -> RunResults:
    """How the run in folder `run` stands: as its file says, but "killed" where that says running and no process does.

    A process of another host is believed to run. Raises FormatError as `RunResults.read` does.
    """
    held = is_held(lock_path(run))  # first: a run that ends meanwhile has then written how
    results = RunResults.read(results_path(run))
    if results.status != "running" or held:
        return results
    return replace(results, status="killed", error=KILLED_REASON)


def describe_run(run: Path) -> str:
    """How the run in folder `run` stands, for people: "completed, step 900"."""
    with contextlib.suppress(FormatError, OSError):
        results = read_results(run)
        return f"{results.status}, step {results.steps}"
    return "no results yet"


def require_model(run: Path) -> Path:
    """The model folder of the run in folder `run`. Raises InputError, saying how it stands, where there is none yet."""
    if not model_dir(run).is_dir():
        raise InputError(f"run {printable(run)} has no model yet ({describe_run(run)}); it is written when it ends")
    return model_dir(run)


def require_checkpoints(run: Path) -> None:
    """Raise RunFolderError where the run in folder `run` has nothing to resume, naming the runs that have."""
    if list_checkpoints(checkpoints_dir(run)):
        return
    if run.is_dir():
        raise RunFolderError(f"{run} has no checkpoint to resume ({describe_run(run)}); {_way_on(run)}")
    places = run.parent.iterdir() if run.parent.is_dir() else ()
    names = sorted(path.name for path in places if list_checkpoints(checkpoints_dir(path)))
    close = difflib.get_close_matches(run.name, names, n=_NAMES_SHOWN)
    shown = [*close, *(name for name in names if name not in close)][:_NAMES_SHOWN]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    guess = f"did you mean run.name={close[0]}? " if close else ""
    listed = f"{guess}{run.parent} has {', '.join(shown) or 'no run with checkpoints'}{more}"
    raise RunFolderError(f"there is no run {run} to resume; {listed}; to start a new run of this name: --resume auto")


def _require_nothing_lost(run: Path) -> None:
    """Raise RunFolderError where a run without a checkpoint must have had one, as with a disk that is not mounted.

    A run that was killed, or failed, before its first save has lost nothing: it may start over.
    """
    folder = checkpoints_dir(run)
    if list_checkpoints(folder):
        return
    try:
        results = RunResults.read(results_path(run))
    except FormatError:
        results = RunResults("running")
    saved = results.best is not None or (results.steps and results.status in ("completed", "stopped"))
    trained = results.steps or _has_content(run / "metrics.jsonl")
    if saved or (trained and not folder.exists()):
        raise RunFolderError(
            f"{run} has trained ({describe_run(run)}), but {folder} "
            f"{'holds no checkpoint' if folder.exists() else 'is missing'}: a fresh start would erase its history; "
            f"bring the checkpoints back, or start another run with run.name={_free_name(run)}, or remove {run}"
        )


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def probe_checkpoints(run: Path) -> None:
    """Make the folder of checkpoints and write there, so that hours of training are not lost for want of a place.

    Raises RunFolderError where the path does not allow it, OSError where the storage fails.
    """
    folder = checkpoints_dir(run)
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(exist_ok=True)
        write_atomic(probe, b"probe")
        probe.unlink()
    except OSError as error:
        if error.errno not in PATH_ERRORS | {errno.EROFS}:
            raise
        raise RunFolderError(
            f"checkpoints cannot be written into {folder}: {error.strerror}; make it a folder that you may write into, "
            "or name another place with run.output_dir="
        ) from error


def resume_origin(run: Path, which: str) -> Path:
    """The run folder that `checkpoint.resume` goes on from: `run`, or the one around a checkpoint that lies elsewhere.

    Its config.yaml says which images were trained on. Raises RunFolderError where that is missing, and where there is
    nothing to resume; CheckpointError for a path that is none.
    """
    folder, origin = checkpoints_dir(run), run
    if which in ("latest", "best"):
        require_checkpoints(run)
    elif which == "auto":
        _require_nothing_lost(run)
    else:
        path = named_checkpoint(folder, which).absolute()
        if path.parent.resolve() != folder.resolve():
            origin = path.parent.parent
    if (origin != run or list_checkpoints(folder)) and not config_path(origin).is_file():
        raise RunFolderError(
            f"{config_path(origin)} is missing, so that nobody can tell which images the checkpoint was trained on; "
            "bring the file back, or start a new run with --init-from and the checkpoint's folder"
        )
    return origin


def _way_on(run: Path) -> str:
    has_checkpoint = bool(list_checkpoints(checkpoints_dir(run)))
    if has_checkpoint:
        return "continue it with --resume latest"
    try:
        _require_nothing_lost(run)
    except RunFolderError:
        return f"bring {checkpoints_dir(run)} back"
    return "start it over with --resume auto"


@cache
def code_commit() -> str | None:
    """The git commit of this program's own files; None where they are not in a repository or git is missing."""
    # Inside a git hook GIT_DIR names another repository and would win over -C.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10, stdin=subprocess.DEVNULL, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _free_name(path: Path) -> str:
    number = 2
    while path.with_name(f"{path.name}-{number}").exists():
        number += 1
    return f"{path.name}-{number}"
