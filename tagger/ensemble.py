"""Several networks as one model: started apart, trained side by side, each by its own loss (a deep ensemble).

What a single network learns from few images depends much on where it starts; the mean of several depends on it less
(Lakshminarayanan et al. 2017, who average probabilities; logits did better on icons). They see the same batches, each
with dropout of its own; an update that is not finite for one is left out for all. Memory and operations are those of
all of them. Refuses fewer than two.
"""

from collections.abc import Sequence
from typing import Protocol, cast

from torch import Tensor, nn


class Member(Protocol):
    """What a network has to offer beside being a module."""

    patch_dropout: float

    def set_head_bias(self, tag_priors: Tensor) -> None:
        """Start every tag at its prior."""

    def num_parameters(self) -> int:
        """How many numbers training moves."""


class Ensemble(nn.Module):
    """Networks that see the same images; their logits are averaged. State-dict names: `members.I.` and the network's.

    Training takes the loss of each apart (`networks_in`): the loss of their mean would let one lean on the others.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(members) < 2:
            raise ValueError(f"an ensemble of {len(members)}; pass two networks or more")
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor, valid_sizes: Tensor | None = None) -> Tensor:
        """Logits [B, C], the mean of the members', in their dtype; arguments as they take them."""
        first, *others = self.members
        total: Tensor = first(images, valid_sizes)
        for member in others:
            total = total + member(images, valid_sizes)
        return total / len(self.members)

    @property
    def patch_dropout(self) -> float:
        """Share of the patch tokens that each member leaves out in training, each its own."""
        return self._networks[0].patch_dropout

    @patch_dropout.setter
    def patch_dropout(self, share: float) -> None:
        for member in self._networks:
            member.patch_dropout = share

    def set_head_bias(self, tag_priors: Tensor) -> None:
        """Start every tag of every member at its prior: `tag_priors` [C], 0..1."""
        for member in self._networks:
            member.set_head_bias(tag_priors)

    def num_parameters(self) -> int:
        """How many numbers training moves, in all members."""
        return sum(member.num_parameters() for member in self._networks)

    @property
    def _networks(self) -> list[Member]:
        return [cast(Member, member) for member in self.members]


def networks_in(model: nn.Module) -> list[nn.Module]:
    """The networks that a model consists of: the members of an ensemble, else the model itself."""
    return list(model.members) if isinstance(model, Ensemble) else [model]
