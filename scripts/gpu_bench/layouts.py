"""Useful tokens a second: aspect buckets against letterboxed squares, with and without a mask, and packed attention.

Aspects are log-uniform in 1:2 .. 2:1. A token is useful as far as it shows the image.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.figures import Figure, figure
from scripts.gpu_bench.bench import Bench, StepCase, missing, ratios
from scripts.gpu_bench.steps import OurStep, noise_batch
from tagger.data.buckets import Shape
from tagger.preprocess import Preprocess

PATCH = 16


def layouts(bench: Bench) -> Iterator[Figure]:
    """Fill, step times of some buckets beside the square's, and what follows for useful tokens a second."""
    bench.check_time()
    case = bench.scale.layout
    buckets = Preprocess.create(case.image_size, "buckets", PATCH)
    square, own = Preprocess.create(case.image_size, "letterbox", PATCH).useful_share(), buckets.useful_share()
    yield Figure(f"{case.image_size} px: useful tokens, letterbox", square)
    yield Figure(f"{case.image_size} px: useful tokens, {len(buckets.shapes)} buckets", own, goal=0.96)
    yield from _steps(bench, case, buckets.shapes, own / square)
    bench.release()
    yield _packed(bench, case)


def _steps(bench: Bench, case: StepCase, shapes: tuple[Shape, ...], gain: float) -> Iterator[Figure]:
    """`gain`: useful tokens of an image in a bucket over those in a square."""
    ours = OurStep(bench, case)
    masked = OurStep(bench, dataclasses.replace(case, model=dataclasses.replace(case.model, mask_padding=True)))
    square = noise_batch(bench, case.batch_size, case.image_size, case.image_size)
    # What a mask does to the kernels does not depend on what it covers: half of each square is enough.
    halves = square.valid_sizes // torch.tensor([1, 2], dtype=torch.int32, device=bench.device)
    letterboxed = dataclasses.replace(square, valid_sizes=halves)
    works: dict[str, Callable[[], object]] = {
        "square": functools.partial(ours, square),
        "masked": functools.partial(masked, letterboxed),
    }
    chosen = [shapes[i] for i in np.linspace(0, len(shapes) // 2 - 1, bench.scale.layout_shapes).round().astype(int)]
    for height, width in dict.fromkeys(chosen):
        works[f"{height} x {width}"] = functools.partial(ours, noise_batch(bench, case.batch_size, height, width))
    times = bench.in_turn(works)
    yield figure(f"step {case.name}: square with a mask / without", ratios(times["masked"], times["square"]))
    speeds = []
    for name in list(works)[2:]:
        speed = ratios(times["square"], times[name])
        speeds.append(speed)
        yield figure(f"step {case.name}: square / bucket {name}", speed)
    gains = [gain * statistics.mean(each) for each in zip(*speeds, strict=True)]
    yield figure(f"step {case.name}: useful tokens/s, buckets / letterbox", gains, 1.25 if bench.on_gpu else None)
    name = f"step {case.name}: useful tokens/s, buckets / letterboxed timm, compiled"
    if case.name not in bench.against_timm:
        yield missing(name, "timm compiled was not measured beside ours")
        return
    against = bench.against_timm[case.name]
    yield figure(name, [against * each for each in gains], 1.4, note="product of two ratios")


def _packed(bench: Bench, case: StepCase) -> Figure:
    """Attention alone over images of their own lengths in one row, against squares: useful tokens a second."""
    name = "attention alone, useful tokens/s: packed (varlen) / squares"
    if not bench.on_gpu:
        return missing(name, "torch.nn.attention.varlen is for CUDA")
    from torch.nn.attention.varlen import varlen_attn

    side, heads, head_dim = case.image_size // PATCH, 12, 64
    aspects = np.exp(np.random.default_rng(0).uniform(-np.log(2), np.log(2), case.batch_size))
    lengths = np.maximum(1, np.minimum(aspects, 1 / aspects) * side * side).astype(np.int64)
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=bench.device)
    packed = _random(bench, (int(lengths.sum()), heads, head_dim))
    squares = _random(bench, (case.batch_size, heads, side * side, head_dim))

    def of_packed() -> None:
        mixed = varlen_attn(*packed, ends, ends, int(lengths.max()), int(lengths.max()))
        assert isinstance(mixed, Tensor)
        torch.autograd.grad(mixed, packed, torch.ones_like(mixed))

    def of_squares() -> None:
        mixed = F.scaled_dot_product_attention(*squares)
        torch.autograd.grad(mixed, squares, torch.ones_like(mixed))

    times = bench.kernels_in_turn({"packed": of_packed, "squares": of_squares})
    return figure(name, ratios(times["squares"], times["packed"]))


def _random(bench: Bench, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.randn(shape, device=bench.device).to(bench.dtype).requires_grad_() for _ in range(3))
    return query, key, value
