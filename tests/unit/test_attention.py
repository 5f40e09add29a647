"""Which attention kernel is pinned: the fastest by a timing, timed once, and only where there is a choice."""

import contextlib
import logging
from collections.abc import Iterator

import pytest
import torch
import torch.compiler.config as compiler_config
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from model_architecture import SimplifiedTagger, VisionTransformerConfig
from tagger.attention import AttentionShape, BackendChooser, time_backend
from tagger.compilation import missing_compiler

FLASH, CUDNN, EFFICIENT = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
CARD = torch.device("cuda", 0)
SHAPE = AttentionShape(heads=16, head_dim=64, tokens=784, dtype=torch.bfloat16, masked=False, trains=True)


class FakeTimer:
    """Seconds from a table; a kernel that is not in it cannot do the shape."""

    def __init__(self, seconds: dict[SDPBackend, float]) -> None:
        self.seconds = seconds
        self.asked: list[tuple[AttentionShape, SDPBackend]] = []

    def __call__(self, shape: AttentionShape, backend: SDPBackend, device: torch.device) -> float:
        assert device == CARD
        self.asked.append((shape, backend))
        if backend not in self.seconds:
            raise RuntimeError("No available kernel. Aborting execution.")
        return self.seconds[backend]


def _order_within(context: contextlib.AbstractContextManager[object]) -> list[SDPBackend]:
    with context:
        return list(_cur_sdpa_kernel_backends(with_priority=True))


@pytest.fixture(autouse=True)
def torch_order_is_put_back() -> Iterator[None]:
    before = _cur_sdpa_kernel_backends(with_priority=True)
    yield
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


@pytest.mark.parametrize(
    ("seconds", "order"),
    [
        ({FLASH: 3.0, CUDNN: 2.0, EFFICIENT: 4.0}, [CUDNN, FLASH, EFFICIENT]),
        ({FLASH: 3.0, CUDNN: 9.0, EFFICIENT: 1.0}, [EFFICIENT, FLASH, CUDNN]),
        ({CUDNN: 2.0, EFFICIENT: 1.5}, [EFFICIENT, CUDNN]),
        ({FLASH: 1.01, CUDNN: 1.0, EFFICIENT: 1.2}, [FLASH, CUDNN, EFFICIENT]),  # equal but for noise
    ],
)
def test_the_fastest_kernel_comes_first_and_the_others_stay_behind_it(
    seconds: dict[SDPBackend, float], order: list[SDPBackend]
) -> None:
    assert _order_within(BackendChooser(FakeTimer(seconds)).pinned(SHAPE, CARD)) == [*order, SDPBackend.MATH]


def test_a_shape_is_timed_once_and_each_shape_by_itself() -> None:
    timer = FakeTimer({FLASH: 3.0, CUDNN: 2.0, EFFICIENT: 4.0})
    chooser = BackendChooser(timer)
    other = AttentionShape(16, 64, 196, torch.bfloat16, masked=False, trains=True)
    for shape in (SHAPE, other, SHAPE, other):
        _order_within(chooser.pinned(shape, CARD))
    assert [shape for shape, _ in timer.asked] == [SHAPE] * 3 + [other] * 3


def test_what_is_compiled_is_cached_under_its_kernels() -> None:
    before = compiler_config.cache_key_tag
    with BackendChooser(FakeTimer({FLASH: 3.0, CUDNN: 2.0})).pinned(SHAPE, CARD):
        assert compiler_config.cache_key_tag == f"{before} attention cudnn flash"
    assert compiler_config.cache_key_tag == before


class PlainAttention(torch.nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler(torch.device("cpu")) is not None, reason="needs a C++ compiler")
def test_what_an_earlier_run_compiled_does_not_bring_its_kernel() -> None:
    from torch._inductor.utils import fresh_cache  # takes seconds, which the quick tests should not pay

    used: list[bool] = []
    with fresh_cache():
        for kernel in (FLASH, EFFICIENT):  # a CPU has flash; behind the other comes the plain formula
            torch._dynamo.reset()
            module = PlainAttention()
            module.compile(fullgraph=True, dynamic=False)
            pin = BackendChooser(FakeTimer({kernel: 1.0})).pinned(SHAPE, CARD)
            with torch.no_grad(), pin, torch.profiler.profile() as profile:
                module(torch.zeros(2, 2, 16, 8))
            used.append(any("flash_attention" in event.key for event in profile.key_averages()))
    assert used == [True, False]


def test_the_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    chooser = BackendChooser(FakeTimer({FLASH: 3.0, CUDNN: 2.0}))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            _order_within(chooser.pinned(SHAPE, CARD))
    assert caplog.messages == ["attention: 16 heads x 64 at 784 tokens, bfloat16, training: cudnn, flash takes 1.50x"]


def test_nothing_is_pinned_where_no_kernel_runs_or_none_is_to_choose() -> None:
    before = list(_cur_sdpa_kernel_backends(with_priority=True))
    assert _order_within(BackendChooser(FakeTimer({})).pinned(SHAPE, CARD)) == before
    timer = FakeTimer({FLASH: 3.0, CUDNN: 2.0})
    chooser = BackendChooser(timer)
    single = AttentionShape(16, 64, 784, torch.float32, masked=False, trains=True)
    assert _order_within(chooser.pinned(single, CARD)) == before
    assert _order_within(chooser.pinned(SHAPE, torch.device("cpu"))) == before
    torch.use_deterministic_algorithms(True)
    try:
        assert _order_within(chooser.pinned(SHAPE, CARD)) == before
    finally:
        torch.use_deterministic_algorithms(False)
    assert timer.asked == []


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_timer_times_and_leaves_the_generator_alone(
    trains: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tagger.attention._TIMED_TOKENS", 32)
    shape = AttentionShape(2, 8, 16, torch.float32, masked=masked, trains=trains)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert 0 < time_backend(shape, SDPBackend.MATH, torch.device("cpu")) < 60
    assert torch.equal(torch.get_rng_state(), before)


def test_the_timer_refuses_a_kernel_that_the_device_lacks() -> None:
    shape = AttentionShape(2, 8, 16, torch.float32, masked=False, trains=False)
    with pytest.raises(RuntimeError, match="No viable backend"):
        time_backend(shape, SDPBackend.CUDNN_ATTENTION, torch.device("cpu"))


def test_the_model_pins_by_what_its_blocks_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimplifiedTagger(
        VisionTransformerConfig(32, 8, 32, 2, 4, 2.0, 5, mask_padding=True, register_tokens=3, patch_dropout=0.5)
    )
    seen: list[AttentionShape] = []
    inside: list[bool] = []

    @contextlib.contextmanager
    def pinned(shape: AttentionShape, device: torch.device) -> Iterator[None]:
        assert device.type == "cpu"
        seen.append(shape)
        inside.append(True)
        yield
        inside.pop()

    def block_runs_inside(*_: object) -> None:
        assert inside

    monkeypatch.setattr("model_architecture.pinned_attention", pinned)
    for block in model.blocks:
        block.register_forward_pre_hook(block_runs_inside)
    images, sizes = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([[32, 20], [32, 32]])
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images, sizes)
    with torch.no_grad():
        model.eval()(images)
    assert seen == [
        AttentionShape(4, 8, 3 + 8, torch.bfloat16, masked=True, trains=True),
        AttentionShape(4, 8, 3 + 16, torch.float32, masked=False, trains=False),
    ]
