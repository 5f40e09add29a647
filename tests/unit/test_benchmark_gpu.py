"""The benchmark for a GPU measures what it says, on a CPU and the smallest shapes; figures are not judged."""

import contextlib
import dataclasses
import math
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from Configuration_System import ModelSection, load_config
from model_architecture import create_model
from scripts import benchmark_gpu
from scripts.figures import Figure
from scripts.gpu_bench import kernels, steps
from scripts.gpu_bench.bench import (
    CPU_SCALE,
    GPU_SCALE,
    LARGE_MODEL,
    LARGE_OPTIMIZER,
    Bench,
    OutOfTimeError,
    Scale,
    StepCase,
    saved_bytes,
)
from scripts.gpu_bench.flops import forward_flops, training_flops
from scripts.gpu_bench.kernels import attention_figure
from scripts.gpu_bench.steps import OperatorCounter, OurStep, new_shape_figure, noise_batch, train_steps
from tagger.layers import Attention
from training_utils import create_optimizer

_SMALL = ModelSection(preset="vit_tiny", depth=1, embed_dim=48)
TINY = dataclasses.replace(
    CPU_SCALE,
    rounds=1,
    compiled=False,
    turn_s=1e-4,
    num_tags=50,
    matmul_side=64,
    copy_bytes=1 << 16,
    attention_tokens=(16,),
    attention_total_tokens=16,
    loss_batches=(4,),
    loss_tags=50,
    steps=(StepCase("tiny@32", _SMALL, 32, 2),),
    layout=StepCase("tiny@176", _SMALL, 176, 1),
    layout_shapes=1,
    update_model=_SMALL,
    loader_batches=16,
    loader_photographs=1,
    loader_batch=2,
    evaluated_images=64,
    evaluated_tags=20,
)
CPU = torch.device("cpu")


def test_every_section_measures_and_is_written_down(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    assert benchmark_gpu.main(["--cpu", "--output", str(output)], TINY) == 0
    written = orjson.loads(output.read_bytes())
    assert written["format_version"] == 1 and written["machine"]["torch"] == torch.__version__
    assert list(written["sections"]) == list(benchmark_gpu.SECTIONS)
    for name, section in written["sections"].items():
        assert section["failure"] is None and section["figures"], name
        for figure in section["figures"]:
            assert figure["value"] is not None or figure["note"], figure
    found = {figure["name"]: figure for section in written["sections"].values() for figure in section["figures"]}
    assert found["176 px: useful tokens, 7 buckets"]["reached"] is True
    assert found["step tiny@32 B=2: host reads"]["goal"] is None
    assert found["asymmetric loss 4 x 50: usual, saved a logit"]["value"] > 8


def test_without_timm_its_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    rows = [figure for figure in train_steps(Bench(CPU, TINY)) if "timm" in figure.name]
    assert len(rows) == 2 and all(math.isnan(row.value) and "pip install timm" in row.note for row in rows)


def test_with_timm_its_network_takes_turns_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def create(name: str, *, num_classes: int, **settings: object) -> nn.Module:
        asked.update(name=name, num_classes=num_classes, **settings)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))

    fake = types.ModuleType("timm")
    fake.create_model = create
    fake.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "timm", fake)
    rows = {figure.name: figure for figure in train_steps(Bench(CPU, TINY))}
    assert 0 < rows["step tiny@32 B=2: timm eager / ours"].value < math.inf
    assert "on a GPU alone" in rows["step tiny@32 B=2: timm compiled / ours"].note
    assert asked["name"] == "vit_tiny_patch16_224" and asked["img_size"] == 32 and asked["num_classes"] == 50


def test_the_large_recipe_is_a_case_as_it_stands() -> None:
    config = load_config(Path(__file__).resolve().parents[2] / "configs" / "vit_l_448.yaml", environment={})
    (case,) = [case for case in GPU_SCALE.steps if case.as_recipe]
    assert case.model == config.model and case.optimizer == config.optimizer
    assert case.image_size in [phase.image_size for phase in config.training.phases]


def test_a_recipe_is_measured_with_its_own_optimizer_and_a_new_shape() -> None:
    model = dataclasses.replace(LARGE_MODEL, preset="vit_tiny", depth=3, embed_dim=48)
    case = StepCase("own@32", model, 32, 2, optimizer=LARGE_OPTIMIZER, as_recipe=True)
    bench = Bench(CPU, dataclasses.replace(TINY, steps=(case,)))
    found = {figure.name: figure for figure in train_steps(bench)}
    assert not any("timm" in name for name in found)
    assert found["step own@32 B=2: to compile a new batch shape"].note == "not compiled here"
    ours = OurStep(bench, case)
    assert type(ours.optimizer) is type(create_optimizer(LARGE_OPTIMIZER, ours.model))
    torch._dynamo.reset()
    for block in ours.model.blocks:
        block.compile(backend="eager", fullgraph=True, dynamic=False)
    ours(noise_batch(bench, 2, 32, 32))
    figure = new_shape_figure(bench, "step", case, ours)
    assert figure.note == "1 graph" and figure.value > 0


def test_a_section_that_fails_is_named_and_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(_: Bench) -> Iterator[Figure]:
        yield Figure("before", 1.0)
        raise RuntimeError("CUDA error: an example\nsecond line")

    monkeypatch.setitem(benchmark_gpu.SECTIONS, "loss", breaking)
    output = tmp_path / "gpu.json"
    assert benchmark_gpu.main(["--cpu", "--sections", "loss", "ceilings", "--output", str(output)], TINY) == 1
    sections = orjson.loads(output.read_bytes())["sections"]
    failure = sections["loss"]["failure"]
    assert failure.startswith("RuntimeError: CUDA error: an example (test_benchmark_gpu.py, line ")
    assert [figure["name"] for figure in sections["loss"]["figures"]] == ["before"]
    assert sections["ceilings"]["failure"] is None


@pytest.mark.parametrize("error", [KeyError("a name"), AssertionError(), TypeError("no such argument"), IndexError(3)])
def test_any_error_ends_its_section_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def breaking(_: Bench) -> Iterator[Figure]:
        yield Figure("before", 1.0)
        raise error

    monkeypatch.setitem(benchmark_gpu.SECTIONS, "loss", breaking)
    output = tmp_path / "gpu.json"
    assert benchmark_gpu.main(["--cpu", "--sections", "loss", "ceilings", "--output", str(output)], TINY) == 1
    assert f"loss broke off: {type(error).__name__}: " in capsys.readouterr().out
    sections = orjson.loads(output.read_bytes())["sections"]
    assert sections["loss"]["failure"].startswith(type(error).__name__) and sections["ceilings"]["failure"] is None


def test_what_ends_the_process_leaves_what_was_measured_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ending(_: Bench) -> Iterator[Figure]:
        raise KeyboardInterrupt

    monkeypatch.setitem(benchmark_gpu.SECTIONS, "loss", ending)
    output = tmp_path / "gpu.json"
    with contextlib.suppress(KeyboardInterrupt):
        benchmark_gpu.main(["--cpu", "--sections", "ceilings", "loss", "--output", str(output)], TINY)
    assert list(orjson.loads(output.read_bytes())["sections"]) == ["ceilings"]


def test_a_device_that_cannot_be_tidied_up_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    bench = Bench(CPU, TINY)
    monkeypatch.setattr(bench, "release", breaking)
    outcome = benchmark_gpu.run_section(lambda _: iter([Figure("one", 1.0)]), bench)
    assert outcome.failure is not None and "device-side assert" in outcome.failure and len(outcome.figures) == 1


def test_no_measurement_begins_after_the_time_is_over() -> None:
    bench = Bench(CPU, TINY, seconds=-1)
    with pytest.raises(OutOfTimeError, match="--sections"):
        bench.in_turn({"nothing": lambda: None})
    for name, section in benchmark_gpu.SECTIONS.items():
        outcome = benchmark_gpu.run_section(section, bench)
        assert outcome.failure is not None and "the time is over" in outcome.failure, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_gpu.main([]) == 2
    assert "use --cpu" in capsys.readouterr().err


class CpuAsGpu(Bench):
    """Takes the branches for a GPU on a CPU."""

    def __init__(self, scale: Scale) -> None:
        super().__init__(CPU, scale)
        self.on_gpu = True

    def kernel_seconds(self, work: Callable[[], object], repeats: int = 1) -> float:
        return self.seconds(work, repeats)

    def host_bytes(self, number: int) -> torch.Tensor:
        return torch.zeros(number, dtype=torch.uint8)


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> CpuAsGpu:
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("max_memory_allocated", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 10**9)
    monkeypatch.setattr(steps, "missing_compiler", lambda _: "told to be a GPU")
    monkeypatch.setattr(kernels, "GPU", ("flash", "cudnn"))  # a CPU takes one of them
    varlen = types.ModuleType("varlen")
    varlen.varlen_attn = lambda query, key, value, *_: query + key + value
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", varlen)
    case = StepCase("L@32", _SMALL, 32, 2, least_mfu=0.6, least_images_per_s=1.0, most_gb=85)
    return CpuAsGpu(dataclasses.replace(TINY, steps=(case,)))


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_what_a_gpu_alone_measures_is_measured_against_its_goals(as_gpu: CpuAsGpu) -> None:
    found: dict[str, Figure] = {}
    for name, section in benchmark_gpu.SECTIONS.items():
        outcome = benchmark_gpu.run_section(section, as_gpu)
        assert outcome.failure is None, (name, outcome.failure)
        found |= {figure.name: figure for figure in outcome.figures}
    assert found["step L@32 B=2: peak memory"].reached is True
    assert found["waiting for data, L@32"].goal == 0.005
    assert found["attention alone, useful tokens/s: packed (varlen) / squares"].value > 0
    assert "cudnn" not in found["attention, 16 tokens, head 64: pinned / matmul"].note
    judged = [figure for figure in found.values() if figure.reached is not None]
    assert len(judged) >= 10


def test_attention_is_measured_in_the_layout_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], ...]] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def noting(*inputs: torch.Tensor, **settings: typing.Any) -> torch.Tensor:
        seen.append(tuple((tuple(each.shape), each.stride(), each.storage_offset()) for each in inputs))
        return plain(*inputs, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    Attention(24, 3, qk_norm=False, dropout=0.0)(torch.randn(2, 5, 24), None)
    attention_figure(Bench(CPU, TINY), "attention", (2, 3, 5, 8))
    assert len(seen) > 2 and len(set(seen)) == 1


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("pooling", ["mean", "class_token", "grid"])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_matrix_products_counted_are_those_of_the_formula(registers: int, pooling: str, size: tuple[int, int]) -> None:
    section = dataclasses.replace(_SMALL, pooling=pooling, depth=2, register_tokens=registers)
    model = create_model(section, num_tags=7, image_size=64).eval()
    images = torch.zeros(3, 3, *size, dtype=torch.uint8)
    model(images)  # positions of another grid are worked out once
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        model(images)
    expected = 3 * forward_flops(model.config, *size)
    resized = 0 if size == (64, 64) else _resize_flops(model.config.embed_dim, (4, 4), (3, 5))
    assert counter.get_total_flops() - resized == expected


def _resize_flops(width: int, old: tuple[int, int], new: tuple[int, int]) -> int:
    """Of interpolating the positions, once a batch."""
    return 2 * new[0] * old[0] * old[1] * width + 2 * new[0] * new[1] * old[1] * width


@pytest.mark.parametrize(
    ("preset", "image_size", "teraflops"),
    [("vit_small", 224, 0.0275), ("vit_base", 448, 0.470), ("vit_large", 224, 0.369), ("vit_large", 448, 1.607)],
)
def test_published_sizes_cost_what_is_known(preset: str, image_size: int, teraflops: float) -> None:
    """Forward and backward of an image, as computed elsewhere; the head's 20,000 tags are within the last digit."""
    with torch.device("meta"):
        config = create_model(ModelSection(preset=preset), num_tags=1000, image_size=image_size).config
    assert training_flops(config) / 1e12 == pytest.approx(teraflops, rel=0.01)


def test_saved_bytes_are_those_that_autograd_keeps() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    inputs = torch.randn(4, 8)
    assert saved_bytes(lambda: (inputs @ weight).exp().sum(), [weight]) == 2 * 4 * 8 * 4


def test_a_host_read_is_counted() -> None:
    with OperatorCounter() as counter:
        torch.ones(3).sum().item()
    assert counter.counts["aten::_local_scalar_dense"] == 1
