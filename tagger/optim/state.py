"""An optimizer's state by parameter name, for checkpoints. Refuses to load state of other parameters or optimizers."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from tagger.errors import InputError
from tagger.module_state import clean_name
from tagger.sharding import like

logger = logging.getLogger(__name__)

# Settings that say how the arithmetic is done and not what is computed.
_IMPLEMENTATION_KEYS = {"foreach", "fused", "capturable", "differentiable"}


@runtime_checkable
class _HasForms(Protocol):
    def state_forms(self, parameter: Tensor) -> dict[str, Tensor]: ...


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

    State is made by the first update; until then these say how much memory it takes. Nothing for an optimizer that does
    not say what forms its state has.
    """
    if not isinstance(optimizer, _HasForms):
        return {}
    return {
        f"{names[id(p)]}/{key}": form
        for group in optimizer.param_groups
        for p in group["params"]
        for key, form in optimizer.state_forms(p).items()
    }


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
            "optimizer.name back, or start a new run from the weights alone (checkpoint.init_from=RUN)"
        )
    _compare_groups(settings["groups"], current["groups"])
    by_name = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    forms = optimizer_stand_ins(optimizer, names)
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition("/")
        if owner not in by_name or (tensor.ndim > 0 and tensor.shape != forms.get(name, by_name[owner]).shape):
            raise InputError(f"the checkpoint's optimizer state {name} {list(tensor.shape)} fits no parameter here")
        alike = tensor.shape == by_name[owner].shape
        state.setdefault(owner, {})[key] = like(tensor, by_name[owner]) if alike else tensor
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
            raise InputError(
                f"the checkpoint's optimizer moves {name} by another rule; start a new run from the weights alone "
                "(checkpoint.init_from=RUN)"
            )
        for key, value in settings.items():
            if was[name][key] != value:
                changes[f"{key} was {was[name][key]}, is {value} now"] = name
    for change, name in changes.items():
        logger.warning("optimizer (%s and others): %s; the run goes on with the new value", name, change)
