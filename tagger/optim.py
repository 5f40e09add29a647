"""Optimizers that skip a bad update on the device, and their state by parameter name.

`AdamW` is torch's, `Muon` follows torch's; `MuonAdamW` is both as one. All honour two tensors that the caller sets
before `step`, after the convention of torch's own fused optimizers: gradients are divided by `grad_scale`, and where
`found_inf` is 1 nothing changes, neither weights nor state, without the host having to look. Refuses to load state of
other parameters.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor, nn

from tagger.errors import InputError
from tagger.module_state import clean_name
from tagger.sharding import like

logger = logging.getLogger(__name__)

# A torch parameter group: "params" and any of the optimizer's settings.
Group: TypeAlias = dict[str, Any]
Closure: TypeAlias = Callable[[], float]
# The quintic of Jordan 2024 and how often it is applied; torch's defaults.
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# Settings that say how the arithmetic is done and not what is computed.
_IMPLEMENTATION_KEYS = {"foreach", "fused", "capturable", "differentiable"}


@runtime_checkable
class DeviceSkipping(Protocol):
    """An optimizer that can scale gradients and leave out an update without the host reading a value."""

    grad_scale: Tensor | None
    found_inf: Tensor | None

    @property
    def skips_on_device(self) -> bool:
        """Whether this instance honours `grad_scale` and `found_inf`."""
        ...


class AdamW(torch.optim.AdamW):
    """torch's AdamW, in its fused form where that honours `grad_scale` and `found_inf` (CPU and CUDA)."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self, groups: list[Group], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
    ) -> None:
        devices = {p.device.type for group in groups for p in group["params"]}
        super().__init__(
            groups,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=True if devices <= {"cpu", "cuda"} else None,
        )

    @property
    def skips_on_device(self) -> bool:
        """True in the fused form."""
        return all(group["fused"] for group in self.param_groups)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) with the settings and state of `torch.optim.Muon`, for matrices and convolution kernels.

    A kernel [O, I, h, w] is taken as the matrix [O, I * h * w]. Tensors of one shape are taken together: small matrices
    are limited by the number of operations, and stacked, the 48 of a vit_tiny take about half the time of torch's one
    by one (2 CPU cores). Differs from torch's in rounding only, that of bfloat16 (of float32 where a CPU has no
    bfloat16 products).
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    skips_on_device = True

    def __init__(
        self,
        parameters: list[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr_fn: str | None = None,
    ) -> None:
        for parameter in parameters:
            if parameter.ndim < 2:
                raise ValueError(f"Muon moves matrices and kernels; a parameter has shape {list(parameter.shape)}")
        settings = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": NEWTON_SCHULZ_COEFFICIENTS,
            "ns_steps": NEWTON_SCHULZ_STEPS,
            "eps": 1e-7,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(parameters, settings)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(parameter)
            for parameters in alike.values():
                self._step_alike(group, parameters)
        return loss

    def _step_alike(self, group: Group, parameters: list[Tensor]) -> None:
        momenta = [self._momentum(parameter) for parameter in parameters]
        gradients = torch.stack([cast(Tensor, parameter.grad) for parameter in parameters])
        if self.grad_scale is not None:
            gradients.div_(self.grad_scale)
        kept: Tensor | float = 1.0
        if self.found_inf is not None:
            kept = 1.0 - self.found_inf
            # A gradient equal to the momentum leaves the momentum as it is, and what follows finite.
            gradients = torch.where(self.found_inf > 0, torch.stack(momenta), gradients)
        torch._foreach_lerp_(momenta, list(gradients.unbind()), 1.0 - group["momentum"])
        update = torch.stack(momenta)
        if group["nesterov"]:
            update = gradients.lerp_(update, group["momentum"])
        matrices = update.flatten(2)
        direction = orthogonalize(matrices, group["ns_coefficients"], group["ns_steps"], group["eps"])
        step_size = group["lr"] * lr_factor(group["adjust_lr_fn"], matrices.shape[1], matrices.shape[2])
        torch._foreach_mul_(parameters, 1.0 - kept * (group["lr"] * group["weight_decay"]))
        steps = (direction.to(update.dtype) * kept).reshape(update.shape)
        torch._foreach_add_(parameters, list(steps.unbind()), alpha=-step_size)

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return cast(Tensor, state["momentum_buffer"])


def orthogonalize(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The nearest orthogonal matrix of each of [K, M, N], roughly: singular values come out between about 0.7 and 1.2.

    Newton-Schulz iteration of a quintic, `coefficients` (a, b, c): X <- a X + (b A + c A A) X with A = X X^T.
    """
    a, b, c = coefficients
    x = matrices.to(_product_dtype(matrices.device))
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def lr_factor(adjustment: str | None, rows: int, columns: int) -> float:
    """What the learning rate of a [rows, columns] matrix is multiplied by.

    "original" (also None) keeps the gain of the layer the same at any width, sqrt(max(1, rows / columns)).
    "match_rms_adamw" gives updates the size of AdamW's, 0.2 * sqrt(max(rows, columns)) (arXiv 2502.16982).
    """
    if adjustment == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def _product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where its products are fast. A CPU without them emulates each, many times slower than float32."""
    if device.type == "cuda":
        return torch.bfloat16
    fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


class MuonAdamW(torch.optim.Optimizer):
    """Muon for some matrices and AdamW for everything else, as one optimizer: its groups and state are theirs."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self.muon = muon
        self.adamw = adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        count = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self.muon.state = self.adamw.state = self.state

    @property
    def skips_on_device(self) -> bool:
        """Whether both parts do."""
        return self.adamw.skips_on_device

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One update by both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in (self.muon, self.adamw):
            part.grad_scale, part.found_inf = self.grad_scale, self.found_inf
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for every torch optimizer."""
        super().load_state_dict(state_dict)
        self._share()


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Clean name by `id` of each parameter."""
    return {id(parameter): clean_name(name) for name, parameter in model.named_parameters()}


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """Live state tensors as `PARAMETER/KEY`, e.g. `head.weight/exp_avg`."""
    return {
        f"{names[id(parameter)]}/{key}": cast(Tensor, value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def optimizer_stand_ins(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """Tensors of the forms of `optimizer_tensors` once every parameter has been moved, counters aside.

    State is made by the first update; until then each parameter stands for its own.
    """
    matrices = {id(p) for group in _muon_groups(optimizer) for p in group["params"]}
    return {
        f"{names[id(p)]}/{key}": p
        for group in optimizer.param_groups
        for p in group["params"]
        for key in (("momentum_buffer",) if id(p) in matrices else ("exp_avg", "exp_avg_sq"))
    }


def _muon_groups(optimizer: torch.optim.Optimizer) -> list[Group]:
    if isinstance(optimizer, MuonAdamW):
        return optimizer.muon.param_groups
    return optimizer.param_groups if isinstance(optimizer, Muon) else []


def optimizer_settings(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """The kind of optimizer and, for each group, its parameters' names and settings, as JSON values.

    The learning rate of the moment is left out: it is a function of `initial_lr` and the step.
    """
    groups = [
        {
            "parameters": [names[id(parameter)] for parameter in group["params"]],
            "settings": {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in group.items()
                if key not in {"params", "lr"} | _IMPLEMENTATION_KEYS
            },
        }
        for group in optimizer.param_groups
    ]
    return {"kind": type(optimizer).__name__, "groups": groups}


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
) -> None:
    """Put saved state tensors back. Settings (weight decay, ...) stay as they are now; what differs is logged.

    Raises InputError where the saved state is of another optimizer or of other parameters.
    """
    current = optimizer_settings(optimizer, names)
    if settings.get("kind") != current["kind"]:
        raise InputError(
            f"the checkpoint is of the optimizer {settings.get('kind')}, this run has {current['kind']}; set "
            "optimizer.name back, or start a new run from the weights alone"
        )
    _compare_groups(settings["groups"], current["groups"])
    by_name = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition("/")
        if owner not in by_name or (tensor.ndim > 0 and tensor.shape != by_name[owner].shape):
            raise InputError(f"the checkpoint's optimizer state {name} {list(tensor.shape)} fits no parameter here")
        state.setdefault(owner, {})[key] = like(tensor, by_name[owner]) if tensor.ndim else tensor
    packed = optimizer.state_dict()
    packed["state"] = {index: state[name] for index, name in enumerate(by_name) if name in state}
    optimizer.load_state_dict(packed)


def _compare_groups(saved: Iterable[Mapping[str, Any]], current: Iterable[Mapping[str, Any]]) -> None:
    was = {name: group["settings"] for group in saved for name in group["parameters"]}
    now = {name: group["settings"] for group in current for name in group["parameters"]}
    different = sorted(was.keys() ^ now.keys())
    if different:
        raise InputError(
            f"the checkpoint's optimizer and this run's do not move the same parameters; the first: {different[0]}"
        )
    changes: dict[str, str] = {}
    for name, settings in now.items():
        if was[name].keys() != settings.keys():
            raise InputError(f"the checkpoint's optimizer moves {name} by another rule; start from the weights alone")
        for key, value in settings.items():
            if was[name][key] != value:
                changes[f"{key} was {was[name][key]}, is {value} now"] = name
    for change, name in changes.items():
        logger.warning("optimizer (%s and others): %s; the run goes on with the new value", name, change)
