"""How much of a disk a run's checkpoints take, said at its start: a run of days must not find out on its last one.

An estimate from the tensors alone; quotas and what other programs write are not known. `require_room` refuses, with
OSError, what does not fit.
"""

import errno
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tagger.checkpoint.format import Tensors, checkpoint_step, list_checkpoints
from tagger.checkpoint.retention import SavePolicy

_UNITS = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


@dataclass(frozen=True)
class Room:
    """Bytes of one checkpoint, of those that are kept at a time, of what is still to come, and free on the disk."""

    checkpoint_bytes: int
    kept_bytes: int
    history_bytes: int
    needed_bytes: int
    free_bytes: int
    policy: SavePolicy

    @property
    def fits(self) -> bool:
        """Whether the disk has room for what is still to come."""
        return self.needed_bytes <= self.free_bytes

    def __str__(self) -> str:
        each, kept = _readable(self.checkpoint_bytes), _readable(self.kept_bytes)
        history = f", and {_readable(self.history_bytes)} for checkpoint.keep_every" if self.history_bytes else ""
        need, free = _readable(self.needed_bytes), _readable(self.free_bytes)
        line = (
            f"checkpoints take about {each} each: {kept} for checkpoint.keep_last={self.policy.keep_last}, the best "
            f"and the one being written{history}; {need} still to come, {free} free"
        )
        if self.fits:
            return line
        return f"{line}: make room, or lower checkpoint.keep_last or raise checkpoint.keep_every; saves will fail"


def plan_room(folder: Path, policy: SavePolicy, checkpoint_bytes: int, step: int, total_steps: int) -> Room:
    """The room for a run at `step` of `total_steps` whose checkpoints lie in `folder`, which need not exist yet."""
    present = sum(not policy.is_history(checkpoint_step(path.name)) for path in list_checkpoints(folder))
    num_kept = policy.keep_last + 2  # the best, and the one that is written before an older one goes
    num_history = 0 if policy.keep_every is None else total_steps // policy.keep_every - step // policy.keep_every
    num_to_come = num_kept - min(present, num_kept - 1) + num_history
    return Room(
        checkpoint_bytes,
        num_kept * checkpoint_bytes,
        num_history * checkpoint_bytes,
        num_to_come * checkpoint_bytes,
        _free_bytes(folder),
        policy,
    )


def tensor_bytes(parts: Mapping[str, Tensors]) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * t.element_size() for tensors in parts.values() for t in tensors.values())


def require_room(folder: Path, num_bytes: int) -> None:
    """The OSError of a full disk where the one of `folder` has no room for so much; nothing is written to find out."""
    free = _free_bytes(folder)
    if free < num_bytes:
        found = f"{os.strerror(errno.ENOSPC)}: {_readable(free)} free of the {_readable(num_bytes)} needed"
        raise OSError(errno.ENOSPC, found, str(folder))


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(each for each in (folder, *folder.absolute().parents) if each.is_dir())).free


def _readable(num_bytes: int) -> str:
    unit, size = next((pair for pair in _UNITS if num_bytes >= pair[1]), _UNITS[-1])
    return f"{num_bytes / size:.1f} {unit}"
