"""Ceilings of the device, and attention by each backend against them."""

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scripts.figures import Figure, figure
from scripts.gpu_bench.bench import Bench
from tagger.attention import AttentionShape, attend_packed, pinned_attention


def ceilings(bench: Bench) -> Iterator[Figure]:
    """What the device gives a matrix product, a copy in its memory and a copy from the host's."""
    dtype = str(bench.dtype).removeprefix("torch.")
    yield Figure(f"matmul {bench.scale.matmul_side}, {dtype}", bench.matmul_flops / 1e12, unit="TFLOP/s")
    times = bench.kernels_in_turn({"copy": bench.copy})
    yield figure("copy, read and write", [1 / each for each in bench.copy_seconds(times, 1e9)], unit="GB/s")
    host = bench.host_bytes(bench.scale.copy_bytes // 4)
    there = torch.empty_like(host, device=bench.device)
    seconds = bench.kernels_in_turn({"copy": lambda: there.copy_(host, non_blocking=True)})["copy"]
    yield figure("copy from host memory", [host.numel() / each / 1e9 for each in seconds], unit="GB/s")


BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
GPU, CPU = ("flash", "cudnn", "efficient"), ("flash", "math")


def attention(bench: Bench) -> Iterator[Figure]:
    """Forward and backward of attention as the model pins it, beside every kernel; the backward counts 2.5 forwards.

    Queries, keys and values lie as the model has them, packed, and so do their gradients.
    """
    scale = bench.scale
    for head_dim in scale.attention_head_dims:
        for tokens in scale.attention_tokens:
            heads, batch = scale.attention_width // head_dim, max(1, scale.attention_total_tokens // tokens)
            name = f"attention, {tokens} tokens, head {head_dim}"
            yield attention_figure(bench, name, (batch, heads, tokens, head_dim))


def attention_figure(bench: Bench, name: str, shape: tuple[int, int, int, int]) -> Figure:
    """The pinned kernel's share of the matmul ceiling; the note has every kernel's TFLOP/s."""
    batch, heads, tokens, head_dim = shape
    packed = torch.randn(batch, tokens, 3, heads, head_dim, device=bench.device).to(bench.dtype).requires_grad_()
    kind = AttentionShape(heads, head_dim, tokens, bench.dtype, masked=False, trains=True)
    contexts: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
        "pinned": functools.partial(pinned_attention, kind, bench.device),
        # On a GPU the plain products write out the whole [N, N] matrix: nobody trains with them.
        **{each: functools.partial(sdpa_kernel, [BACKENDS[each]]) for each in (GPU if bench.on_gpu else CPU)},
    }
    works = {each: functools.partial(_attend, context, packed) for each, context in contexts.items()}
    flops = 3.5 * 4 * batch * heads * tokens**2 * head_dim
    times = bench.kernels_in_turn({each: work for each, work in works.items() if _takes(work)})
    note = ", ".join(f"{each} {flops / statistics.median(rounds) / 1e12:.3g}" for each, rounds in times.items())
    shares = [flops / seconds / bench.matmul_flops for seconds in times["pinned"]]
    return figure(f"{name}: pinned / matmul", shares, note=f"{note} TFLOP/s")


def _attend(context: Callable[[], contextlib.AbstractContextManager[object]], packed: Tensor) -> None:
    with context():
        attend_packed(packed)


def _takes(work: Callable[[], object]) -> bool:
    try:
        work()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # "No available kernel", which torch says in no other way
        return False
    return True
