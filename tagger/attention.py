"""Which kernel computes attention on a CUDA device: the fastest for each shape, timed once when the shape is first met.

Torch tries its kernels in one fixed order, while which is fastest depends on the width of a head, the number of tokens
and the card. Elsewhere, in float32 (one kernel alone), and where deterministic algorithms are asked for, torch's own
choice stands. Refuses nothing: where no candidate runs, nothing is pinned.
"""

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.compiler.config as compiler_config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)

# The first of those that are equally fast is taken, so that noise does not decide.
_CANDIDATES = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
_EQUALLY_FAST = 1.02
# Enough work to fill a card, and little memory beside a training step: 0.3 GB at a width of 1024.
_TIMED_TOKENS = 16_384
_TIMED_RUNS = 5
_ROUNDS = 3


@dataclass(frozen=True)
class AttentionShape:
    """What the choice depends on: `masked` forbids some kernels, `trains` counts the backward pass in."""

    heads: int
    head_dim: int
    tokens: int
    dtype: torch.dtype
    masked: bool
    trains: bool

    def __str__(self) -> str:
        kind = f"{str(self.dtype).removeprefix('torch.')}{', masked' if self.masked else ''}"
        use = "training" if self.trains else "evaluation"
        return f"{self.heads} heads x {self.head_dim} at {self.tokens} tokens, {kind}, {use}"


Timer = Callable[[AttentionShape, SDPBackend, torch.device], float]


def time_backend(shape: AttentionShape, backend: SDPBackend, device: torch.device) -> float:
    """Seconds of one attention of `shape` with `backend`, at best; RuntimeError where the backend cannot do it.

    Draws nothing from the device's generator, which a resumed run must find as it was.
    """
    images = max(1, _TIMED_TOKENS // shape.tokens)
    generator = torch.Generator(device).manual_seed(0)
    best = float("inf")
    with torch.inference_mode(False), torch.set_grad_enabled(shape.trains), torch.autocast(device.type, enabled=False):
        sizes = (images, shape.tokens, 3, shape.heads, shape.head_dim)
        packed = torch.randn(sizes, dtype=shape.dtype, device=device, generator=generator, requires_grad=shape.trains)
        mask = torch.ones(images, 1, 1, shape.tokens, dtype=torch.bool, device=device) if shape.masked else None
        with sdpa_kernel(backend):
            attend_packed(packed, mask)  # the first call builds plans
            for _ in range(_ROUNDS):
                _wait_for(device)
                begun = time.perf_counter()
                for _ in range(_TIMED_RUNS):
                    attend_packed(packed, mask)
                _wait_for(device)
                best = min(best, (time.perf_counter() - begun) / _TIMED_RUNS)
    return best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def attend_packed(packed: Tensor, mask: Tensor | None = None) -> None:
    """Attention of queries, keys and values [B, N, 3, H, d] where the model has them, since copies count too.

    With its backward pass where `packed` requires a gradient.
    """
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    if packed.requires_grad:
        torch.autograd.grad(mixed, packed, mixed.detach())


class BackendChooser:
    """The order in which torch shall try its attention kernels, for each device and shape; found once and kept."""

    def __init__(self, timer: Timer = time_backend) -> None:
        self._timer = timer
        self._kept: dict[tuple[torch.device, AttentionShape], list[SDPBackend]] = {}

    def pinned(self, shape: AttentionShape, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """A context in which attention of `shape` takes the fastest kernel. To be entered outside compiled parts."""
        if device.type != "cuda" or shape.dtype not in (torch.bfloat16, torch.float16):
            return contextlib.nullcontext()
        if torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled():
            return contextlib.nullcontext()
        key = (device, shape)
        if key not in self._kept:
            self._kept[key] = self._choose(shape, device)
        order = self._kept[key]
        return _tried_in_order(order) if order else contextlib.nullcontext()

    def _choose(self, shape: AttentionShape, device: torch.device) -> list[SDPBackend]:
        times: dict[SDPBackend, float] = {}
        for backend in _CANDIDATES:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch warns of each reason why a kernel is not available
                    times[backend] = self._timer(shape, backend, device)
            except RuntimeError as error:
                logger.debug("attention: %s cannot do %s: %s", backend.name, shape, error)
        if not times:
            logger.warning("attention: %s: no kernel could be timed; torch chooses", shape)
            return []
        best = min(times.values())
        chosen = next(backend for backend, seconds in times.items() if seconds <= best * _EQUALLY_FAST)
        rest = sorted((backend for backend in times if backend is not chosen), key=times.__getitem__)
        slower = "".join(f", {_word(backend)} takes {times[backend] / times[chosen]:.2f}x" for backend in rest)
        logger.info("attention: %s: %s%s", shape, _word(chosen), slower)
        return [chosen, *rest]


@contextlib.contextmanager
def _tried_in_order(order: list[SDPBackend]) -> Iterator[None]:
    tag = compiler_config.cache_key_tag
    # A compiled block has its kernel built in, and torch's cache on disk does not know which one was asked for: without
    # the tag, a block compiled by an earlier run would bring that run's kernel.
    compiler_config.cache_key_tag = f"{tag} attention {' '.join(map(_word, order))}"
    try:
        # The others stay behind the chosen one: a real batch may have a stride or a size that it does not take.
        with sdpa_kernel([*order, SDPBackend.MATH], set_priority=True):
            yield
    finally:
        compiler_config.cache_key_tag = tag


def _word(backend: SDPBackend) -> str:
    return str(backend.name).removesuffix("_ATTENTION").lower()


pinned_attention = BackendChooser().pinned
