"""Whole training steps: ours, and timm's network in a plain step, eager and compiled, by turns on the same images.

Both take the same uint8 images and tag lists, the same loss, AdamW (fused), a clip of the norm and an average of the
weights, so that what differs is the network and how an update is made. Ours makes it as `train_step` does.
"""

import dataclasses
import importlib
import importlib.util
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from Configuration_System import LossSection
from loss_functions import create_loss
from model_architecture import create_model
from scripts.benchmark_training import random_batches
from scripts.figures import Figure, figure
from scripts.gpu_bench.bench import Bench, StepCase, missing, ratios, saved_bytes
from scripts.gpu_bench.flops import training_flops
from tagger.batch import Batch
from tagger.compilation import missing_compiler
from tagger.objective import TrainingObjective
from training_utils import ExponentialMovingAverage, MixedPrecisionTrainer, compile_model, create_optimizer

CLIP = 1.0
DECAY = 0.999
_LAUNCHES = {"cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch"}
_TIMM_NAMES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
}


def noise_batch(bench: Bench, size: int, height: int, width: int) -> Batch:
    """Images of noise on the device, about ten tags each."""
    batch = random_batches(1, size, 16, bench.scale.num_tags)[0].to(bench.device)
    images = torch.randint(0, 256, (size, 3, height, width), dtype=torch.uint8, device=bench.device)
    sizes = torch.tensor([height, width], dtype=torch.int32, device=bench.device).expand(size, 2)
    return dataclasses.replace(batch, images=images, valid_sizes=sizes)


def make_criterion(bench: Bench) -> nn.Module:
    """The default loss, compiled where networks are, for whoever's network."""
    criterion = create_loss(LossSection()).to(bench.device)
    if bench.on_gpu and missing_compiler(bench.device) is None:
        criterion.use_compiled()
    return criterion


class OurStep:
    """One update as the training loop makes it, between logs."""

    def __init__(self, bench: Bench, case: StepCase) -> None:
        self.model = create_model(case.model, bench.scale.num_tags, case.image_size).to(bench.device).train()
        compile_model(self.model, "auto", bench.device)
        self.objective = TrainingObjective(self.model, make_criterion(bench))
        self.precision = MixedPrecisionTrainer("auto", bench.device)
        self.optimizer = create_optimizer(case.optimizer, self.model)
        self.ema = ExponentialMovingAverage(self.model, DECAY)
        self._parameters = tuple(self.model.parameters())

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        with self.precision.autocast():
            loss: Tensor = self.objective(batch.images, batch.valid_sizes, batch.tag_indices, batch.tag_offsets)
        return loss / len(batch)

    def __call__(self, batch: Batch) -> None:
        loss = self.forward(batch)
        self.precision.backward(loss)
        self.precision.step(self.optimizer, self._parameters, CLIP, loss.detach())
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()


class FromBytes(nn.Module):
    """A network that takes normalised floats, given bytes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, valid_sizes: Tensor) -> Tensor:  # noqa: ARG002 - as ours
        """Logits of uint8 images."""
        logits: Tensor = self.network(images.float().div_(127.5).sub_(1.0))
        return logits


class PlainStep:
    """The usual update of somebody else's network."""

    def __init__(self, bench: Bench, network: nn.Module) -> None:
        self.model = FromBytes(network).to(bench.device).train()
        self.objective = TrainingObjective(self.model, make_criterion(bench))
        self.precision = MixedPrecisionTrainer("auto", bench.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.ema = ExponentialMovingAverage(self.model, DECAY)

    def __call__(self, batch: Batch) -> None:
        with self.precision.autocast():
            loss = self.objective(batch.images, batch.valid_sizes, batch.tag_indices, batch.tag_offsets)
        (loss / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()


def timm_network(case: StepCase, num_tags: int) -> nn.Module:
    """timm's network of the same width, depth and number of tokens."""
    timm: Any = importlib.import_module("timm")
    sizes = {"img_size": case.image_size, "num_classes": num_tags}
    if case.model.depth is not None:
        sizes["depth"] = case.model.depth
    network: nn.Module = timm.create_model(
        _TIMM_NAMES[case.model.preset], pretrained=False, class_token=False, global_pool="avg", **sizes
    )
    return network


def train_steps(bench: Bench) -> Iterator[Figure]:
    """Every case of the scale: ours alone, then beside timm; of a recipe what a new batch shape costs."""
    for case in bench.scale.steps:
        yield from step_figures(bench, case)
        bench.release()


def step_figures(bench: Bench, case: StepCase) -> Iterator[Figure]:
    """Rate, share of the ceiling, memory, launches and host reads of a step, and ratios to timm's."""
    bench.check_time()
    name = f"step {case.name} B={case.batch_size}"
    held = torch.cuda.memory_allocated(bench.device) if bench.on_gpu else 0  # the benchmark's own
    batch = noise_batch(bench, case.batch_size, case.image_size, case.image_size)
    ours = OurStep(bench, case)
    if not bench.on_gpu:
        kept = saved_bytes(lambda: ours.forward(batch), [*ours.model.parameters(), batch.images])
        yield Figure(f"{name}: saved for backward an image", kept / case.batch_size / 1e6, unit="MB")
    yield from _inside_a_step(bench, name, case, ours, batch, held)
    works: dict[str, Callable[[], object]] = {"ours": lambda: ours(batch)}
    failed = {}
    for form in () if case.as_recipe else ("timm eager", "timm compiled"):
        why = _add_timm(bench, case, form, batch, works)
        if why is not None:
            failed[form] = why
    times = bench.in_turn(works)
    rates = [case.batch_size / seconds for seconds in times["ours"]]
    flops = training_flops(ours.model.config)
    mfu = [rate * flops / bench.matmul_flops for rate in rates]
    bench.images_per_s[case.name] = statistics.median(rates)
    least = case.least_images_per_s if bench.on_gpu else None
    yield figure(f"{name}: images/s", rates, least)
    yield figure(f"{name}: MFU of the measured matmul", mfu, case.least_mfu if bench.on_gpu else None)
    if case.as_recipe:
        yield new_shape_figure(bench, name, case, ours)
        return
    for form, goal in (("timm eager", 1.4), ("timm compiled", 1.08)):
        if form in failed:
            yield missing(f"{name}: {form} / ours", failed[form])
            continue
        shares = ratios(times[form], times["ours"])
        if form == "timm compiled":
            bench.against_timm[case.name] = statistics.median(shares)
        yield figure(f"{name}: {form} / ours", shares, goal if bench.on_gpu else None)


def new_shape_figure(bench: Bench, name: str, case: StepCase, ours: OurStep) -> Figure:
    """How much longer the first step of images one patch narrower takes than the next: compiling, from no cache."""
    from torch._dynamo.utils import counters  # takes seconds
    from torch._inductor.utils import fresh_inductor_cache

    bench.check_time()
    batch = noise_batch(bench, case.batch_size, case.image_size, case.image_size - ours.model.config.patch_size)
    before = counters["stats"]["unique_graphs"]
    with fresh_inductor_cache():
        first = bench.seconds(lambda: ours(batch))
    graphs = counters["stats"]["unique_graphs"] - before
    seconds = first - bench.seconds(lambda: ours(batch))
    note = f"{graphs} graph{'s' * (graphs != 1)}" if graphs else "not compiled here"
    return Figure(f"{name}: to compile a new batch shape", seconds, unit="s", note=note)


def _add_timm(
    bench: Bench, case: StepCase, form: str, batch: Batch, works: dict[str, Callable[[], object]]
) -> str | None:
    """Put a step of timm's network among the works, tried once; the reason where that is not possible."""
    if importlib.util.find_spec("timm") is None:
        return "timm is not installed; pip install timm"
    if form == "timm compiled" and not bench.on_gpu:
        return "compiled on a GPU alone, as ours is"
    try:
        network = timm_network(case, bench.scale.num_tags)
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises RuntimeError
        return f"timm cannot be used here: {str(error).splitlines()[0]}"
    if form == "timm compiled":
        network.compile(dynamic=False)  # whole, as its own training script does
    try:
        step = PlainStep(bench, network)
        step(batch)
    except torch.OutOfMemoryError:
        return f"out of memory at a batch of {case.batch_size}"
    works[form] = lambda: step(batch)
    return None


def _inside_a_step(bench: Bench, name: str, case: StepCase, ours: OurStep, batch: Batch, held: int) -> Iterator[Figure]:
    """What needs our step alone on the device, beside `held` bytes: peak memory, launches, host reads."""
    ours(batch)
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
        ours(batch)
        peak = (torch.cuda.max_memory_allocated(bench.device) - held) / 1e9
        yield Figure(f"{name}: peak memory", peak, goal=case.most_gb, lower_is_better=True, unit="GB")
    counts = step_events(bench, lambda: ours(batch))
    launches = sum(counts[each] for each in _LAUNCHES)
    operators = sum(number for each, number in counts.items() if each.startswith("aten::"))
    yield Figure(f"{name}: operators", operators, note=f"{launches} kernel launches" if bench.on_gpu else "")
    reads = counts["aten::_local_scalar_dense"]
    goal, note = (0, "") if bench.on_gpu else (None, "tag lists are checked on a CPU alone")
    yield Figure(f"{name}: host reads", reads, goal=goal, lower_is_better=True, note=note)


def step_events(bench: Bench, step: Callable[[], object]) -> Counter[str]:
    """How often each operator, and on CUDA each call of its runtime, comes in one step."""
    if not bench.on_gpu:
        # A profiler would count what torch's fused AdamW reads inside its kernel, which on CUDA it does not.
        counter = OperatorCounter()
        with counter:
            step()
        return counter.counts
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        step()
        bench.now()
    return Counter({event.key: event.count for event in profile.key_averages()})


class OperatorCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that Python asks for, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.counts[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))
