"""What our optimizers share: a bad update is skipped on the device, and parameters of one shape are taken together.

All honour two tensors that the caller sets before `step`, after the convention of torch's own fused optimizers:
gradients are divided by `grad_scale`, and where `found_inf` is 1 nothing changes, neither weights nor state, without
the host having to look. Refuses nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor

# A torch parameter group: "params" and any of the optimizer's settings.
Group: TypeAlias = dict[str, Any]
Closure: TypeAlias = Callable[[], float]
# Numbers worked on together: the small matrices of a small model all at once, the large ones of a large model a few at
# a time, so that what is held meanwhile stays at some hundred MB.
STACK_ELEMENTS = 1 << 24


@runtime_checkable
class DeviceSkipping(Protocol):
    """An optimizer that can scale gradients and leave out an update without the host reading a value."""

    grad_scale: Tensor | None
    found_inf: Tensor | None

    @property
    def skips_on_device(self) -> bool:
        """Whether this instance honours `grad_scale` and `found_inf`."""
        ...


class Member(NamedTuple):
    """A parameter with a gradient, and the group that it is in."""

    parameter: Tensor
    group: Group


def alike(groups: Sequence[Group], settings: Sequence[str]) -> Iterator[list[Member]]:
    """Parameters to move together: of one shape, type, device and values of `settings`; their rates may differ."""
    found: dict[tuple[object, ...], list[Member]] = {}
    for group in groups:
        shared = tuple(group[name] for name in settings)
        for parameter in group["params"]:
            if parameter.grad is not None:
                key = (parameter.shape, parameter.dtype, parameter.device, shared)
                found.setdefault(key, []).append(Member(parameter, group))
    for members in found.values():
        together = max(1, STACK_ELEMENTS // max(1, members[0].parameter.numel()))
        for start in range(0, len(members), together):
            yield members[start : start + together]


def loss_of(closure: Closure | None) -> float | None:
    """What the closure of a `step` gives, worked out with gradients; None where there is none."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """[K, ...] of K tensors of one shape; a view where there is one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def usable_gradients(
    members: Sequence[Member], grad_scale: Tensor | None, found_inf: Tensor | None
) -> tuple[Tensor, Tensor | float]:
    """(a scaled copy of the gradients, [K, ...]; how much of the update counts: 1, or 0 where it is bad).

    A bad gradient comes as zeros, so that what is computed of it stays finite.
    """
    gradients = torch.stack([cast(Tensor, member.parameter.grad) for member in members])
    if grad_scale is not None:
        gradients.div_(grad_scale)
    if found_inf is None:
        return gradients, 1.0
    gradients.masked_fill_(found_inf > 0, 0.0)
    return gradients, (1.0 - found_inf).to(gradients.dtype)


def move(members: Sequence[Member], steps: Tensor, kept: Tensor | float, factor: float = 1.0) -> None:
    """parameter <- (1 - lr * weight_decay) * parameter - lr * factor * step, each with its group's rates.

    Where the update is bad `kept` is 0, and `steps` [K, ...] are zeros already.
    """
    rates: dict[tuple[float, float], list[int]] = {}
    for place, (_, group) in enumerate(members):
        rates.setdefault((group["lr"], group["weight_decay"]), []).append(place)
    each = steps.unbind()
    for (lr, weight_decay), places in rates.items():
        parameters = [members[place].parameter for place in places]
        if weight_decay:
            torch._foreach_mul_(parameters, 1.0 - kept * (lr * weight_decay))
        torch._foreach_add_(parameters, [each[place] for place in places], alpha=-lr * factor)
