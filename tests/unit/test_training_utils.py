"""Bad gradients do no harm, and what the loop stands on does what its formula says."""

import copy
import logging
import random
import typing
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from Configuration_System import OptimizerSection
from model_architecture import VisionTransformerConfig, create_model
from tagger.compilation import compile_blocks, missing_compiler
from tagger.ema import ExponentialMovingAverage
from tagger.errors import InputError
from tagger.optim import optimizer_tensors, parameter_names
from tagger.optim.groups import layers_below_head
from training_utils import (
    OPTIMIZERS,
    EarlyStopping,
    MixedPrecisionTrainer,
    compile_model,
    create_optimizer,
    parameter_groups,
    resolve_device,
    seed_everything,
)

CPU = torch.device("cpu")
NAN = float("nan")
Name: typing.TypeAlias = typing.Literal["adamw", "adafactor", "muon"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(x))


class Toy(nn.Module):
    """The kinds of parameters that a tagger has: stem, norm, position embedding, blocks, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.pos_embed = nn.Parameter(torch.zeros(1, 8))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def section(name: Name = "adamw", **changes: typing.Any) -> OptimizerSection:
    return OptimizerSection(name=name, **changes)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, precision: MixedPrecisionTrainer, steps: range) -> None:
    for step in steps:
        images = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        precision.backward((model(images) - images[:, :3]).square().mean())
        precision.step(optimizer, list(model.parameters()), 1.0)


# Precision and bad gradients


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("poison", [NAN, float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(name: Name, poison: float) -> None:
    seed_everything(0)
    model, undisturbed = Toy(), Toy()
    undisturbed.load_state_dict(model.state_dict())
    optimizer, other = create_optimizer(section(name), model), create_optimizer(section(name), undisturbed)
    precision, other_precision = MixedPrecisionTrainer("off", CPU), MixedPrecisionTrainer("off", CPU)
    train(model, optimizer, precision, range(2))
    train(undisturbed, other, other_precision, range(2))

    weights = copy.deepcopy(model.state_dict())
    state = {k: v.clone() for k, v in optimizer_tensors(optimizer, parameter_names(model)).items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    typing.cast(Tensor, model.head.weight.grad)[0, 0] = poison
    norm, _ = precision.step(optimizer, list(model.parameters()), 1.0)
    assert not bool(torch.isfinite(norm)) and int(precision.nonfinite_steps) == 1
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(state[k], v) for k, v in optimizer_tensors(optimizer, parameter_names(model)).items())

    train(model, optimizer, precision, range(2, 4))
    train(undisturbed, other, other_precision, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), undisturbed.parameters(), strict=True))


@pytest.mark.parametrize("clip", [None, 0.5, 100.0])
@pytest.mark.parametrize("fused", [True, False])
def test_clipping_equals_torchs(clip: float | None, fused: bool) -> None:
    ours, theirs = Toy(), Toy()
    theirs.load_state_dict(ours.state_dict())
    if fused:
        optimizer: torch.optim.Optimizer = create_optimizer(section(weight_decay=0.0), ours)
    else:
        optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3, weight_decay=0.0)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    precision = MixedPrecisionTrainer("off", CPU)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        norm, _ = precision.step(optimizer, list(ours.parameters()), clip)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), float("inf") if clip is None else clip)
        assert torch.allclose(norm, expected)
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_an_optimizer_that_cannot_skip_on_the_device_skips_on_the_host() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, NAN)
    precision = MixedPrecisionTrainer("off", CPU)
    precision.step(optimizer, list(model.parameters()), 1.0)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert int(precision.nonfinite_steps) == 1


class HostReads(TorchDispatchMode):
    """Counts the reads of a device value by the host, each of which would stall a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_an_update_reads_nothing_back_from_the_device(name: Name) -> None:
    model = Toy()
    optimizer, precision = create_optimizer(section(name), model), MixedPrecisionTrainer("off", CPU)
    ema = ExponentialMovingAverage(model, 0.9)
    loss = model(torch.randn(4, 4)).sum()
    with HostReads() as reads:
        precision.backward(loss)
        precision.step(optimizer, list(model.parameters()), 1.0)
        ema.update()
    assert reads.count == 0


def scaled_trainer() -> MixedPrecisionTrainer:
    """Loss scaling as on CUDA, here on the CPU, where the public mode refuses it."""
    precision = MixedPrecisionTrainer("off", CPU)
    precision.dtype = torch.float16
    precision._scale = torch.tensor(65536.0)
    return precision


def test_loss_scaling_follows_grad_scaler() -> None:
    precision = scaled_trainer()
    reference = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=2000)
    a, b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    b.load_state_dict(a.state_dict())
    mine = create_optimizer(section(weight_decay=0.0), a)
    theirs = torch.optim.AdamW(b.parameters(), lr=1e-3, weight_decay=0.0)
    precision._good_steps.fill_(1990)
    reference.load_state_dict({**reference.state_dict(), "_growth_tracker": 1990})
    random_bad = random.Random(0)
    for step in range(40):
        bad = random_bad.random() < 0.1 and step > 15
        x = torch.full((1, 2), NAN if bad else 0.01 * step)
        mine.zero_grad()
        theirs.zero_grad()
        precision.backward(a(x).sum())
        precision.step(mine, list(a.parameters()), None)
        reference.scale(b(x).sum()).backward()
        reference.step(theirs)
        reference.update()
        assert float(precision._scale) == reference.get_scale()
    assert torch.allclose(a.weight, b.weight, rtol=1e-5)
    assert int(precision.nonfinite_steps) == 0  # the scale was above 1: it was finding its place


def test_loss_scaling_counts_what_scaling_cannot_explain_and_resumes() -> None:
    precision = scaled_trainer()
    precision._scale.fill_(1.0)
    model = nn.Linear(2, 1)
    optimizer = create_optimizer(section(), model)
    precision.backward(model(torch.full((1, 2), NAN)).sum())
    precision.step(optimizer, list(model.parameters()), 1.0)
    assert int(precision.nonfinite_steps) == 1 and float(precision._scale) == 0.5
    again = scaled_trainer()
    again.load_state_dict(precision.state_dict())
    assert again.state_dict() == precision.state_dict()
    plain = MixedPrecisionTrainer("off", CPU)
    plain.load_state_dict(precision.state_dict())
    assert float(plain._scale) == 1.0 and int(plain.nonfinite_steps) == 1


def test_precision_modes_on_the_cpu() -> None:
    x = torch.ones(2, 2)
    for mode, expected in (("auto", torch.float32), ("off", torch.float32), ("bf16", torch.bfloat16)):
        with MixedPrecisionTrainer(typing.cast(typing.Any, mode), CPU).autocast():
            assert (x @ x).dtype == expected
    with pytest.raises(InputError, match="fp16 needs a CUDA device, this run is on cpu"):
        MixedPrecisionTrainer("fp16", CPU)


# Optimizers by name


def test_optimizer_names_are_the_configured_ones() -> None:
    assert set(OPTIMIZERS.names()) == set(typing.get_args(typing.get_type_hints(OptimizerSection)["name"]))


def names_in(model: nn.Module, parameters: Sequence[Tensor]) -> set[str]:
    wanted = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    model = Toy()
    model.blocks[0].requires_grad_(False)
    decayed, others = parameter_groups(model, 1e-3, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert names_in(model, decayed["params"]) == {"stem.weight", "blocks.1.fc.weight", "head.weight"}
    assert {"pos_embed", "norm.weight", "head.bias"} <= names_in(model, others["params"])
    assert not any("blocks.0" in name for name in names_in(model, decayed["params"] + others["params"]))


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else() -> None:
    model = Toy()
    optimizer = create_optimizer(section("muon", learning_rate=1e-3, muon_learning_rate=0.02, weight_decay=0.1), model)
    by_rate = {group["initial_lr"]: group for group in optimizer.param_groups if group["weight_decay"] > 0}
    assert names_in(model, by_rate[0.02]["params"]) == {"blocks.0.fc.weight", "blocks.1.fc.weight"}
    assert names_in(model, by_rate[1e-3]["params"]) == {"stem.weight", "head.weight"}
    every = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(every) == len({id(p) for p in every}) == len(list(model.parameters()))
    assert all(group["initial_lr"] == group["lr"] for group in optimizer.param_groups)


def test_muon_takes_the_inner_kernels_of_a_convolutional_stem() -> None:
    model = create_model(VisionTransformerConfig(16, 8, 16, 1, 2, 2.0, num_tags=3, stem="conv"))
    optimizer = create_optimizer(section("muon", learning_rate=1e-3, muon_learning_rate=0.02), model)
    muons = [p for group in optimizer.param_groups if group["initial_lr"] == 0.02 for p in group["params"]]
    kernels = {f"stem.stages.{stage}.{name}.weight" for stage in (0, 1) for name in ("conv1", "conv2", "skip")}
    matrices = {f"blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert names_in(model, muons) == kernels | matrices


def test_muon_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match=r"no matrices in `blocks`; use optimizer\.name=adamw"):
        create_optimizer(section("muon"), nn.Linear(2, 2))


class Tagger(nn.Module):
    """Names in the order in which the network is built."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 8))
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_layer_decay_slows_each_layer_by_its_distance_from_the_head(name: Name) -> None:
    model = Tagger()
    optimizer = create_optimizer(section(name, learning_rate=1.0, muon_learning_rate=2.0, layer_decay=0.5), model)
    rates = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {parameter: rates[id(p)] for parameter, p in model.named_parameters()}
    own = 2.0 if name == "muon" else 1.0
    assert found == {
        "head.weight": 1.0,
        "head.bias": 1.0,
        "norm.weight": 1.0,
        "norm.bias": 1.0,
        "blocks.1.fc.weight": own / 2,
        "blocks.1.fc.bias": 1 / 2,
        "blocks.0.fc.weight": own / 4,
        "blocks.0.fc.bias": 1 / 4,
        "stem.weight": 1 / 8,
        "stem.bias": 1 / 8,
        "pos_embed": 1 / 8,
    }
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(model.stem.weight)] == 0.05 and decays[id(model.pos_embed)] == 0.0


def test_layer_decay_knows_the_layers_of_the_real_network() -> None:
    model = create_model(VisionTransformerConfig(16, 8, 16, 2, 2, 2.0, num_tags=3, stem="conv", pooling="class_token"))
    below = layers_below_head(model)
    found = {name.partition(".")[0]: below[id(p)] for name, p in model.named_parameters() if "blocks" not in name}
    assert found == {"pos_embed": 3, "cls_token": 3, "stem": 3, "norm": 0, "head": 0}
    assert {below[id(p)] for p in model.blocks[0].parameters()} == {2}
    assert {below[id(p)] for p in model.blocks[1].parameters()} == {1}


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_rates_of_a_group_are_its_own_where_parameters_are_moved_together(name: Name) -> None:
    """Weights of one shape in several groups move as they would in optimizers of their own."""
    together, alone = Tagger(), Tagger()
    alone.load_state_dict(together.state_dict())
    one = create_optimizer(section(name, layer_decay=0.5, weight_decay=0.1), together)
    # Each block's weight by itself: the others have no gradient.
    for step in range(3):
        for model in (together, alone):
            generator = torch.Generator().manual_seed(step)
            for block in model.blocks:
                block.fc.weight.grad = torch.randn(8, 8, generator=generator)
        one.step()
    for place, block in enumerate(alone.blocks):
        rate = 0.5 ** (2 - place)
        rates = {"learning_rate": 1e-3 * rate, "muon_learning_rate": 0.02 * rate}
        two = create_optimizer(section(name, weight_decay=0.1, **rates), alone)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            drawn = [torch.randn(8, 8, generator=generator) for _ in alone.blocks]
            alone.zero_grad(set_to_none=True)
            block.fc.weight.grad = drawn[place]
            two.step()
        assert torch.allclose(block.fc.weight, together.blocks[place].fc.weight, rtol=1e-5, atol=1e-7)


def test_layer_decay_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match=r"optimizer\.layer_decay needs a model with `blocks`.*set it to null"):
        create_optimizer(section(layer_decay=0.75), nn.Linear(2, 2))


# The rest


def test_early_stopping_waits_for_patience_checks_without_improvement() -> None:
    stopping = EarlyStopping(2, min_delta=0.1)
    assert [stopping.update(v) for v in (0.5, 0.55, 0.7, 0.75, NAN)] == [False, False, False, False, True]
    assert stopping.best == 0.7
    falling = EarlyStopping(1, higher_is_better=False)
    assert [falling.update(v) for v in (3.0, 2.0, 2.0)] == [False, False, True]


def test_early_stopping_resumes_for_the_same_metric_only(caplog: pytest.LogCaptureFixture) -> None:
    stopping = EarlyStopping(3, metric="val/mAP")
    stopping.update(0.5)
    stopping.update(0.4)
    again = EarlyStopping(3, metric="val/mAP")
    again.load_state_dict(stopping.state_dict())
    assert (again.best, again.bad_checks) == (0.5, 1)
    other = EarlyStopping(3, higher_is_better=False, metric="val/loss")
    other.load_state_dict(stopping.state_dict())
    assert other.best is None and "now val/loss instead of val/mAP" in caplog.text
    elsewhere = EarlyStopping(3, metric="val/mAP", yardstick="other images")
    elsewhere.load_state_dict(stopping.state_dict())
    assert (elsewhere.best, elsewhere.bad_checks) == (None, 0) and "measured on other held-out images" in caplog.text
    elsewhere.update(0.3)
    again.load_state_dict(elsewhere.state_dict())
    assert (again.best, again.bad_checks) == (0.5, 1)  # and not the other way round either


def test_seeding_repeats_every_generator() -> None:
    def draws() -> tuple[float, ...]:
        seed_everything(7)
        return (random.random(), float(np.random.rand()), float(torch.rand(())))

    assert draws() == draws()


def test_devices() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in {"cpu", "cuda", "mps"}
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"training\.device=cuda, but torch .* use training\.device=auto"):
            resolve_device("cuda")


def test_compiling_falls_back_with_one_line_that_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/compiler")
    assert missing_compiler(torch.device("mps")) is not None
    with caplog.at_level(logging.WARNING):
        assert compile_model(Toy(), "off", CPU) is False
        assert compile_model(Toy(), "auto", CPU) is False
        assert caplog.text == ""
        assert compile_model(Toy(), "on", CPU) is False
    assert len(caplog.records) == 1 and "no C++ compiler is found (looked for /nowhere/compiler" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler(CPU) is not None, reason="needs a C++ compiler")
def test_compiled_blocks_compute_the_same_under_the_same_names() -> None:
    model = Toy().eval()
    x = torch.randn(4, 4)
    expected, names = model(x), list(model.state_dict())
    assert compile_model(model, "on", CPU)
    assert torch.allclose(model(x), expected, atol=1e-6) and list(model.state_dict()) == names
    whole = nn.Linear(2, 2)
    assert compile_blocks(whole, (), "on", CPU)
