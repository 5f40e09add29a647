"""The checkpoints of a run as a rank sees them that writes none: rank 0 saves, decides when, and tells of failures."""

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol

from tagger.checkpoint.format import Json, Tensors
from tagger.checkpoint.store import BestRecord
from tagger.checkpoint.writer import SaveFailure
from tagger.sharding import whole


class Savable(Protocol):
    """What has a state to save."""

    def snapshot_parts(self) -> tuple[dict[str, Tensors], dict[str, Json]]:
        """Tensors by part and name, and JSON values."""

    def stand_ins(self) -> dict[str, Tensors]:
        """Tensors of the forms that a snapshot has."""


class CheckpointFollower:
    """Stands in the place of a `CheckpointManager` on the ranks other than 0."""

    best: BestRecord | None = None

    def __init__(self, yardstick: str, *, sharded: bool) -> None:
        """sharded: whether saving needs the part of the state that this rank holds."""
        self.yardstick = yardstick
        self._sharded = sharded

    def due(self, step: int, seconds: float) -> bool:
        """Rank 0 says when."""
        del step, seconds
        return False

    def save(self, state: Savable, metrics: Mapping[str, float] | None = None, *, wait: bool = False) -> None:
        """Give rank 0 this rank's parts of the state, in the order in which it copies them."""
        del metrics, wait
        if self._sharded:
            for tensors in state.snapshot_parts()[0].values():
                for tensor in tensors.values():
                    whole(tensor.detach())

    def poll(self) -> list[SaveFailure]:
        """Rank 0 tells of failures."""
        return []

    def lag_s(self) -> float:
        """No save of this rank is late."""
        return 0.0

    def __enter__(self) -> "CheckpointFollower":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """There is nothing to wait for."""
