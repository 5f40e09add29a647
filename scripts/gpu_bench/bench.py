"""What the sections share: the device, the sizes, the clock, and the ceilings that figures are held against.

Times are taken by turns in one process, so that a ratio holds where the machine's speed drifts.
"""

import dataclasses
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from Configuration_System import ModelSection, OptimizerSection
from scripts.figures import Figure
from tagger.devices import autocast_dtype

_MOST_REPEATS = 10_000
# About 15 ms of a card's time, in which the host launches what is to be timed.
_COPIES_AHEAD = 32


class OutOfTimeError(RuntimeError):
    """The benchmark's time is over; what was measured before stands."""


@dataclass(frozen=True)
class StepCase:
    """One training step to measure. Goals are of a GPU: share of the matmul ceiling, images a second, peak GB.

    `as_recipe`: model and optimizer are those of a recipe. timm has no such network to put beside it; what a new batch
    shape costs is measured in its place.
    """

    name: str
    model: ModelSection
    image_size: int
    batch_size: int
    least_mfu: float | None = None
    least_images_per_s: float | None = None
    most_gb: float | None = None
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    as_recipe: bool = False


# Of configs/vit_l_448.yaml.
LARGE_MODEL = ModelSection(preset="vit_large", qk_norm=True, layer_scale_init=1e-4, drop_path=0.2)
LARGE_OPTIMIZER = OptimizerSection(name="muon", learning_rate=0.0003, base_batch_size=384)


@dataclass(frozen=True)
class Scale:
    """The sizes of every section. `turn_s` is the least time for which a turn repeats a short call.

    `compiled`: measure the loss as `training.compile=on` gives it; networks are compiled on a GPU alone.
    """

    rounds: int
    compiled: bool
    turn_s: float
    num_tags: int
    matmul_side: int
    copy_bytes: int
    attention_tokens: tuple[int, ...]
    attention_head_dims: tuple[int, ...]
    attention_width: int
    attention_total_tokens: int
    loss_batches: tuple[int, ...]
    loss_tags: int
    steps: tuple[StepCase, ...]
    layout: StepCase
    layout_shapes: int
    update_model: ModelSection
    loader_batches: int
    loader_photographs: int
    loader_batch: int
    evaluated_images: int
    evaluated_tags: int


GPU_SCALE = Scale(
    rounds=5,
    compiled=True,
    turn_s=0.05,
    num_tags=20_000,
    matmul_side=8192,
    copy_bytes=1 << 30,
    attention_tokens=(256, 400, 576, 768, 784, 1024),
    attention_head_dims=(64, 128),
    attention_width=1024,
    attention_total_tokens=65_536,
    loss_batches=(256, 1024),
    loss_tags=20_000,
    steps=(
        StepCase("L@448", ModelSection(preset="vit_large"), 448, 128, least_mfu=0.60, most_gb=85),
        StepCase("L@448, recipe", LARGE_MODEL, 448, 128, optimizer=LARGE_OPTIMIZER, as_recipe=True),
        StepCase("S@224", ModelSection(preset="vit_small"), 224, 1024, least_images_per_s=12_000),
        StepCase("B@448", ModelSection(preset="vit_base"), 448, 256),
    ),
    layout=StepCase("B@448", ModelSection(preset="vit_base"), 448, 256),
    layout_shapes=3,
    update_model=ModelSection(preset="vit_large"),
    loader_batches=64,
    loader_photographs=16,
    loader_batch=128,
    evaluated_images=300_000,
    evaluated_tags=20_000,
)

CPU_SCALE = Scale(
    rounds=5,
    compiled=True,
    turn_s=0.05,
    num_tags=2_000,
    matmul_side=1024,
    copy_bytes=1 << 27,
    attention_tokens=(64, 196),
    attention_head_dims=(64,),
    attention_width=192,
    attention_total_tokens=784,
    loss_batches=(256,),
    loss_tags=20_000,
    steps=(
        StepCase("tiny@96", ModelSection(preset="vit_tiny", depth=4), 96, 16),
        StepCase(
            "tiny@96, recipe",
            dataclasses.replace(LARGE_MODEL, preset="vit_tiny", depth=4),
            96,
            16,
            optimizer=LARGE_OPTIMIZER,
            as_recipe=True,
        ),
    ),
    layout=StepCase("tiny@176", ModelSection(preset="vit_tiny", depth=2), 176, 8),
    layout_shapes=3,
    update_model=ModelSection(preset="vit_tiny"),
    loader_batches=64,
    loader_photographs=16,
    loader_batch=16,
    evaluated_images=10_000,
    evaluated_tags=200,
)


class Bench:
    """The device and the sizes, with a clock that waits for the device. Raises OutOfTimeError once time is over."""

    def __init__(self, device: torch.device, scale: Scale, seconds: float = math.inf) -> None:
        self.device = device
        self.scale = scale
        self.on_gpu = device.type == "cuda"
        self.dtype = autocast_dtype("auto", device) or torch.float32
        self._ends_at = time.perf_counter() + seconds
        # Left by the training steps for the section that needs it: timm compiled / ours on squares, by case.
        self.against_timm: dict[str, float] = {}
        # Likewise images a second of our own steps.
        self.images_per_s: dict[str, float] = {}

    def host_bytes(self, number: int) -> Tensor:
        """Memory of the host that the device copies from fastest."""
        return torch.zeros(number, dtype=torch.uint8, pin_memory=self.on_gpu)

    def check_time(self) -> None:
        """Raises OutOfTimeError where the time is over."""
        if time.perf_counter() > self._ends_at:
            raise OutOfTimeError("the time is over; --sections measures the rest, --minutes gives more")

    def now(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, work: Callable[[], object], repeats: int = 1) -> float:
        """Seconds a call."""
        started = self.now()
        for _ in range(repeats):
            work()
        return (self.now() - started) / repeats

    def kernel_seconds(self, work: Callable[[], object], repeats: int = 1) -> float:
        """Seconds a call takes the device while the host is ahead of it, as inside a training step."""
        if not self.on_gpu:
            return self.seconds(work, repeats)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for _ in range(_COPIES_AHEAD):
            self.copy()
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000 / repeats

    def in_turn(self, works: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds a call of each work in every round, by turns, after calls to warm up; the host's time included."""
        return self._by_turns(works, self.seconds, _MOST_REPEATS)

    def kernels_in_turn(self, works: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Likewise `kernel_seconds`."""
        # So few that what is launched fits the queue between host and device.
        return self._by_turns(works, self.kernel_seconds, 40 if self.on_gpu else _MOST_REPEATS)

    def _by_turns(
        self, works: Mapping[str, Callable[[], object]], clock: Callable[[Callable[[], object], int], float], most: int
    ) -> dict[str, list[float]]:
        repeats = {}
        for name, work in works.items():
            self.check_time()
            work()
            repeats[name] = min(most, max(1, math.ceil(self.scale.turn_s / max(clock(work, 1), 1e-7))))
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(self.scale.rounds):
            for name, work in works.items():
                times[name].append(clock(work, repeats[name]))
        return times

    @cached_property
    def matmul_flops(self) -> float:
        """FLOP/s of a square product in the dtype of training: the ceiling of every network."""
        side = self.scale.matmul_side
        a, b = (torch.randn(side, side, device=self.device).to(self.dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = self.kernels_in_turn({"matmul": lambda: torch.mm(a, b, out=out)})["matmul"]
        return 2 * side**3 / statistics.median(seconds)

    @cached_property
    def _copied(self) -> tuple[Tensor, Tensor]:
        source = torch.zeros(self.scale.copy_bytes, dtype=torch.uint8, device=self.device)
        return torch.empty_like(source).fill_(1), source

    def copy(self) -> None:
        """Read and write memory of the device once each: the ceiling of what passes over data once."""
        target, source = self._copied
        target.copy_(source)

    def copy_seconds(self, times: Mapping[str, Sequence[float]], num_bytes: float) -> list[float]:
        """How long the device takes to move `num_bytes`, read or written, by the rounds of "copy" among the times."""
        return [seconds * num_bytes / (2 * self.scale.copy_bytes) for seconds in times["copy"]]

    def release(self) -> None:
        """Give back what a section has left: memory, and compiled code with its limit on variants."""
        gc.collect()
        if "torch._dynamo" in sys.modules:  # importing it takes seconds
            torch._dynamo.reset()
        if self.on_gpu:
            torch.cuda.empty_cache()


Section = Callable[[Bench], Iterator[Figure]]


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def missing(name: str, why: str) -> Figure:
    """A figure that could not be measured, and why."""
    return Figure(name, math.nan, note=why)


def saved_bytes(forward: Callable[[], Tensor], besides: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of a forward pass, `besides` these (a model's weights) aside."""
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())
