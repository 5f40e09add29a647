"""Adafactor: Adam's kind of step for a quarter of its state. Refuses nothing."""

from typing import Any, cast

import torch
from torch import Tensor

from tagger.optim.skipping import Closure, Group, Member, alike, loss_of, move, stacked, usable_gradients

# The second moment is averaged with 1 - t ** -DECAY_POWER at update t, at most betas[1] (Shazeer & Stern 2018, 7.2).
DECAY_POWER = 0.8
# Matrices with a shorter side are too small to be worth factoring.
MIN_SIDE = 32
# Added to squared gradients, so that nothing is divided by zero.
TINY = 1e-30
MOMENTUM_DTYPE = torch.bfloat16
_SETTINGS = ("betas",)


class Adafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer & Stern 2018) as Zhai et al. 2022 trained large vision transformers with it (section 3.4).

    The second moment of a matrix is the outer product of its rows' and its columns' means; kernels [O, I, h, w] count
    as matrices [O, I * h * w], and what has a side below 32 keeps a whole second moment. The first moment, of the
    scaled gradient and not corrected for its start, is kept in bfloat16: 2 bytes a parameter together, where AdamW has
    8. `betas`: of the first moment, and the most that the second's may be. Learning rates and weight decay are AdamW's,
    whose steps have the same size; neither the paper's relative step nor its clipping by root mean square is applied.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    skips_on_device = True

    def __init__(
        self, groups: list[Group], *, lr: float, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = loss_of(closure)
        for members in alike(self.param_groups, _SETTINGS):
            self._step_alike(members)
        return loss

    def _step_alike(self, members: list[Member]) -> None:
        momentum_decay, most = members[0].group["betas"]
        states = [self._state(member.parameter) for member in members]
        gradients, kept = usable_gradients(members, self.grad_scale, self.found_inf)
        counts = torch.stack([state["step"] for state in states]) + kept
        torch._foreach_copy_([state["step"] for state in states], list(counts.unbind()))
        # The first update, and one that was skipped before it, give weight 1 and no infinity.
        weight = counts.pow(-DECAY_POWER).clamp(1.0 - most, 1.0)
        updates = _scaled(gradients, states, (weight * kept).to(gradients.dtype))
        if self.found_inf is not None:
            updates.masked_fill_(self.found_inf > 0, 0.0)
        momentum = stacked([state["momentum"] for state in states]).to(updates.dtype)
        momentum = momentum.lerp_(updates, kept * (1.0 - momentum_decay))
        torch._foreach_copy_([state["momentum"] for state in states], list(momentum.unbind()))
        move(members, momentum.mul_(kept), kept)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for key, form in self.state_forms(parameter).items():
                state[key] = torch.zeros(form.shape, dtype=form.dtype, device=form.device)
        return cast(dict[str, Tensor], state)

    def state_forms(self, parameter: Tensor) -> dict[str, Tensor]:
        """Tensors of the forms of a parameter's state, counters aside; their values mean nothing."""
        momentum = parameter.new_empty((), dtype=MOMENTUM_DTYPE).expand(parameter.shape)
        rows, columns = _matrix_shape(parameter)
        if min(rows, columns) < MIN_SIDE:
            return {"momentum": momentum, "variance": parameter}
        one = parameter.new_empty(())
        return {"momentum": momentum, "row_variance": one.expand(rows), "column_variance": one.expand(columns)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for every torch optimizer, which gives state the type of its parameter: the momentum is put back."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["momentum"] = state["momentum"].to(MOMENTUM_DTYPE)
            state["step"] = state["step"].to(state["momentum"].device)


def _matrix_shape(parameter: Tensor) -> tuple[int, int]:
    return (
        (parameter.shape[0], parameter.numel() // parameter.shape[0]) if parameter.ndim > 1 else (1, parameter.numel())
    )


def _scaled(gradients: Tensor, states: list[dict[str, Tensor]], weight: Tensor) -> Tensor:
    """Take gradients [K, ...] into the second moments with `weight` [K], and divide them by the roots; in place."""
    if "variance" in states[0]:
        held = [state["variance"] for state in states]
        variance = stacked(held).lerp_(gradients.square() + TINY, weight.reshape(-1, *[1] * (gradients.ndim - 1)))
        torch._foreach_copy_(held, list(variance.unbind()))
        return gradients.mul_(variance.rsqrt())
    matrices, factors = gradients.flatten(2), []
    for key, along in (("row_variance", 2), ("column_variance", 1)):
        held = [state[key] for state in states]
        # The norm's square over the length is the mean of the squares, which then need no memory.
        mean = torch.linalg.vector_norm(matrices, dim=along).square().div_(matrices.shape[along]) + TINY
        factors.append(stacked(held).lerp_(mean, weight[:, None]))
        torch._foreach_copy_(held, list(factors[-1].unbind()))
    by_row, by_column = factors
    matrices = matrices.mul_((by_row / by_row.mean(dim=1, keepdim=True)).rsqrt()[:, :, None])
    return matrices.mul_(by_column.rsqrt()[:, None, :]).reshape(gradients.shape)
