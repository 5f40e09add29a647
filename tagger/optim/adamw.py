"""AdamW as torch makes it, in the form that skips on the device."""

import torch
from torch import Tensor

from tagger.optim.skipping import Group

# Where the fused form honours `grad_scale` and `found_inf`.
FUSED_DEVICES = frozenset({"cpu", "cuda"})


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
            fused=True if devices <= FUSED_DEVICES else None,
        )

    @property
    def skips_on_device(self) -> bool:
        """True in the fused form."""
        return all(group["fused"] for group in self.param_groups)

    def state_forms(self, parameter: Tensor) -> dict[str, Tensor]:
        """Tensors of the forms of a parameter's state, counters aside; their values mean nothing."""
        return {"exp_avg": parameter, "exp_avg_sq": parameter}
