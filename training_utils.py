"""What the loop stands on: seeds, precision, optimizers, early stopping, the state of a run and its checkpoints.

Resuming is exact: `TrainState` names everything that the next step depends on, and `CheckpointManager` writes it
without holding up training. Refuses checkpoints that are broken or belong to another vocabulary, model or optimizer.
"""

import contextlib
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from Configuration_System import CheckpointSection, OptimizerSection, TrainingSection
from tagger.checkpoint.format import (
    CheckpointError,
    Json,
    LoadedCheckpoint,
    Tensors,
    read_manifest,
    read_part,
)
from tagger.checkpoint.retention import SavePolicy
from tagger.checkpoint.saver import CheckpointSaver
from tagger.checkpoint.snapshot import capture_random_state, restore_random_state
from tagger.checkpoint.store import CheckpointStore, higher_is_better, is_better
from tagger.checkpoint.writer import AsyncCheckpointWriter, CheckpointWriteError, SaveFailure
from tagger.clipping import norm_and_divisor
from tagger.compilation import CompileMode, compile_blocks
from tagger.devices import PrecisionMode, autocast_dtype, resolve_device
from tagger.ema import ExponentialMovingAverage
from tagger.ensemble import networks_in
from tagger.errors import InputError
from tagger.module_state import load_tensors, named_tensors
from tagger.optim import (
    Adafactor,
    AdamW,
    DeviceSkipping,
    Group,
    Muon,
    MuonAdamW,
    is_inner_matrix,
    load_optimizer,
    optimizer_settings,
    optimizer_stand_ins,
    optimizer_tensors,
    parameter_groups,
    parameter_names,
)
from tagger.registry import Registry

__all__ = [
    "OPTIMIZERS",
    "AsyncCheckpointWriter",
    "CheckpointError",
    "CheckpointManager",
    "CheckpointWriteError",
    "EarlyStopping",
    "ExponentialMovingAverage",
    "MixedPrecisionTrainer",
    "SaveFailure",
    "SavePolicy",
    "TrainState",
    "Weights",
    "compile_model",
    "create_optimizer",
    "load_weights",
    "parameter_groups",
    "resolve_device",
    "seed_everything",
]

logger = logging.getLogger(__name__)

# GradScaler's defaults: first scale, and good steps before it doubles.
_FIRST_SCALE = 65536.0
_GROWTH_STEPS = 2000


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class MixedPrecisionTrainer:
    """The dtype of the forward pass, and updates that a gradient which is not finite cannot spoil.

    `auto` is bfloat16 on CUDA and float32 elsewhere. A bad update is left out on the device, without the host waiting
    for it (where the optimizer can, see `DeviceSkipping`), and counted in `nonfinite_steps`, an int64 scalar on the
    device to be read at log steps. With `fp16` the loss is scaled as torch's GradScaler does it; an update lost while
    the scale is above 1 is the scale finding its place and is not counted.
    """

    def __init__(self, mode: PrecisionMode, device: torch.device) -> None:
        self.device = device
        self.dtype = autocast_dtype(mode, device)
        self.nonfinite_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._scale = torch.tensor(_FIRST_SCALE if self.dtype is torch.float16 else 1.0, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int64, device=device)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Context of the forward pass and the loss."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, a scalar."""
        (loss * self._scale if self.dtype is torch.float16 else loss).backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def step(
        self,
        optimizer: Optimizer,
        parameters: Sequence[Tensor],
        clip_grad_norm: float | None,
        loss: Tensor | None = None,
        num_members: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Update with the accumulated gradients, scaled down to the norm `clip_grad_norm` where they exceed it.

        Of an ensemble, whose members' parameters follow each other, each member's by itself. The update is left out
        where the gradient or `loss`, a scalar on the device, is not finite. Returns the norm before clipping (of an
        ensemble the mean of the members'), float32, and whether the update was left out for good, bool: scalars on the
        device. Gradients are not cleared, and their values afterwards are unspecified.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm, divisor = norm_and_divisor(gradients, clip_grad_norm, self._scale, num_members)
        bad = ~torch.isfinite(norm)
        if loss is not None:
            bad = bad | ~torch.isfinite(loss)
        if isinstance(optimizer, DeviceSkipping) and optimizer.skips_on_device:
            optimizer.grad_scale, optimizer.found_inf = divisor, bad.float()
            optimizer.step()
        elif not bool(bad):
            torch._foreach_div_(gradients, divisor)
            optimizer.step()
        left_out = bad & (self._scale <= 1.0)
        self.nonfinite_steps += left_out
        if self.dtype is torch.float16:
            self._adapt_scale(bad)
        return norm, left_out

    def _adapt_scale(self, bad: Tensor) -> None:
        grown = self._good_steps + 1 >= _GROWTH_STEPS
        factor = torch.where(bad, 0.5, torch.where(grown, 2.0, 1.0))
        self._good_steps = torch.where(bad | grown, 0, self._good_steps + 1)
        self._scale = self._scale * factor

    def state_dict(self) -> dict[str, Json]:
        """As JSON values. Waits for the device."""
        return {
            "dtype": str(self.dtype),
            "scale": float(self._scale),
            "good_steps": int(self._good_steps),
            "nonfinite_steps": int(self.nonfinite_steps),
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on with the loss scale and the count. A change of dtype is logged, and the scale then starts afresh."""
        values = cast(Mapping[str, Any], state)
        self.nonfinite_steps.fill_(values["nonfinite_steps"])
        if values["dtype"] != str(self.dtype):
            logger.warning("precision: the checkpoint was trained with %s, now %s", values["dtype"], self.dtype)
            return
        self._scale.fill_(values["scale"])
        self._good_steps.fill_(values["good_steps"])


OptimizerFactory: TypeAlias = Callable[[OptimizerSection, nn.Module], Optimizer]
OPTIMIZERS: Registry[OptimizerFactory] = Registry("optimizer")


def create_optimizer(section: OptimizerSection, model: nn.Module) -> Optimizer:
    """The optimizer of a recipe for a model that is on its device already; every group has its `initial_lr`."""
    optimizer = OPTIMIZERS.get(section.name)(section, model)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


@OPTIMIZERS.register("adamw")
def _adamw(section: OptimizerSection, model: nn.Module) -> AdamW:
    return _adamw_of(section, _groups(section, model, section.learning_rate))


@OPTIMIZERS.register("adafactor")
def _adafactor(section: OptimizerSection, model: nn.Module) -> Adafactor:
    groups = _groups(section, model, section.learning_rate)
    return Adafactor(groups, lr=section.learning_rate, betas=(section.betas[0], section.betas[1]))


@OPTIMIZERS.register("muon")
def _muon(section: OptimizerSection, model: nn.Module) -> MuonAdamW:
    """Muon for the matrices of the blocks and the kernels of a stem's stages; the rest is AdamW's (Jordan 2024).

    The rest: the first layer, embeddings, norms, biases and head. Scaling "original": `optimizer.muon_learning_rate` is
    the size of the step in spectral norm, which suits any width. Tuned on real icons, "match_rms_adamw" came out the
    same (mAP 0.33 at 0.004 against 0.32 at 0.02, one seed each).
    """
    inner = _groups(section, model, section.muon_learning_rate, wanted=is_inner_matrix)
    if not inner:
        raise InputError("optimizer.name=muon, but this model has no matrices in `blocks`; use optimizer.name=adamw")
    rest = _groups(section, model, section.learning_rate, wanted=lambda name, p: not is_inner_matrix(name, p))
    return MuonAdamW(Muon(inner, lr=section.muon_learning_rate, adjust_lr_fn="original"), _adamw_of(section, rest))


def _groups(
    section: OptimizerSection,
    model: nn.Module,
    learning_rate: float,
    wanted: Callable[[str, Tensor], bool] | None = None,
) -> list[Group]:
    return parameter_groups(model, learning_rate, section.weight_decay, layer_decay=section.layer_decay, wanted=wanted)


def _adamw_of(section: OptimizerSection, groups: list[Group]) -> AdamW:
    betas = (section.betas[0], section.betas[1])
    return AdamW(groups, lr=section.learning_rate, betas=betas, eps=section.eps)


def compile_model(model: nn.Module, mode: CompileMode, device: torch.device) -> bool:
    """Compile each block of the model's networks, in place, as `training.compile` asks; returns whether that was done.

    A block compiles in a fraction of the time of the whole, since equal blocks share the result.
    """
    networks = [network for network in networks_in(model) if "blocks" in dict(network.named_children())]
    blocks = [block for network in networks for block in network.get_submodule("blocks").children()]
    return compile_blocks(model, blocks, mode, device)


class EarlyStopping:
    """Ends a run whose metric has not improved by more than `min_delta` in `patience` checks."""

    def __init__(
        self,
        patience: int,
        min_delta: float = 0.0,
        higher_is_better: bool = True,
        *,
        metric: str | None = None,
        yardstick: str | None = None,
    ) -> None:
        if patience < 1 or min_delta < 0:
            raise ValueError(f"patience={patience} and min_delta={min_delta} must be at least 1 and 0")
        self.patience, self.min_delta = patience, min_delta
        self.higher_is_better = higher_is_better
        self.metric, self.yardstick = metric, yardstick
        self.best: float | None = None
        self.bad_checks = 0

    @classmethod
    def from_config(cls, section: TrainingSection, metric: str, yardstick: str) -> "EarlyStopping | None":
        """As the recipe asks for `metric`, measured with `yardstick`; None where it is off."""
        if section.early_stopping_patience is None:
            return None
        patience, delta = section.early_stopping_patience, section.early_stopping_min_delta
        return cls(patience, delta, higher_is_better(metric), metric=metric, yardstick=yardstick)

    def update(self, value: float) -> bool:
        """Take in a check; True when it is time to stop. A value that is not finite is no improvement."""
        if is_better(value, self.best, higher=self.higher_is_better, min_delta=self.min_delta):
            self.best, self.bad_checks = value, 0
        else:
            self.bad_checks += 1
        return self.exhausted

    @property
    def exhausted(self) -> bool:
        """Whether the last check said that it is time to stop."""
        return self.bad_checks >= self.patience

    def state_dict(self) -> dict[str, Json]:
        """As JSON values."""
        return {"metric": self.metric, "yardstick": self.yardstick, "best": self.best, "bad_checks": self.bad_checks}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on counting, unless what was counted is another metric or was measured with another yardstick."""
        values = cast(Mapping[str, Any], state)
        if values["metric"] != self.metric:
            logger.warning("early stopping: now %s instead of %s; it starts afresh", self.metric, values["metric"])
        elif values.get("yardstick") != self.yardstick:
            logger.warning("early stopping: %s is measured on other held-out images; it starts afresh", self.metric)
        else:
            self.best, self.bad_checks = values["best"], values["bad_checks"]


@dataclass
class TrainState:
    """Everything that the next step depends on, named once. `step` counts optimizer updates, `seconds` training time.

    `position` is the loader's, after the last batch used; `extra` holds JSON values of the caller's own.
    """

    model: nn.Module
    optimizer: Optimizer
    precision: MixedPrecisionTrainer
    ema: ExponentialMovingAverage | None = None
    early_stopping: EarlyStopping | None = None
    step: int = 0
    epoch: int = 0
    position: dict[str, int] | None = None
    samples_seen: int = 0
    seconds: float = 0.0
    extra: dict[str, Json] = field(default_factory=dict)

    def snapshot_parts(self) -> tuple[dict[str, Tensors], dict[str, Json]]:
        """The state at a step boundary: live tensors by part and name (not copies), and the rest as JSON values."""
        names = parameter_names(self.model)
        random_tensors, random_numbers = capture_random_state(self.precision.device)
        tensors: dict[str, Tensors] = {
            "model": named_tensors(self.model),
            "optimizer": optimizer_tensors(self.optimizer, names),
            "rng": random_tensors,
        }
        if self.ema is not None:
            tensors["ema"] = self.ema.state_dict()
        values: dict[str, Json] = {name: getattr(self, name) for name in _COUNTERS}
        values["optimizer"] = optimizer_settings(self.optimizer, names)
        values["precision"] = self.precision.state_dict()
        values["random"] = random_numbers
        values["ema_updates"] = None if self.ema is None else self.ema.num_updates
        values["early_stopping"] = None if self.early_stopping is None else self.early_stopping.state_dict()
        return tensors, values

    def stand_ins(self) -> dict[str, Tensors]:
        """Tensors of the forms that `snapshot_parts` has after the first update, when the optimizer has its state."""
        parts: dict[str, Tensors] = {
            "model": named_tensors(self.model),
            "optimizer": optimizer_stand_ins(self.optimizer, parameter_names(self.model)),
        }
        return parts if self.ema is None else {**parts, "ema": self.ema.state_dict()}

    def restore(self, loaded: LoadedCheckpoint) -> None:
        """Become the state that was saved, in place: what follows is what would have followed.

        Settings stay this run's own. Raises InputError where the checkpoint is of another model or optimizer, or its
        values are not those of a run; what is half restored then must not be trained on.
        """
        try:
            self._restore(loaded)
        except InputError:
            raise
        except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint {loaded.path}: state.json was not written by this program ({type(error).__name__} {error})"
            ) from error

    def _restore(self, loaded: LoadedCheckpoint) -> None:
        values = cast(Mapping[str, Any], loaded.state)
        rules = {**_COUNTERS, **_VALUES}
        wrong = [name for name, valid in rules.items() if name not in values or not valid(values[name])]
        if wrong or values["step"] != loaded.step:
            what = f"has no valid {wrong[0]}" if wrong else "is of another step than its manifest"
            raise CheckpointError(f"checkpoint {loaded.path}: state.json {what}; it was not written by this program")
        load_tensors(named_tensors(self.model), loaded.tensors["model"], f"{loaded.path}: the weights")
        optimizer_state = loaded.tensors.get("optimizer", {})
        load_optimizer(self.optimizer, parameter_names(self.model), optimizer_state, values["optimizer"])
        self._restore_ema(loaded, values["ema_updates"])
        if self.early_stopping is not None and values["early_stopping"] is not None:
            self.early_stopping.load_state_dict(values["early_stopping"])
        self.precision.load_state_dict(values["precision"])
        for name in _COUNTERS:
            setattr(self, name, values[name])
        # Last, since nothing may draw from the generators between here and the next step.
        absent = restore_random_state(loaded.tensors.get("rng", {}), values["random"], self.precision.device)
        if absent:
            logger.warning("another kind of device (%s): random numbers differ from here on", ", ".join(absent))

    def _restore_ema(self, loaded: LoadedCheckpoint, num_updates: int | None) -> None:
        saved = loaded.tensors.get("ema")
        if self.ema is None:
            if saved is not None:
                logger.warning("EMA is off now; the average in %s is not used", loaded.path)
        elif saved is None or num_updates is None:
            logger.warning("%s holds no EMA; the average starts from its weights", loaded.path)
            self.ema.reset()
        else:
            self.ema.load_state_dict(saved, num_updates)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_position(value: object) -> bool:
    return value is None or (isinstance(value, dict) and all(_is_count(each) for each in value.values()))


# The fields of `TrainState` that are plain values, and what a file may give them.
_COUNTERS: dict[str, Callable[[object], bool]] = {
    "step": _is_count,
    "epoch": _is_count,
    "position": _is_position,
    "samples_seen": _is_count,
    "seconds": lambda value: isinstance(value, int | float) and value >= 0,
    "extra": lambda value: isinstance(value, dict),
}
# What else `snapshot_parts` writes.
_VALUES: dict[str, Callable[[object], bool]] = {
    "optimizer": lambda value: isinstance(value, dict),
    "precision": lambda value: isinstance(value, dict),
    "random": lambda value: isinstance(value, dict),
    "ema_updates": lambda value: value is None or _is_count(value),
    "early_stopping": lambda value: value is None or isinstance(value, dict),
}


class CheckpointManager(CheckpointSaver):
    """A run's checkpoints: `TrainState` saved in the background at its step boundaries, and what is kept of it.

    `best_metric` is the name under which `save` is given the value that decides; names ending in "loss" are better
    lower. The rest is `CheckpointSaver`'s and `SavePolicy`'s.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int,
        best_metric: str,
        *,
        keep_every: int | None = None,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        vocabulary_sha256: str | None = None,
        config_sha256: str | None = None,
        yardstick: str | None = None,
    ) -> None:
        policy = SavePolicy(keep_last, keep_every, every_steps, every_minutes)
        super().__init__(CheckpointStore(folder, policy, best_metric, vocabulary_sha256, config_sha256, yardstick))

    @classmethod
    def from_config(
        cls, folder: Path, section: CheckpointSection, *, vocabulary_sha256: str, config_sha256: str, yardstick: str
    ) -> "CheckpointManager":
        """As the recipe asks for."""
        return cls(
            folder,
            section.keep_last,
            section.best_metric,
            keep_every=section.keep_every,
            every_steps=section.every_steps,
            every_minutes=section.every_minutes,
            vocabulary_sha256=vocabulary_sha256,
            config_sha256=config_sha256,
            yardstick=yardstick,
        )

    def reserve(self, state: TrainState) -> None:
        """Allocate the memory of snapshots before training, so that the first save holds it up no longer than others.

        Twice the size of the state: what is being written, and what waits. More is allocated when more has to wait.
        """
        self.reserve_memory(state.stand_ins())

    def save(self, state: TrainState, metrics: Mapping[str, float] | None = None, *, wait: bool = False) -> None:
        """Save at a step boundary; returns when the state is copied, with `wait` when it is on disk.

        The checkpoint also becomes the best one if `metrics` holds `best_metric` and it is better. Raises
        CheckpointWriteError with `wait` alone; `poll` tells of every failure.
        """
        tensors, values = state.snapshot_parts()
        score = None if metrics is None else metrics.get(self.best_metric)
        self.submit(state.step, state.seconds, tensors, values, score)
        if wait:
            self.flush()


class Weights(NamedTuple):
    """Weights of a checkpoint under the names of the model's state dict; `kind` is "EMA" or "online"."""

    tensors: Tensors
    vocabulary_sha256: str | None
    kind: Literal["EMA", "online"]


def load_weights(checkpoint: Path, *, prefer_ema: bool = True) -> Weights:
    """The weights alone of the checkpoint folder `checkpoint`, verified; the averaged ones where they are kept."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a checkpoint folder, such as runs/demo/checkpoints/step-000001000")
    has_ema = "ema.safetensors" in read_manifest(checkpoint).files
    part: Literal["ema", "model"] = "ema" if prefer_ema and has_ema else "model"
    manifest, tensors = read_part(checkpoint, part)
    return Weights(tensors, manifest.vocabulary_sha256, "EMA" if part == "ema" else "online")
