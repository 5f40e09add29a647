"""A module's tensors by clean name, and putting saved ones back exactly. Refuses names and shapes that do not match."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tagger.errors import InputError
from tagger.sharding import fill

_COMPILED = "_orig_mod."
_SHOWN = 3


def clean_name(name: str) -> str:
    """A parameter's name without the marks of torch.compile, so that compiled and plain models share checkpoints."""
    return name.replace(_COMPILED, "")


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, live (no copies), under clean names."""
    return {clean_name(name): tensor for name, tensor in module.state_dict(keep_vars=True).items()}


def check_tensors(current: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Raise InputError naming the first differences between two sets of tensors."""
    faults = [f"{name} is missing" for name in current if name not in saved]
    faults += [f"{name} is unknown here" for name in saved if name not in current]
    for name, here in current.items():
        there = saved.get(name, here)
        if here.shape != there.shape or here.dtype != there.dtype:
            faults.append(f"{name} is {_form(there)} in the file and {_form(here)} here")
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise InputError(
            f"{what} do not fit this model: {'; '.join(faults[:_SHOWN])}{more}; "
            "use the settings of the model section that they were saved with"
        )


def check_weights(current: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """As `check_tensors`, but position embeddings may be of another grid: the model resizes them as it loads them."""
    resized = {name for name in current.keys() & saved.keys() if name.split(".")[-1] == "pos_embed"}
    own, there = ({k: v for k, v in tensors.items() if k not in resized} for tensors in (current, saved))
    check_tensors(own, there, what)


@torch.no_grad()
def load_tensors(current: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copy saved tensors into current ones, in place, after checking that names, shapes and types are the same."""
    check_tensors(current, saved, what)
    for name, tensor in current.items():
        fill(tensor, saved[name])


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
