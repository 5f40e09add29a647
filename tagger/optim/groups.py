"""Which parameters of a model move alike: parameter groups, each with its learning rate and weight decay.

Refuses layer-wise decay of a model without `blocks`. Buffers and frozen parameters are in no group.
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from tagger.ensemble import networks_in
from tagger.errors import InputError
from tagger.module_state import clean_name
from tagger.optim.skipping import Group

BLOCKS = "blocks"


def is_inner_matrix(name: str, parameter: Tensor) -> bool:
    """Whether this is a matrix of a block, or a kernel of a stem's stages: what Muon is for."""
    return parameter.ndim >= 2 and not {BLOCKS, "stages"}.isdisjoint(clean_name(name).split("."))


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    *,
    layer_decay: float | None = None,
    wanted: Callable[[str, Tensor], bool] | None = None,
) -> list[Group]:
    """The trainable parameters, or those of them that are `wanted`, by learning rate and weight decay.

    Weights of linear maps and convolutions decay; norms, biases, layer scale, position embeddings and class tokens do
    not. `layer_decay`, 0..1, multiplies the learning rate once for each layer between a parameter and the head
    (`layers_below_head`), so that what was learnt before stays and the head learns quickly (BEiT, Bao et al. 2022).
    """
    below = None if layer_decay is None else layers_below_head(model)
    groups: dict[tuple[bool, float], Group] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or (wanted is not None and not wanted(name, parameter)):
            continue
        decays = parameter.ndim >= 2 and clean_name(name).endswith("weight")
        lr = learning_rate
        if layer_decay is not None and below is not None:
            lr *= layer_decay ** below[id(parameter)]
        empty: Group = {"params": [], "lr": lr, "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault((decays, lr), empty)["params"].append(parameter)
    # Those that decay first, the head before what lies below it.
    return [groups[key] for key in sorted(groups, reverse=True)]


def layers_below_head(model: nn.Module) -> Mapping[int, int]:
    """How many layers below the head each parameter lies, by its `id`.

    The last of N blocks is 1 below, the first N; its own parameters and what it names before its `blocks` (stem,
    position embeddings, class token) are N + 1 below, what it names after them (last norm, head) 0.
    """
    below: dict[int, int] = {}
    for network in networks_in(model):
        below |= _layers_below_head(network)
    return below


def _layers_below_head(network: nn.Module) -> dict[int, int]:
    children = dict(network.named_children())
    if BLOCKS not in children:
        raise InputError(f"optimizer.layer_decay needs a model with `{BLOCKS}`, this one has none; set it to null")
    count = len(list(children[BLOCKS].children()))
    below = {id(parameter): count + 1 for parameter in network.parameters()}
    names = list(children)
    for name in names[names.index(BLOCKS) + 1 :]:
        below |= {id(parameter): 0 for parameter in children[name].parameters()}
    for place, block in enumerate(children[BLOCKS].children()):
        below |= {id(parameter): count - place for parameter in block.parameters()}
    return below
