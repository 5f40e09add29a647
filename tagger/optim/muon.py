"""Muon for matrices, by itself and with AdamW for everything else as one optimizer. Refuses vectors."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from tagger.optim.adamw import AdamW
from tagger.optim.skipping import Closure, Group, Member, alike, loss_of, move, stacked, usable_gradients

# The quintic of Jordan 2024 and how often it is applied; torch's defaults.
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
_SETTINGS = ("momentum", "nesterov", "ns_coefficients", "ns_steps", "eps", "adjust_lr_fn")


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
        groups: list[Group] | list[nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr_fn: str | None = None,
    ) -> None:
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
        super().__init__(groups, settings)
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.ndim < 2:
                raise ValueError(f"Muon moves matrices and kernels; a parameter has shape {list(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        loss = loss_of(closure)
        for members in alike(self.param_groups, _SETTINGS):
            self._step_alike(members)
        return loss

    def _step_alike(self, members: list[Member]) -> None:
        group = members[0].group
        momenta = [self._momentum(member.parameter) for member in members]
        gradients, kept = usable_gradients(members, self.grad_scale, self.found_inf)
        momentum = stacked(momenta).lerp_(gradients, kept * (1.0 - group["momentum"]))
        if len(members) > 1:
            torch._foreach_copy_(momenta, list(momentum.unbind()))
        update = gradients.lerp_(momentum, group["momentum"]) if group["nesterov"] else momentum
        matrices = update.flatten(2)
        direction = orthogonalize(matrices, group["ns_coefficients"], group["ns_steps"], group["eps"])
        steps = (direction.to(update.dtype) * kept).reshape(update.shape)
        move(members, steps, kept, lr_factor(group["adjust_lr_fn"], matrices.shape[1], matrices.shape[2]))

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return cast(Tensor, state["momentum_buffer"])

    def state_forms(self, parameter: Tensor) -> dict[str, Tensor]:
        """Tensors of the forms of a parameter's state, counters aside; their values mean nothing."""
        return {"momentum_buffer": parameter}


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
        loss = loss_of(closure)
        for part in (self.muon, self.adamw):
            part.grad_scale, part.found_inf = self.grad_scale, self.found_inf
            part.step()
        return loss

    def state_forms(self, parameter: Tensor) -> dict[str, Tensor]:
        """Tensors of the forms of a parameter's state, counters aside; their values mean nothing."""
        moved_by_muon = any(p is parameter for group in self.muon.param_groups for p in group["params"])
        return (self.muon if moved_by_muon else self.adamw).state_forms(parameter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for every torch optimizer."""
        super().load_state_dict(state_dict)
        self._share()
