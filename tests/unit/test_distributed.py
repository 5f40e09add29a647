"""One process is a group of one that waits for nobody; an environment that names a group must name it whole."""

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from evaluation_metrics import MetricComputer
from tagger.batch import Batch
from tagger.data.prefetch import num_cores
from tagger.distributed import ALONE, Agreed, Ranks
from tagger.endings import Ending, diagnose
from tagger.errors import InputError, PeerFailedError, RunFailedError
from tagger.parallel import Parallel, ValidationFeed, require_shardable
from tagger.sharding import is_sharded, like, whole
from tagger.tokens import ConvStem

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A gloo group that this process is the whole of."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [None, "1"])
def test_one_process_is_a_run_of_its_own(monkeypatch: pytest.MonkeyPatch, world_size: str | None) -> None:
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    with Ranks.join("cpu") as ranks:
        assert ranks.alone and ranks.is_main
    assert not torch.distributed.is_initialized()


def test_half_an_environment_is_refused_with_the_command_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(InputError, match=r"without RANK, LOCAL_RANK, MASTER_PORT; .*torchrun --nproc-per-node 2"):
        Ranks.join("cpu")
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(InputError, match="WORLD_SIZE=many"):
        Ranks.join("cpu")
    monkeypatch.setenv("WORLD_SIZE", "0")
    with pytest.raises(InputError, match="WORLD_SIZE=0 in the environment names no process; start with torchrun"):
        Ranks.join("cpu")


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="LOCAL_RANK=2, but this machine shows 2 CUDA devices"):
        Ranks.join("cuda")


def test_alone_everything_is_what_it_was() -> None:
    assert ALONE.agree(5, 143, True) == Agreed(5, 143, True)
    assert ALONE.broadcast({"a": 1}) == {"a": 1}
    assert ALONE.collect(3) == [3]
    assert ALONE.gather(MetricComputer(2), [1.0, 2.0]) == [1.0, 2.0]
    ALONE.require_same({"configuration": "x"})
    error = RuntimeError("[gloo] Connection closed by peer")
    assert ALONE.explain(error) is error
    state = torch.get_rng_state()
    ALONE.reseed(1, 2)
    assert torch.equal(torch.get_rng_state(), state)


class Told:
    """A key-value store in memory."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def compare_set(self, key: str, expected: str, desired: str) -> None:
        if self.values.get(key, "") == expected:
            self.values[key] = desired

    def add(self, key: str, amount: int) -> int:
        self.values[key] = str(int(self.values.get(key, "0")) + amount)
        return int(self.values[key])


def test_the_first_rank_to_fail_is_the_reason_of_all() -> None:
    store = Told()
    ranks = [Ranks(rank, 3, store) for rank in range(3)]
    ranks[2].report(Ending("failed", 5, "out of memory"))
    ranks[1].report(Ending("failed", 1, "lost"))
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:7")
    found = ranks[0].explain(lost)
    assert isinstance(found, PeerFailedError)
    assert diagnose(found) == Ending("failed", 5, "rank 2: out of memory")
    assert ranks[2].explain(lost).args == ("another rank ended without a word (killed, or its machine is gone)",)
    own = RuntimeError("shape mismatch")
    assert ranks[0].explain(own) is own
    with pytest.raises(PeerFailedError, match="rank 2: out of memory"):
        ranks[1].broadcast(None)


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InputError("runs/mine already exists"), Ending("failed", 2, "rank 0: runs/mine already exists")),
        (RunFailedError("no room", 6), Ending("failed", 5, "rank 0: out of memory")),
    ],
)
def test_an_error_that_nobody_has_told_of_is_told_on_the_way_out(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: Ending
) -> None:
    waits: list[float] = []
    store = Told()
    main, other = Ranks(0, 2, store), Ranks(1, 2, store)

    def listen(seconds: float) -> None:
        waits.append(seconds)
        assert diagnose(other.explain(RuntimeError("gloo: closed"))).reason is not None

    monkeypatch.setattr("tagger.distributed.time.sleep", listen)
    if isinstance(error, RunFailedError):
        error.__cause__ = MemoryError("full")
    with pytest.raises(type(error)), main:
        raise error
    assert len(waits) == 1, "rank 0 stays until the others have heard, and no longer"
    found = diagnose(other.explain(RuntimeError("gloo: closed")))
    assert (found.status, found.exit_code) == (expected.status, expected.exit_code)
    assert found.reason is not None and expected.reason is not None and found.reason.startswith(expected.reason)


def test_what_rank_0_says_reaches_every_rank_in_order() -> None:
    store = Told()
    main, other = Ranks(0, 2, store), Ranks(1, 2, store)
    main.broadcast({"mAP": float("nan"), "loss": 0.1})
    main.broadcast([1, 2])
    said = other.broadcast(None)
    assert said["loss"] == 0.1 and said["mAP"] != said["mAP"]
    assert other.broadcast(None) == [1, 2]
    other.collect("theirs")
    assert main.collect("own") == ["own", "theirs"]


def test_ranks_that_see_something_else_are_refused() -> None:
    store = Told()
    main, other = Ranks(0, 2, store), Ranks(1, 2, store)
    other.collect({"configuration": "a", "vocabulary": "b"})
    with pytest.raises(InputError, match="rank 1 has another vocabulary than rank 0"):
        main.require_same({"configuration": "a", "vocabulary": "c"})


def test_random_numbers_of_a_rank_are_a_function_of_seed_rank_and_step() -> None:
    def drawn(rank: int, seed: int, step: int) -> float:
        Ranks(rank, 4, None).reseed(seed, step)
        return torch.rand(()).item()

    assert drawn(1, 3, 5) == drawn(1, 3, 5)
    assert len({drawn(1, 3, 5), drawn(2, 3, 5), drawn(1, 4, 5), drawn(1, 3, 6)}) == 4


def test_optimizers_of_whole_matrices_are_refused_where_weights_are_sharded() -> None:
    two = Ranks(0, 2, None)
    with pytest.raises(InputError, match=r"optimizer.name=muon needs whole matrices.*training.parallel=ddp"):
        require_shardable("fsdp", two, "muon")
    require_shardable("fsdp", two, "adamw")
    require_shardable("ddp", two, "muon")
    require_shardable("fsdp", ALONE, "muon")


def test_one_process_is_wrapped_in_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for mode in ("ddp", "fsdp"):
        parallel = Parallel(model, model, ALONE, mode)
        assert parallel.objective is model and not parallel.sharded
        assert parallel.begin_window(1, 2, 7, torch.device("cpu")) == 7
        assert parallel.can_save_after(RuntimeError("lost"))
        parallel.settle_buffers()
    assert not is_sharded(model[0].weight)
    assert whole(model[0].weight) is model[0].weight and like(model[1].weight, model[0].weight) is model[1].weight


@pytest.mark.usefixtures("group_of_one")
def test_the_convolutional_stem_gives_gradients_as_ddp_wants_them(recwarn: pytest.WarningsRecorder) -> None:
    stem = ConvStem(4, 16)
    parallel = Parallel(stem, stem, Ranks(0, 2, None), "ddp")
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        for is_last in (False, True, True):
            with parallel.batch(is_last=is_last):
                parallel.objective(torch.rand(2, 3, 16, 16)).sum().backward()
    finally:
        torch.set_warn_always(before)
    assert not [str(each.message) for each in recwarn if "strides" in str(each.message)]


class Scripted(Ranks):
    """A rank whose exchanges are answered from a list: how many ranks have a batch, whether one is to stop."""

    def __init__(self, answers: list[tuple[int, int]]) -> None:
        super().__init__(1, 2, None)
        self.answers = answers

    def agree(self, num_images: int, stop: int, save: bool) -> Agreed:
        with_batch, asked = self.answers.pop(0)
        assert num_images <= with_batch and stop <= asked
        return Agreed(with_batch, asked, save)


def test_a_rank_that_has_run_out_of_images_goes_on_with_empty_batches() -> None:
    one = (Batch.empty(8), {"samples": 1})
    feed = ValidationFeed([one], lambda: False, 8, Scripted([(2, 0), (1, 0), (0, 0)]), together=True)
    batches = list(feed)
    assert len(batches) == 2 and batches[0] is one
    assert len(batches[1][0]) == 0 and batches[1][0].images.shape == (0, 3, 8, 8)
    assert not feed.stop()


def test_ranks_of_a_sharded_model_stop_before_the_same_batch() -> None:
    feed = ValidationFeed([(Batch.empty(8), None)] * 3, lambda: False, 8, Scripted([(2, 0), (2, 1)]), together=True)
    seen = 0
    for _ in feed:
        if feed.stop():
            break
        seen += 1
    assert seen == 1
    assert ValidationFeed([], lambda: True, 8, ALONE, together=False).stop()


def test_ranks_with_whole_models_hear_that_another_was_asked_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked, store = [0.0], [False, False], Told()
    monkeypatch.setattr("tagger.distributed.time.monotonic", lambda: now[0])
    one, other = (
        ValidationFeed([], lambda rank=rank: asked[rank], 8, Ranks(rank, 2, store), together=False)  # type: ignore[misc]
        for rank in range(2)
    )
    assert not one.stop() and not other.stop()
    asked[1] = True
    assert other.stop() and not one.stop()
    now[0] = 1.0
    assert one.stop()


def test_ranks_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert num_cores() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert num_cores() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert num_cores() == 4
