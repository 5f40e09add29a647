"""What scoring an evaluation costs beside the forward passes: exact average precision of every tag."""

import dataclasses
from collections.abc import Iterator

import torch

from evaluation_metrics import MetricComputer
from scripts.benchmark_metrics import BATCH, make_batches
from scripts.figures import Figure
from scripts.gpu_bench.bench import Bench

_ROWS = 4 * BATCH


def evaluation(bench: Bench) -> Iterator[Figure]:
    """Seconds of all updates and of the result, and memory; logits lie on the device as a forward pass leaves them."""
    bench.check_time()
    images, tags = bench.scale.evaluated_images, bench.scale.evaluated_tags
    made = make_batches(min(_ROWS, images), tags)
    batches = dataclasses.replace(made, logits=[logits.to(bench.device, bench.dtype) for logits in made.logits])
    rows, pool = len(batches.logits[0]), len(batches.logits)
    computer = MetricComputer(tags, expected_images=images)
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
        before = torch.cuda.memory_allocated(bench.device)

    def update() -> None:
        for number in range(images // rows):
            computer.update(batches.logits[number % pool], *batches.listed[number % pool])

    updating, computing = bench.seconds(update), bench.seconds(computer.compute)
    name = f"evaluation of {images // rows * rows:,} x {tags:,}"
    goal = 2.0 if bench.on_gpu else None
    parts = f"updates {updating:.3g} s, result {computing:.3g} s"
    total = updating + computing
    yield Figure(f"{name}: beside the model", total, goal=goal, lower_is_better=True, unit="s", note=parts)
    yield Figure(f"{name}: for each image and tag", total / (images // rows * rows * tags) * 1e9, unit="ns")
    if bench.on_gpu:
        peak = torch.cuda.max_memory_allocated(bench.device) - before
        yield Figure(f"{name}: memory on the device", peak / 1e9, unit="GB")
    computer.close()
