"""Adafactor moves weights by its formula, keeps little, goes on bitwise and leaves out what is not finite."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tagger.optim import (
    Adafactor,
    load_optimizer,
    optimizer_settings,
    optimizer_stand_ins,
    optimizer_tensors,
    parameter_names,
    skipping,
)

SHAPES = {
    "wide": (40, 96),
    "tall": (64, 33),
    "twin": (40, 96),
    "kernel": (32, 8, 3, 3),
    "narrow": (8, 200),
    "bias": (96,),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))


def gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        # Rows and columns of very different size: what the second moment is for.
        sizes = torch.rand(parameter.shape[0], generator=generator).pow(4).reshape(-1, *[1] * (parameter.ndim - 1))
        parameter.grad = torch.randn(parameter.shape, generator=generator) * sizes * 1e-3 * scale


def made(model: nn.Module, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.1) -> Adafactor:
    return Adafactor([{"params": list(model.parameters())}], lr=1e-2, betas=betas, weight_decay=weight_decay)


def by_formula(weights: Tensor, grads: list[Tensor], betas: tuple[float, float], lr: float, decay: float) -> Tensor:
    """float64, one parameter, straight from Shazeer & Stern 2018, algorithm 4, with Zhai et al. 2022's changes."""
    p = weights.double().reshape(weights.shape[0], -1)
    factored = min(p.shape) >= 32 and weights.ndim > 1
    v, r, c, m = torch.zeros_like(p), torch.zeros(p.shape[0]).double(), torch.zeros(p.shape[1]).double(), p * 0
    for t, gradient in enumerate(grads, start=1):
        g = gradient.double().reshape(p.shape)
        beta2 = min(betas[1], 1 - t**-0.8)
        squares = g.square() + 1e-30
        r, c = (beta2 * mean + (1 - beta2) * squares.mean(side) for mean, side in ((r, 1), (c, 0)))
        v = torch.outer(r, c) / r.mean() if factored else beta2 * v + (1 - beta2) * squares
        m = betas[0] * m + (1 - betas[0]) * g / v.sqrt()
        p = p - lr * (m + decay * p)
    return p.reshape(weights.shape)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
@pytest.mark.parametrize("stack_elements", [1 << 24, 1])
def test_moves_by_the_formula(betas: tuple[float, float], stack_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skipping, "STACK_ELEMENTS", stack_elements)
    model = Net()
    start, seen = copy.deepcopy(model), {name: [] for name in SHAPES}
    optimizer = made(model, betas)
    for step in range(8):
        gradients(model, step)
        for name, parameter in model.named_parameters():
            seen[name].append(parameter.grad.clone())
        optimizer.step()
    for name, first in start.named_parameters():
        expected = by_formula(first.detach(), seen[name], betas, lr=1e-2, decay=0.1)
        gone = (expected - first).norm()
        # The momentum is kept in bfloat16, 8 bits of each value.
        assert (model.get_parameter(name) - expected).norm() < (5e-3 if betas[0] else 1e-5) * gone, name
        assert gone > 0.01 * first.norm()


def test_second_moments_are_torchs() -> None:
    ours, theirs = Net(), Net()
    mine = made(ours)
    torchs = torch.optim.Adafactor([theirs.wide, theirs.tall, theirs.bias], lr=1e-2, beta2_decay=-0.8)
    for step in range(6):
        gradients(ours, step)
        gradients(theirs, step)
        mine.step()
        torchs.step()
    for name in ("wide", "tall"):
        state, expected = mine.state[ours.get_parameter(name)], torchs.state[theirs.get_parameter(name)]
        assert torch.allclose(state["row_variance"], expected["row_var"].flatten(), rtol=1e-5)
        assert torch.allclose(state["column_variance"], expected["col_var"].flatten(), rtol=1e-5)
    assert torch.allclose(mine.state[ours.bias]["variance"], torchs.state[theirs.bias]["variance"], rtol=1e-5)


def test_keeps_a_little_over_2_bytes_a_parameter() -> None:
    layer = nn.Linear(256, 1024)
    optimizer = made(layer)
    gradients(layer, 0)
    optimizer.step()
    held = sum(value.nbytes for value in optimizer.state[layer.weight].values())
    assert held / layer.weight.numel() < 2.05


def test_a_bad_gradient_changes_nothing_also_before_the_first_good_one() -> None:
    model, undisturbed = Net(), Net()
    optimizer, other = made(model), made(undisturbed)
    for good in (0, 1, 2):
        before = copy.deepcopy(model.state_dict())
        gradients(model, 7, scale=float("inf"))
        optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.tensor(float("nan"))
        optimizer.step()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        for each, moving in ((model, optimizer), (undisturbed, other)):
            gradients(each, good)
            moving.found_inf, moving.grad_scale = torch.zeros(()), torch.ones(())
            moving.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), undisturbed.parameters(), strict=True))


def test_gradients_are_divided_by_grad_scale_and_stay_as_they_are() -> None:
    plain, scaled = Net(), Net()
    first, second = made(plain), made(scaled)
    second.grad_scale = torch.tensor(8.0)
    for step in range(3):
        gradients(plain, step)
        gradients(scaled, step, scale=8.0)
        held = scaled.wide.grad.clone()
        first.step()
        second.step()
        assert torch.equal(scaled.wide.grad, held)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), scaled.parameters(), strict=True))


def test_a_gradient_of_zero_moves_nothing_but_by_weight_decay() -> None:
    model = Net()
    optimizer, before = made(model), copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, before[name] * (1 - 1e-2 * 0.1))


def test_goes_on_bitwise_from_saved_state() -> None:
    model = Net()
    optimizer = made(model)
    names = parameter_names(model)
    forms = optimizer_stand_ins(optimizer, names)
    for step in range(3):
        gradients(model, step)
        optimizer.step()
    tensors = optimizer_tensors(optimizer, names)
    said = {name: (form.shape, form.dtype) for name, form in forms.items()}
    assert said == {name: (t.shape, t.dtype) for name, t in tensors.items() if not name.endswith("/step")}
    again = copy.deepcopy(model)
    fresh = made(again)
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    load_optimizer(fresh, parameter_names(again), saved, optimizer_settings(optimizer, names))
    assert all(state["momentum"].dtype is torch.bfloat16 for state in fresh.state.values())
    for step in range(3, 5):
        for each, moving in ((model, optimizer), (again, fresh)):
            gradients(each, step)
            moving.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
