"""What the training loop costs beside forward, backward and optimizer: one step of it, one bare step, in turn.

Both do the same work on the same batches in memory, so the ratio holds on a noisy machine. The loop does everything it
does in a real run: augmentation off, clipping, EMA, schedule, meter, log lines to every sink, checkpoints when due.
"""

import copy
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

import start_up
import train_direct
from Configuration_System import FullConfig, load_config
from tagger.batch import Batch
from tagger.command import command
from tagger.data.batch_plan import PlainPlan
from tagger.data.epoch_order import EpochOrder
from tagger.data.phases import PhasePlan
from tagger.data.sampler import RowSampler
from tagger.data.windows import Feed
from tagger.files import write_json
from tagger.options import Parser, output_file, whole
from tagger.run_folder import RunFolder
from tagger.stop import StopRequest
from training_utils import create_optimizer

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "unified_config.yaml"
NUM_TAGS = 40
WARMUP_STEPS = 5


class PairedLoader:
    """Serves batches from memory; before each one it takes a bare step itself and notes how long both steps took."""

    def __init__(self, batches: Sequence[Batch], num_steps: int, parts: start_up.Parts) -> None:
        self._batches = [batch.to(parts.device) for batch in batches]
        size = len(batches[0])
        sampler = RowSampler(np.arange(num_steps * size), seed=0)
        plan = PlainPlan(sampler, size, ((len(sampler), (size, size)),))
        self.order = EpochOrder(plan, {"seed": 0, "rows": len(sampler), "rows_hash": 0})
        self._num_steps = num_steps
        self._device = parts.device
        self._model = copy.deepcopy(parts.model).train()
        self._optimizer = create_optimizer(parts.config.optimizer, self._model)
        self._criterion = parts.criterion
        self._precision = parts.state.precision
        self.loop_s: list[float] = []
        self.bare_s: list[float] = []

    def set_epoch(self, epoch: int) -> None:
        assert epoch == 0

    def seek(self, position: Mapping[str, int]) -> None:
        raise AssertionError(f"a benchmark does not resume: {position}")

    def close(self) -> None:
        """Nothing runs in the background."""

    def __iter__(self) -> Generator[tuple[Batch, dict[str, int]], None, None]:
        for step in range(self._num_steps):
            batch = self._batches[step % len(self._batches)]
            self._bare_step(batch)
            started = self._now()
            yield batch, {"samples": step}
            self.loop_s.append(self._now() - started)

    def _bare_step(self, batch: Batch) -> None:
        started = self._now()
        with self._precision.autocast():
            logits = self._model(batch.images)
        loss: Tensor = self._criterion(logits, batch.tag_indices, batch.tag_offsets) / len(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.bare_s.append(self._now() - started)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def random_batches(number: int, batch_size: int, image_size: int, num_tags: int, seed: int = 0) -> list[Batch]:
    """Batches of noise with about ten tags an image."""
    generator = np.random.default_rng(seed)
    batches = []
    for _ in range(number):
        tags = [np.flatnonzero(generator.random(num_tags) < 10 / num_tags) for _ in range(batch_size)]
        offsets = np.cumsum([0, *(len(row) for row in tags)])
        images = generator.integers(0, 256, (batch_size, 3, image_size, image_size), dtype=np.uint8)
        batches.append(
            Batch(
                images=torch.from_numpy(images),
                tag_indices=torch.from_numpy(np.concatenate(tags).astype(np.int32)),
                tag_offsets=torch.from_numpy(offsets.astype(np.int32)),
                row_ids=torch.arange(batch_size),
                valid_sizes=torch.full((batch_size, 2), image_size, dtype=torch.int32),
                mirrored=torch.zeros(batch_size, dtype=torch.bool),
            )
        )
    return batches


def make_images(folder: Path, number: int) -> None:
    """The least data set that a run accepts: plain images with two to four of NUM_TAGS tags each."""
    folder.mkdir(parents=True)
    for i in range(number):
        Image.new("RGB", (16, 16), (i % 256, 0, 0)).save(folder / f"{i}.png")
        tags = ", ".join(f"tag_{(i * k) % NUM_TAGS}" for k in (1, 3, 7, 11))
        (folder / f"{i}.json").write_text(f'{{"tags": "{tags}"}}', encoding="utf-8")


def measure(config: FullConfig, num_steps: int, console: Console) -> PairedLoader:
    """Run the real loop for `num_steps` steps on memory-resident batches, paired with bare steps."""
    with StopRequest() as stop, RunFolder.open(config.run.folder, resume=False) as folder:
        parts = start_up.build(config, folder, stop)
        batches = random_batches(4, config.training.batch_size, config.data.image_size, len(parts.vocabulary))
        loader = PairedLoader(batches, num_steps, parts)
        feed = Feed([loader], PhasePlan.create([1.0], 1, [loader.order]), 1)
        parts = dataclasses.replace(parts, feed=feed, total_steps=num_steps)
        console.print(f"{num_steps} steps on {parts.device} ...")
        with parts.monitor, parts.manager:
            train_direct.train(parts)
    return loader


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints both medians and their ratio."""
    parser = Parser(
        description="Measure the training loop's own cost against a bare loop, in one run.",
        epilog="example: python -m scripts.benchmark_training --steps 60",
    )
    parser.add_argument("--steps", type=whole(), default=60, help="steps of each kind (default: 60)")
    parser.add_argument("--output", type=output_file, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. model.preset=vit_small")
    options = parser.parse_intermixed_args(arguments)
    if options.steps <= WARMUP_STEPS:
        parser.error(f"--steps {options.steps} is not above the {WARMUP_STEPS} steps of warm-up; use 60")
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        make_images(Path(scratch) / "images", 2 * NUM_TAGS)
        words = [
            f"data.roots=[{scratch}/images]",
            f"data.index_dir={scratch}/index",
            f"run.output_dir={scratch}/runs",
            "vocabulary.min_frequency=1",
            "model.preset=vit_tiny",
            "data.image_size=96",
            "training.batch_size=64",
            "training.num_epochs=1",
        ]
        loader = measure(load_config(CONFIG, [*words, *options.overrides], environment={}), options.steps, console)
    # The last step is followed by the closing validation, and its time is not taken.
    loop, bare = loader.loop_s[WARMUP_STEPS:], loader.bare_s[WARMUP_STEPS : len(loader.loop_s)]
    ratio = statistics.median(a / b for a, b in zip(loop, bare, strict=True))
    table = Table("step", "median ms", "min ms", "max ms", title="one training step, loop and bare in turn")
    for name, times in (("loop", loop), ("bare", bare)):
        table.add_row(name, *(f"{1000 * f(times):.1f}" for f in (statistics.median, min, max)))
    console.print(table)
    medians = statistics.median(loop) / statistics.median(bare)
    console.print(f"loop / bare: {ratio:.3f} (median of {len(loop)} pairs), {medians:.3f} (of medians)")
    if options.output is not None:
        write_json(options.output, {"format_version": 1, "ratio": ratio, "loop_s": loop, "bare_s": bare})
    return 0


if __name__ == "__main__":
    sys.exit(main())
