"""Ceilings of the device, and attention by each backend against them."""

import functools
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scripts.figures import Figure, figure
from scripts.gpu_bench.bench import Bench, missing


def ceilings(bench: Bench) -> Iterator[Figure]:
    """What the device gives a matrix product, a copy in its memory and a copy from the host's."""
    dtype = str(bench.dtype).removeprefix("torch.")
    yield Figure(f"matmul {bench.scale.matmul_side}, {dtype}", bench.matmul_flops / 1e12, unit="TFLOP/s")
    times = bench.in_turn({"copy": bench.copy})
    yield figure("copy, read and write", [1 / each for each in bench.copy_seconds(times, 1e9)], unit="GB/s")
    host = torch.zeros(bench.scale.copy_bytes // 4, dtype=torch.uint8, pin_memory=bench.on_gpu)
    there = torch.empty_like(host, device=bench.device)
    seconds = bench.in_turn({"copy": lambda: there.copy_(host, non_blocking=True)})["copy"]
    yield figure("copy from host memory", [host.numel() / each / 1e9 for each in seconds], unit="GB/s")


BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(bench: Bench) -> Iterator[Figure]:
    """Forward and backward of attention by each backend that takes the shape; the backward counts 2.5 forwards."""
    scale = bench.scale
    for head_dim in scale.attention_head_dims:
        for tokens in scale.attention_tokens:
            heads, batch = scale.attention_width // head_dim, max(1, scale.attention_total_tokens // tokens)
            name = f"attention, {tokens} tokens, head {head_dim}"
            yield attention_figure(bench, name, (batch, heads, tokens, head_dim))


def attention_figure(bench: Bench, name: str, shape: tuple[int, int, int, int]) -> Figure:
    """The best backend's share of the matmul ceiling; the note has every backend's TFLOP/s."""
    batch, heads, tokens, head_dim = shape
    query, key, value = (torch.randn(shape, device=bench.device).to(bench.dtype).requires_grad_() for _ in range(3))
    upstream = torch.randn(shape, device=bench.device).to(bench.dtype)
    works: dict[str, Callable[[], object]] = {}
    # On a GPU the plain products write out the whole [N, N] matrix: nobody trains with them.
    for backend in ("flash", "cudnn", "efficient") if bench.on_gpu else ("flash", "math"):
        work = functools.partial(_attend, BACKENDS[backend], query, key, value, upstream)
        if _takes(work):
            works[backend] = work
    if not works:
        return missing(name, "no backend takes this shape")
    flops = 3.5 * 4 * batch * heads * tokens**2 * head_dim
    rates = {backend: [flops / s for s in times] for backend, times in bench.in_turn(works).items()}
    medians = {backend: statistics.median(rate) for backend, rate in rates.items()}
    best = max(medians, key=lambda backend: medians[backend])
    note = ", ".join(f"{backend} {rate / 1e12:.3g}" for backend, rate in medians.items())
    shares = [rate / bench.matmul_flops for rate in rates[best]]
    return figure(f"{name}: {best} / matmul", shares, note=f"{note} TFLOP/s")


def _attend(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, upstream: Tensor) -> None:
    with sdpa_kernel([backend]):
        mixed = F.scaled_dot_product_attention(query, key, value)
    torch.autograd.grad(mixed, (query, key, value), upstream)


def _takes(work: Callable[[], object]) -> bool:
    try:
        work()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # "No available kernel", which torch says in no other way
        return False
    return True
