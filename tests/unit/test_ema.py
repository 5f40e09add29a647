"""The average equals its formula, costs the model nothing, and goes on exactly where it was."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tagger.ema import ExponentialMovingAverage
from tagger.errors import InputError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


@torch.no_grad()
def move(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator))
    model.train()
    model(torch.randn(8, 4, generator=generator))


def test_average_equals_the_formula_in_float64() -> None:
    model = net()
    ema = ExponentialMovingAverage(model, 0.9)
    expected = {name: tensor.double().clone() for name, tensor in model.named_parameters()}
    for step in range(1, 41):
        move(model, step)
        ema.update()
        decay = min(0.9, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.double()
    for name, value in expected.items():
        assert torch.allclose(ema.state_dict()[name].double(), value, rtol=1e-5, atol=1e-6)


def test_average_equals_torchs_after_the_warm_up() -> None:
    model = net()
    ema = ExponentialMovingAverage(model, 0.5)
    ema.num_updates = 1000
    torchs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    torchs.update_parameters(model)  # its first update copies
    for step in range(5):
        move(model, step)
        ema.update()
        torchs.update_parameters(model)
    for name, parameter in torchs.module.named_parameters():
        assert torch.allclose(ema.state_dict()[name], parameter, rtol=1e-6)


def test_buffers_are_copied() -> None:
    model = net()
    ema = ExponentialMovingAverage(model, 0.999)
    for step in range(3):
        move(model, step)
        ema.update()
    for name, buffer in model.named_buffers():
        assert torch.equal(ema.state_dict()[name], buffer)


def test_swapped_evaluates_the_average_and_gives_the_weights_back_bit_for_bit() -> None:
    model = net()
    ema = ExponentialMovingAverage(model, 0.9)
    for step in range(3):
        move(model, step)
        ema.update()
    weights = copy.deepcopy(model.state_dict())
    average = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(KeyboardInterrupt), ema.swapped():
        assert all(torch.equal(tensor, average[name]) for name, tensor in model.state_dict().items())
        with pytest.raises(AssertionError):
            ema.update()
        with pytest.raises(AssertionError):
            ema.state_dict()
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, average[name]) for name, tensor in ema.state_dict().items())
    assert addresses == [parameter.data_ptr() for parameter in model.parameters()]


def test_saved_average_goes_on_bitwise() -> None:
    model = net()
    ema = ExponentialMovingAverage(model, 0.99)
    for step in range(5):
        move(model, step)
        ema.update()
    saved = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    other = copy.deepcopy(model)
    again = ExponentialMovingAverage(other, 0.99)
    again.load_state_dict(saved, ema.num_updates)
    for step in range(5, 9):
        for each, average in ((model, ema), (other, again)):
            move(each, step)
            average.update()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ema.state_dict().items())


def test_names_are_clean_when_the_model_is_compiled() -> None:
    model = net()
    compiled = nn.Module()  # as torch.compile wraps a model
    compiled.add_module("_orig_mod", model)
    ema = ExponentialMovingAverage(compiled, 0.9)
    assert ema.state_dict().keys() == model.state_dict().keys()


def test_tied_weights_have_one_average() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model = Tied()
    ema = ExponentialMovingAverage(model, 0.9)
    move_to = torch.ones(3, 3)
    with torch.no_grad():
        model.a.weight.copy_(move_to)
    start = ema.state_dict()["a.weight"].clone()
    ema.update()
    assert torch.allclose(ema.state_dict()["a.weight"], start + (1 - 2 / 11) * (move_to - start))
    with ema.swapped():
        assert torch.equal(model.a.weight, model.b.weight) and not torch.equal(model.a.weight, move_to)


def test_an_average_of_another_model_is_refused() -> None:
    ema = ExponentialMovingAverage(net(), 0.9)
    saved = dict(ema.state_dict())
    saved["2.weight"] = torch.zeros(3, 6)
    with pytest.raises(InputError, match=r"2\.weight is float32 \[3, 6\] in the file and float32 \[2, 6\] here"):
        ema.load_state_dict(saved, 1)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 1.5])
def test_a_decay_outside_0_to_1_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="not between 0 and 1"):
        ExponentialMovingAverage(net(), decay)


def test_the_weights_are_scored_beside_the_average_in_one_pass() -> None:
    model = net()
    ema = ExponentialMovingAverage(model, 0.9)
    for step in range(4):
        move(model, step)
        ema.update()
    model.eval()
    inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(9))
    own = model(inputs)
    with ema.swapped():
        averaged = model(inputs)
        online = ema.online_model()
        assert not online.training
        with torch.inference_mode():
            found = [each(inputs) for each in (model, online, model, online)]
    assert torch.equal(found[0], averaged) and torch.equal(found[2], averaged)
    assert torch.equal(found[1], own) and torch.equal(found[3], own) and not torch.equal(own, averaged)
    assert torch.equal(model(inputs), own)
    ema.update()
    with pytest.raises(AssertionError, match="its own weights already"):
        online(inputs)


def test_a_forward_pass_that_fails_leaves_the_average_in_the_model() -> None:
    model = net().eval()
    ema = ExponentialMovingAverage(model, 0.9)
    move(model, 1)
    own = copy.deepcopy(model.state_dict())
    with ema.swapped():
        held = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match="shape"):
            ema.online_model()(torch.randn(3, 5))
        assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
