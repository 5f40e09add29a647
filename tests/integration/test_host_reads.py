"""Between two log steps the host asks the device for nothing: it only tells it what to do next.

On a CPU every value is at hand, so two stand-ins: a count of the operations that would wait for a device, and the meta
device, whose tensors have no values, so that reading one is an error. A GPU has `torch.cuda.set_sync_debug_mode`.
"""

import contextlib
import copy
import dataclasses
import importlib
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import start_up
from Configuration_System import OptimizerSection, load_config
from tagger import tag_lists
from tagger.boundary import StepBoundary
from tagger.data.windows import Window, accumulation_windows
from tagger.ema import ExponentialMovingAverage
from tagger.guard import UpdateGuard
from tagger.meter import TrainingMeter
from tagger.objective import TrainingObjective
from tagger.optim import adamw
from tagger.run_folder import RunFolder
from tagger.stop import StopRequest
from train_direct import train_step
from training_utils import MixedPrecisionTrainer, TrainState, create_optimizer

OptimizerName: typing.TypeAlias = typing.Literal["adamw", "adafactor", "muon"]
ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = ("rotation", "shift", "scale", "brightness", "contrast", "saturation", "blur", "erasing")
SMALL = (
    "data.image_size=32",
    "data.num_threads=1",
    "vocabulary.min_frequency=1",
    "model.preset=vit_tiny",
    "model.patch_size=8",
    "model.embed_dim=32",
    "model.depth=2",
    "model.num_heads=2",
    "model.stem=conv",
    "model.dropout=0.1",
    "model.drop_path=0.1",
    "loss.rating_weight=1.0",
    *(f"augment.{name}={{probability: 0.5, strength: 0.3}}" for name in OPERATIONS),
    "training.device=cpu",
    "training.batch_size=8",
    "training.accumulation_steps=2",
    "training.num_epochs=1",
    "optimizer.base_batch_size=4",
)
# What a GPU has to be waited for: a value, or the size of a result that depends on values.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}


class Waits(TorchDispatchMode):
    """Counts operations that would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        by_mask = name in {"index", "index_put", "index_put_"} and any(
            index is not None and index.dtype in {torch.bool, torch.uint8} for index in args[1]
        )
        if name in WAITS or by_mask:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def built(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[start_up.Parts, list[Window]]]:
    """The parts of a run and the windows of its first epoch."""
    runs = tmp_path_factory.mktemp("runs")
    places = (f"data.roots=[{images}]", f"data.index_dir={images.parent / 'index'}", f"run.output_dir={runs}")
    config = load_config(ROOT / "configs" / "unified_config.yaml", (*SMALL, *places), {})
    with StopRequest() as stop, RunFolder.open(config.run.folder, resume=False) as folder:
        parts = start_up.build(config, folder, stop)
        with parts.monitor, parts.manager:
            yield parts, list(accumulation_windows(parts.feed, None, 0))


def anew(
    parts: start_up.Parts, name: OptimizerName, averaged_and_clipped: bool, device: torch.device
) -> start_up.Parts:
    """The parts as `start_up.build` puts them together, with another optimizer, on another device."""
    training = dataclasses.replace(parts.config.training, clip_grad_norm=1.0 if averaged_and_clipped else None)
    config = dataclasses.replace(parts.config, optimizer=OptimizerSection(name=name), training=training)
    model, criterion = (copy.deepcopy(each).to(device) for each in (parts.model, parts.criterion))
    return dataclasses.replace(
        parts,
        config=config,
        device=device,
        model=model,
        parameters=tuple(model.parameters()),
        criterion=criterion,
        objective=TrainingObjective(model, criterion),
        boundary=StepBoundary(model, device),
        meter=TrainingMeter(),
        guard=UpdateGuard(device),
        state=TrainState(
            model,
            create_optimizer(config.optimizer, model),
            MixedPrecisionTrainer("off", device),
            ExponentialMovingAverage(model, 0.99) if averaged_and_clipped else None,
        ),
    )


def one_step(parts: start_up.Parts, window: Window, step: int) -> torch.Tensor:
    """An update as the loop makes it, between two log steps."""
    loss, grad_norm, left_out = train_step(parts, window)
    parts.boundary.mark()
    parts.meter.add(step, loss, grad_norm, window.num_images, waited_s=0.0, seconds=0.1)
    return left_out


@pytest.mark.parametrize("averaged_and_clipped", [True, False])
@pytest.mark.parametrize("name", typing.get_args(OptimizerName))
def test_updates_read_no_value(
    name: OptimizerName,
    averaged_and_clipped: bool,
    built: tuple[start_up.Parts, list[Window]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Looks at tag lists that lie in host memory, and at no others.
    monkeypatch.setattr(tag_lists, "_check_values", lambda *_: None)
    parts, windows = anew(built[0], name, averaged_and_clipped, torch.device("cpu")), built[1]
    assert len(windows) >= 3
    with Waits() as waits:
        for step, window in enumerate(windows, start=1):
            left_out = one_step(parts, window, step)
            parts.guard.add(step, left_out, [batch.row_ids for batch in window.batches])
        assert waits.seen == {}
        parts.meter.read(0.1, parts.state.precision.nonfinite_steps)
        assert sum(waits.seen.values()) > 0  # a log step reads, and it is counted


@pytest.mark.parametrize("name", typing.get_args(OptimizerName))
def test_updates_need_no_value(
    name: OptimizerName,
    built: tuple[start_up.Parts, list[Window]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What torch refuses on the meta device although it could do it.
    monkeypatch.setattr(adamw, "FUSED_DEVICES", {"meta"})
    monkeypatch.setattr(importlib.import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda _: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    parts, windows = anew(built[0], name, True, torch.device("meta")), built[1]
    for step, window in enumerate(windows[:2], start=1):
        assert one_step(parts, window, step).is_meta
    with pytest.raises(RuntimeError, match="meta"):  # so would one read in any of the steps
        parts.meter.read(0.1, parts.state.precision.nonfinite_steps)


def test_a_run_scales_its_learning_rates_to_the_images_of_an_update(built: tuple[start_up.Parts, list[Window]]) -> None:
    parts, _ = built
    assert parts.learning_rate == 2 * parts.config.optimizer.learning_rate  # 16 images where 4 are the base
    assert {group["initial_lr"] for group in parts.state.optimizer.param_groups} == {parts.learning_rate}
