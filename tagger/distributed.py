"""Several processes as the ranks of one run: which one this is, what they tell each other, how they end together.

Ranks are started by torchrun, or by anything that sets the same environment; one process alone is a group of one, and
nothing here then waits for anybody. Rank 0 owns the run's folder and decides. What the hosts say to each other goes
over TCP and never waits for a device: a key-value store for what happens seldom, a gloo group for what happens at
every step. Nothing is pickled. Refuses an environment that names a group only in part, and more ranks than devices.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from tagger.devices import resolve_device
from tagger.endings import Ending, diagnose
from tagger.errors import InputError, PeerFailedError, RunFailedError
from tagger.evaluation.gather import Counts, gather_metrics
from tagger.rng import mix, stable_id

_JOIN_TIMEOUT = timedelta(minutes=30)
# How long a rank waits for one that is silent and whose connection stands: longer than any outage that is waited out.
_SILENCE_TIMEOUT = timedelta(hours=1)
_POLL_S = 0.05
_LAST_WORDS_S = 2.0
_LISTEN_EVERY_S = 1.0
_FAILURE = "failure"
_HEARD = "failure heard"
_STOP = "stop"
_RANDOM_STREAM = stable_id("distributed/random")
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of a step: images of all, the strongest request to stop (0: none), whether to save."""

    num_images: int
    stop: int
    save: bool


class Ranks:
    """This process's place among the ranks of a run. Every method is called by all of them, but for `explain`, `report`
    and `heard_stop`.

    Use as a context manager: an error that leaves the block is told to the other ranks, which then end too.
    """

    def __init__(
        self, rank: int = 0, world_size: int = 1, store: Any = None, host_group: dist.ProcessGroup | None = None
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self._store = store
        self._host_group = host_group
        self._said = 0
        self._stop_heard, self._listened_at = False, -_LISTEN_EVERY_S
        self._ended_badly = self._must_be_heard = self._has_heard = False

    @classmethod
    def join(cls, device_name: str) -> "Ranks":
        """The group that the environment names, for training on a device of this kind; waits until all ranks are there.

        On CUDA the device of this rank becomes the current one. Raises InputError for an environment or a device that
        does not allow it.
        """
        world_size = _number("WORLD_SIZE")
        if world_size == 1:
            return cls()
        missing = [name for name in _NEEDED if name not in os.environ]
        if missing:
            raise InputError(
                f"WORLD_SIZE={world_size} is set without {', '.join(missing)}; start several processes with "
                f"torchrun --nproc-per-node {world_size} train_direct.py ..., or unset WORLD_SIZE to train in one"
            )
        device = resolve_device(device_name)
        if device.type not in ("cpu", "cuda"):
            raise InputError(f"several processes cannot share {device}; start one, or set training.device=cpu")
        if device.type == "cuda":
            local, present = _number("LOCAL_RANK"), torch.cuda.device_count()
            if local >= present:
                raise InputError(
                    f"LOCAL_RANK={local}, but this machine shows {present} CUDA devices; start at most {present} ranks "
                    f"here: torchrun --nproc-per-node {present}"
                )
            torch.cuda.set_device(local)
        if not dist.is_available() or not dist.is_gloo_available():
            raise InputError(f"torch {torch.__version__} is built without gloo; train in one process")
        from torch.distributed.distributed_c10d import PrefixStore  # absent where torch is built without it
        from torch.distributed.rendezvous import rendezvous

        store, rank, world_size = next(rendezvous("env://", timeout=_JOIN_TIMEOUT))
        backend = "nccl" if device.type == "cuda" else "gloo"
        group_store = PrefixStore("group", store)
        dist.init_process_group(backend, store=group_store, rank=rank, world_size=world_size, timeout=_SILENCE_TIMEOUT)
        # A group of its own: its calls never wait for what is queued on a device, nor mix with gradients.
        host_group = dist.new_group(backend="gloo", timeout=_SILENCE_TIMEOUT)
        return cls(rank, world_size, PrefixStore("ranks", store), host_group)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which owns the run's folder."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether this process is the whole run."""
        return self.world_size == 1

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, anything that JSON can say (NaN included), on every rank. Its work may take hours."""
        if self.alone:
            return value
        key = self._next_key("broadcast")
        if self.is_main:
            self._store.set(key, json.dumps(value))
            return value
        self._wait_for(key)
        return json.loads(self._store.get(key))

    def collect(self, value: Any) -> list[Any]:
        """Every rank's `value`, as for `broadcast`, by rank; on rank 0 alone, an empty list elsewhere."""
        if self.alone:
            return [value]
        key = self._next_key("collect")
        if not self.is_main:
            self._store.set(f"{key}/{self.rank}", json.dumps(value))
            return []
        found = [value]
        for rank in range(1, self.world_size):
            self._wait_for(f"{key}/{rank}")
            found.append(json.loads(self._store.get(f"{key}/{rank}")))
        return found

    def require_same(self, facts: Mapping[str, int | str]) -> None:
        """Raise InputError on rank 0, which ends the others too, where the ranks do not have the same facts."""
        for rank, theirs in enumerate(self.collect(dict(facts))):
            different = [name for name, value in facts.items() if theirs.get(name) != value]
            if different:
                raise InputError(
                    f"rank {rank} has another {different[0]} than rank 0; every rank must be started with the same "
                    "settings and see the same files"
                )
        self.broadcast(None)  # nobody goes on before rank 0 has looked

    def agree(self, num_images: int, stop: int, save: bool) -> Agreed:
        """What the step just made was for all ranks; `save` is decided by rank 0, `stop` by the strongest of all.

        One exchange of a few numbers between the hosts; a rank that is gone is found out here at the latest.
        """
        if self.alone:
            return Agreed(num_images, stop, save)
        table = self._exchange([num_images, stop, int(save)])
        return Agreed(int(table[:, 0].sum()), int(table[:, 1].max()), bool(table[0, 2]))

    def any_of(self, flag: bool, meanwhile: Callable[[], object] | None = None) -> bool:
        """Whether the flag of any rank is set; `meanwhile` is called again and again until all have come here."""
        return flag if self.alone else bool(self._exchange([int(flag)], meanwhile).any())

    def heard_stop(self, asked: bool) -> bool:
        """Whether any rank has said here that it was `asked` to stop: the others hear of it within a second.

        Waits for nobody.
        """
        if self.alone:
            return asked
        now = time.monotonic()
        if asked and not self._stop_heard:
            self._store.set(_STOP, "")
            self._stop_heard = True
        elif not self._stop_heard and now - self._listened_at >= _LISTEN_EVERY_S:
            self._listened_at = now
            self._stop_heard = self._store.check([_STOP])
        return self._stop_heard

    def gather(self, counts: Counts, losses: Sequence[float]) -> list[float] | None:
        """Bring the counts of an evaluation to rank 0 and all losses with them; None on the others."""
        if not self.alone and not gather_metrics(counts, group=self._host_group):
            self.collect(list(losses))
            return None
        return [loss for each in self.collect(list(losses)) for loss in each]

    def reseed(self, seed: int, step: int) -> None:
        """Give a rank other than 0 the random numbers of its own of an update: a function of seed, rank and step.

        So a checkpoint holds the generators of rank 0 alone and a resume is exact all the same.
        """
        if not self.is_main:
            torch.manual_seed(int(mix(_RANDOM_STREAM, seed, self.rank, step)) >> 1)

    def report(self, ending: Ending) -> None:
        """Leave word of how this rank ended, for the others to find; the first word counts."""
        if self.alone:
            return
        self._ended_badly = True
        with contextlib.suppress(RuntimeError):  # the store may be gone with the rank that keeps it
            word = json.dumps({"rank": self.rank, **asdict(ending)})
            self._store.compare_set(_FAILURE, "", word)
            self._must_be_heard = self._store.get(_FAILURE) == word.encode()

    def explain(self, error: Exception) -> Exception:
        """The error itself, or a PeerFailedError where it only says that a connection to another rank was lost."""
        if self.alone or not _is_lost_connection(error):
            return error
        until = time.monotonic() + _LAST_WORDS_S
        while True:
            found = self._failure()
            if found is not None:
                return found
            if time.monotonic() > until:
                return PeerFailedError("another rank ended without a word (killed, or its machine is gone)")
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Leave the group, in good order."""
        if not self.alone:
            dist.destroy_process_group()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not self._ended_badly:
            told = error.__cause__ if isinstance(error, RunFailedError) else None
            self.report(diagnose(told or error))
        if self.is_main and self._must_be_heard:
            self._wait_until_heard()
        if error is None and not self._ended_badly:
            self.close()
        elif not self.alone and dist.get_backend() == "nccl":
            # What the device waits for from a rank that is gone must not keep this process from ending. With gloo the
            # others notice that it has ended.
            from torch.distributed.distributed_c10d import _abort_process_group

            _abort_process_group()

    def _exchange(self, values: Sequence[int], meanwhile: Callable[[], object] | None = None) -> torch.Tensor:
        """Every rank's values: int64 [ranks, values]."""
        own = torch.tensor(values)
        every = [torch.empty_like(own) for _ in range(self.world_size)]
        work = dist.all_gather(every, own, group=self._host_group, async_op=True)
        while meanwhile is not None and not work.is_completed():
            meanwhile()
            time.sleep(_POLL_S)
        work.wait()
        return torch.stack(every)

    def _next_key(self, what: str) -> str:
        self._said += 1
        return f"{self._said}/{what}"

    def _wait_for(self, key: str) -> None:
        """Until a key is there. Polls, so that signals are heard. Raises PeerFailedError where another rank failed."""
        while not self._store.check([key]):
            found = self._failure()
            if found is not None:
                raise found
            time.sleep(_POLL_S)

    def _wait_until_heard(self) -> None:
        """For the others a little: the store may end with this process, and what it says with it."""
        until = time.monotonic() + _LAST_WORDS_S
        with contextlib.suppress(RuntimeError):
            while self._store.add(_HEARD, 0) < self.world_size - 1 and time.monotonic() < until:
                time.sleep(_POLL_S)

    def _failure(self) -> PeerFailedError | None:
        """What the rank that failed first has left word of; None where none has, or it was this one."""
        try:
            if not self._store.check([_FAILURE]):
                return None
            said = json.loads(self._store.get(_FAILURE))
            if said["rank"] == self.rank:
                return None
            if not self._has_heard:
                self._has_heard = True
                self._store.add(_HEARD, 1)
        except RuntimeError:
            return None
        return PeerFailedError(f"rank {said['rank']}: {said['reason']}", said["status"], said["exit_code"])


ALONE = Ranks()


def _number(name: str) -> int:
    text = os.environ.get(name, "1")
    if not text.isdecimal():
        raise InputError(f"{name}={text} in the environment is not a number; start with torchrun, or unset it")
    if name == "WORLD_SIZE" and int(text) == 0:
        raise InputError(f"{name}={text} in the environment names no process; start with torchrun, or unset it")
    return int(text)


def _is_lost_connection(error: Exception) -> bool:
    # gloo's errors are plain RuntimeErrors; their text begins with the place in its sources.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
