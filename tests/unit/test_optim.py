"""Our optimizers move weights as torch's do, and not at all when told that the gradient is bad."""

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from tagger.errors import InputError
from tagger.optim import (
    AdamW,
    DeviceSkipping,
    Muon,
    MuonAdamW,
    load_optimizer,
    optimizer_settings,
    optimizer_tensors,
    parameter_names,
    skipping,
)
from tagger.optim.muon import lr_factor, orthogonalize

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.wide, self.tall = nn.Linear(24, 8, bias=False), nn.Linear(8, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.wide(self.tall(x))


def gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


def both(model: nn.Module) -> MuonAdamW:
    muon = Muon(matrices(model), lr=0.02, weight_decay=0.1)
    rest = [p for p in model.parameters() if p.ndim != 2]
    return MuonAdamW(muon, AdamW([{"params": rest, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.99), eps=1e-8))


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value.clone() for state in optimizer.state.values() for value in state.values()]


@pytest.mark.parametrize("adjustment", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torchs_to_rounding(adjustment: str, nesterov: bool) -> None:
    ours, theirs = Net(), Net()
    settings = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": adjustment}
    mine = Muon(matrices(ours), **settings)
    torchs = torch.optim.Muon(matrices(theirs), **settings)
    start = [p.detach().clone() for p in matrices(ours)]
    for step in range(5):
        for model, optimizer in ((ours, mine), (theirs, torchs)):
            gradients(model, step)
            optimizer.step()
    for a, b, first in zip(matrices(ours), matrices(theirs), start, strict=True):
        # Both iterate in bfloat16 (or float32), whose rounding differs by the order of sums: 2 % of the way gone.
        assert (a - b).norm() <= 0.02 * (b - first).norm()
        assert torch.equal(mine.state[a]["momentum_buffer"], torchs.state[b]["momentum_buffer"])


def test_muon_moves_a_kernel_as_the_matrix_of_its_output_channels() -> None:
    generator = torch.Generator().manual_seed(3)
    kernel = nn.Parameter(torch.randn(6, 4, 3, 3, generator=generator))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    optimizers = [Muon([p], lr=0.02, weight_decay=0.1) for p in (kernel, matrix)]
    for _ in range(3):
        gradient = torch.randn(6, 4, 3, 3, generator=generator)
        kernel.grad, matrix.grad = gradient, gradient.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_muon_refuses_a_vector() -> None:
    with pytest.raises(ValueError, match=r"a parameter has shape \[8\]"):
        Muon([nn.Parameter(torch.zeros(8))], lr=0.02, weight_decay=0.0)


@pytest.mark.parametrize("shape", [(4, 16, 16), (3, 8, 32), (3, 32, 8)])
def test_orthogonalize_is_the_polar_factor_with_singular_values_near_1(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    found = orthogonalize(x, COEFFICIENTS, 5, 1e-7).double()
    # In the bases of the polar factor the result is diagonal, up to bfloat16.
    core = left.mT @ found @ right.mT
    values = torch.diagonal(core, dim1=-2, dim2=-1)
    assert float(values.min()) > 0.3 and float(values.max()) < 1.3
    assert (core - torch.diag_embed(values)).abs().max() < 0.05


def test_orthogonalize_of_zero_is_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4), COEFFICIENTS, 5, 1e-7).float(), torch.zeros(2, 3, 4))


def test_lr_factor_matches_torchs() -> None:
    from torch.optim._muon import _adjust_lr  # no public name for it

    for adjustment in (None, "original", "match_rms_adamw"):
        for rows, columns in ((8, 8), (24, 8), (8, 24)):
            assert lr_factor(adjustment, rows, columns) == _adjust_lr(1.0, adjustment, torch.Size((rows, columns)))


@pytest.mark.parametrize("proportions", [(1, 1), (3, 1), (4, 1), (1, 4)])
def test_a_step_of_muon_changes_a_layer_as_much_at_any_width(proportions: tuple[int, int]) -> None:
    """What makes its learning rate one for all widths: of outputs whose inputs are of size 1."""
    changes = []
    for width in (32, 64, 128, 256):
        generator = torch.Generator().manual_seed(width)
        rows, columns = (proportion * width for proportion in proportions)
        matrix = nn.Parameter(torch.zeros(rows, columns))
        matrix.grad = torch.randn(rows, columns, generator=generator)
        Muon([matrix], lr=0.02, weight_decay=0.0, adjust_lr_fn="original").step()
        inputs = torch.randn(64, columns, generator=generator)
        changes.append(float((inputs @ matrix.detach().T).square().mean().sqrt()) / 0.02)
    assert min(changes) > 0.7 and max(changes) < 1.1 and max(changes) < 1.3 * min(changes), changes


@pytest.mark.parametrize("elements", [64, 1])
def test_stacks_of_a_few_at_a_time_move_as_one(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = Net(), Net()
    one, few = both(whole), both(parts)
    for step in range(3):
        gradients(whole, step)
        gradients(parts, step)
        one.step()
        with monkeypatch.context() as patch:
            patch.setattr(skipping, "STACK_ELEMENTS", elements)
            few.step()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-2, atol=1e-4)  # the order of sums, in bfloat16


def test_adamw_equals_torchs() -> None:
    ours, theirs = Net(), Net()
    mine = AdamW([{"params": list(ours.parameters())}], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    torchs = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)
    for step in range(10):
        for model, optimizer in ((ours, mine), (theirs, torchs)):
            gradients(model, step)
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_together_they_move_as_alone() -> None:
    together, alone = Net(), Net()
    one = both(together)
    two = both(alone)
    for step in range(4):
        gradients(together, step)
        gradients(alone, step)
        one.step()
        two.muon.step()
        two.adamw.step()
    assert all(torch.equal(a, b) for a, b in zip(together.parameters(), alone.parameters(), strict=True))
    one.zero_grad()
    assert all(p.grad is None for p in together.parameters())


@pytest.mark.parametrize(
    "make", [both, lambda m: AdamW([{"params": list(m.parameters())}], lr=1e-2, betas=(0.9, 0.99), eps=1e-8)]
)
def test_found_inf_leaves_weights_and_state_as_they_are(make) -> None:  # type: ignore[no-untyped-def]
    model = Net()
    optimizer = make(model)
    assert isinstance(optimizer, DeviceSkipping) and optimizer.skips_on_device
    for bad_from_the_start in (True, False):
        if not bad_from_the_start:
            gradients(model, 1)
            optimizer.found_inf = torch.zeros(())
            optimizer.step()
        before, state = copy.deepcopy(model.state_dict()), state_of(optimizer)
        gradients(model, 2, scale=float("nan"))
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(bool(torch.isfinite(value).all()) for value in state_of(optimizer))
        if not bad_from_the_start:
            assert all(torch.equal(a, b) for a, b in zip(state, state_of(optimizer), strict=True))


def test_found_inf_of_0_changes_nothing_but_rounding() -> None:
    plain, told = Net(), Net()
    first, second = both(plain), both(told)
    second.found_inf = torch.zeros(())
    for step in range(4):
        gradients(plain, step)
        gradients(told, step)
        first.step()
        second.step()
    for a, b in zip(plain.parameters(), told.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


def test_gradients_are_divided_by_grad_scale() -> None:
    plain, scaled = Net(), Net()
    first, second = both(plain), both(scaled)
    second.grad_scale, second.found_inf = torch.tensor(8.0), torch.zeros(())
    for step in range(4):
        gradients(plain, step)
        gradients(scaled, step, scale=8.0)
        first.step()
        second.step()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shared", [True, False])
def test_state_goes_on_bitwise_in_a_fresh_optimizer(shared: bool) -> None:
    model = Net()
    optimizer = both(model)
    for step in range(3):
        gradients(model, step)
        optimizer.step()
    again = copy.deepcopy(model)
    fresh = both(again)
    if shared:
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        names = parameter_names(model)
        saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, names).items()}
        load_optimizer(fresh, parameter_names(again), saved, optimizer_settings(optimizer, names))
    for step in range(3, 6):
        for each, moving in ((model, optimizer), (again, fresh)):
            gradients(each, step)
            moving.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    # One learning rate moves both parts: groups and state are shared, also after loading.
    for group in fresh.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(again.state_dict())
    gradients(again, 9)
    fresh.step()
    assert all(torch.equal(before[name], value) for name, value in again.state_dict().items())


def test_state_names_say_whose_they_are() -> None:
    model = Net()
    optimizer = both(model)
    gradients(model, 0)
    optimizer.step()
    names = set(optimizer_tensors(optimizer, parameter_names(model)))
    assert {"blocks.0.weight/momentum_buffer", "blocks.0.bias/exp_avg", "blocks.0.bias/step"} <= names


def settings_and_state(weight_decay: float = 0.1) -> tuple[Net, AdamW, dict, dict]:
    model = Net()
    optimizer = AdamW(
        [{"params": list(model.parameters())}], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=weight_decay
    )
    gradients(model, 0)
    optimizer.step()
    names = parameter_names(model)
    return model, optimizer, optimizer_tensors(optimizer, names), optimizer_settings(optimizer, names)


def test_a_setting_of_the_checkpoint_never_beats_this_runs(caplog: pytest.LogCaptureFixture) -> None:
    _, _, saved, settings = settings_and_state(weight_decay=0.1)
    model, optimizer, _, _ = settings_and_state(weight_decay=0.3)
    with caplog.at_level(logging.WARNING):
        load_optimizer(optimizer, parameter_names(model), saved, settings)
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    assert "weight_decay was 0.1, is 0.3 now" in caplog.text and len(caplog.records) == 1


def test_state_of_another_optimizer_or_model_is_refused() -> None:
    model, optimizer, saved, settings = settings_and_state()
    names = parameter_names(model)
    with pytest.raises(InputError, match=r"AdamW, this run has MuonAdamW.*\(checkpoint\.init_from=RUN\)"):
        load_optimizer(both(model), names, saved, settings)
    smaller = copy.deepcopy(settings)
    smaller["groups"][0]["parameters"].remove("wide.weight")
    with pytest.raises(InputError, match=r"the first: wide\.weight"):
        load_optimizer(optimizer, names, saved, smaller)
    for name in ("nobody.weight/exp_avg", "wide.weight/exp_avg"):
        with pytest.raises(InputError, match=f"{name} .* fits no parameter"):
            load_optimizer(optimizer, names, {**saved, name: torch.zeros(2, 2)}, settings)
