"""Saving in the background without losing anything silently: snapshot, queue, store and the failures, as one.

A save that fails ends no run: `poll` tells of it from the next step on, and the saves that follow are tried all the
same. Where the disk failed (it is full, say), the newest state is held in memory and tried again until it is saved or a
newer one takes its place. Only that state not being on disk at the end is an error, of `flush` and `close`, which wait
for an hour (`writer.PATIENCE_S`) before they give up.

However long the disk hangs, training goes on and the memory is bounded: one state is being written, and at most the
newest, the best and MAX_KEPT_WAITING of `keep_every` wait. Further ones of `keep_every` are like any other save, and
one that is given up is a failure that `poll` tells of.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from tagger.checkpoint.format import Json, LoadedCheckpoint, Tensors, checkpoint_name, encode_state
from tagger.checkpoint.room import plan_room, require_room, tensor_bytes
from tagger.checkpoint.snapshot import HostSnapshot, SnapshotPool
from tagger.checkpoint.store import BestRecord, CheckpointStore
from tagger.checkpoint.writer import MAX_KEPT_WAITING, AsyncCheckpointWriter, CheckpointWriteError, SaveFailure
from tagger.errors import is_storage_failure

logger = logging.getLogger(__name__)

_SPARE_BYTES = 1 << 20  # for the small files beside the tensors

Self = TypeVar("Self", bound="CheckpointSaver")


@dataclass(frozen=True)
class _Save:
    """A snapshot on its way to the disk; `score` is that of the deciding metric where the step has one."""

    step: int
    snapshot: HostSnapshot
    state: bytes
    score: float | None


class CheckpointSaver:
    """The background side of a store. One at a time for a folder; used by one training thread.

    `num_failures` counts the saves that failed so far, those that `poll` has told of included, each once. What
    `before_write` raises, on the writer's thread, is a failure of the save. `on_wait` is told that the end waits for a
    disk that is full or failing.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._best_score = None if store.best is None else store.best.value
        self._pool = SnapshotPool()
        self._writer: AsyncCheckpointWriter[_Save] = AsyncCheckpointWriter(
            self._write,
            self._release,
            lambda save: f"checkpoint {store.folder / checkpoint_name(save.step)}",
            is_storage_failure,
            lambda message: self.on_wait(message),
        )
        self._failures: deque[SaveFailure] = deque()
        self._failed_save: _Save | None = None
        self._saved_at_s = 0.0
        self.num_failures = 0
        self.before_write: Callable[[], None] = lambda: None
        self.on_wait: Callable[[str], None] = lambda _: None

    @property
    def best_metric(self) -> str:
        """Name of the metric that decides."""
        return self._store.best_metric

    @property
    def yardstick(self) -> str | None:
        """Hash of what it is measured with."""
        return self._store.yardstick

    @property
    def best(self) -> BestRecord | None:
        """The best checkpoint on disk by `best_metric`."""
        return self._store.best

    @property
    def saved_step(self) -> int | None:
        """Step of the newest checkpoint written here that is on disk, read back; None before the first."""
        return self._store.newest_step

    def due(self, step: int, seconds: float) -> bool:
        """Whether to save after `step` updates and `seconds` of training, the clock that `submit` is given."""
        return self._store.policy.due(step, seconds - self._saved_at_s)

    def reserve_memory(self, parts: Mapping[str, Tensors]) -> None:
        """Allocate and touch the memory that saving tensors like these takes, twice their size."""
        self._pool.reserve(parts)

    def report_room(self, parts: Mapping[str, Tensors], step: int, total_steps: int) -> None:
        """One line about the disk that checkpoints of tensors like these will take; a warning where it is too full."""
        room = plan_room(self._store.folder, self._store.policy, tensor_bytes(parts), step, total_steps)
        logger.log(logging.INFO if room.fits else logging.WARNING, "%s", room)

    def submit(
        self,
        step: int,
        seconds: float,
        parts: Mapping[str, Tensors],
        state: Mapping[str, Json],
        score: float | None = None,
    ) -> None:
        """Save tensors and JSON values as they are now; returns when they are copied, however slow the disk is."""
        encoded = encode_state(state)
        purposes = {"last"}
        if score is not None and self._store.is_better(score, self._best_score):
            self._best_score = score
            purposes.add("best")
        # First, so that the copy goes into the memory of the one that would wait in vain.
        self._writer.supersede(frozenset(purposes))
        save = _Save(step, self._pool.capture(parts), encoded, score)
        self._writer.submit(save, frozenset(purposes), keep=self._store.policy.is_history(step))
        self._saved_at_s = seconds

    def _write(self, save: _Save) -> None:
        commits, again = self._store.commits, save is self._failed_save
        try:
            self.before_write()
            if again:  # a disk that is still full is not filled to the brim each time
                require_room(self._store.folder, save.snapshot.num_bytes + len(save.state) + _SPARE_BYTES)
            self._store.commit(save.step, save.snapshot.tensors, save.state, save.score)
        except Exception as error:
            failure = SaveFailure(save.step, error, on_disk=self._store.commits > commits)
            if not again:
                # What did not reach the disk must not stand in the way of the next best one.
                self._best_score = None if self._store.best is None else self._store.best.value
            if not again or failure.on_disk or not is_storage_failure(error):
                self._tell(failure)
            self._failed_save = save
            if not failure.on_disk:
                raise
            logger.error("%s", failure)
            error.__traceback__ = None  # its frames hold the whole state
        else:
            if again:
                self._best_score = None if self._store.best is None else self._store.best.value
                logger.warning("the checkpoint of step %d is saved now, %.0f s late", save.step, self.lag_s())

    def _release(self, save: _Save, dropped: bool) -> None:
        self._pool.release(save.snapshot)
        if save is self._failed_save:
            self._failed_save = None
        if dropped and self._store.policy.is_history(save.step):
            late = f"the disk is {self.lag_s():.0f} s late, and {MAX_KEPT_WAITING} of checkpoint.keep_every are waiting"
            failure = SaveFailure(save.step, CheckpointWriteError(late), on_disk=False)
            logger.error("%s; a newer one takes its place", failure)
            self._tell(failure)

    def _tell(self, failure: SaveFailure) -> None:
        self.num_failures += 1
        self._failures.append(failure)

    def poll(self) -> list[SaveFailure]:
        """The failures since the last call, oldest first; cheap enough for every step."""
        return [self._failures.popleft() for _ in range(len(self._failures))]

    def load(self, which: str = "latest") -> LoadedCheckpoint | None:
        """Load "latest", "best" or the checkpoint at a path, verified; None where there is none yet.

        Saves under way are waited for. In place of a broken one the newest good one is loaded, with a warning. Raises
        CheckpointError where none is usable, or where it belongs to another vocabulary.
        """
        with contextlib.suppress(CheckpointWriteError):  # `poll` tells of it; what is on disk is what there is to load
            self.flush()
        loaded = self._store.load(which)
        seconds = None if loaded is None else loaded.state.get("seconds")
        if isinstance(seconds, int | float):
            self._saved_at_s = float(seconds)
        return loaded

    def lag_s(self) -> float:
        """Seconds since the oldest save that is not on disk yet; 0 when all are."""
        return self._writer.lag_s()

    def flush(self) -> None:
        """Wait until every save so far is on disk; raises CheckpointWriteError where the newest cannot be."""
        self._writer.flush()

    def close(self) -> None:
        """`flush`, and end the thread."""
        self._writer.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointWriteError as lost:
            if error is None:
                raise
            logger.error("%s", lost)  # the error that ended the run says more
