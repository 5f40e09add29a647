"""One side of a comparison: a model, what its outputs mean, and which images it was made from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from tagger.data.split import Part, Split
from tagger.metrics.keys import probability_of


@dataclass(frozen=True)
class Contender:
    """A model on its device. logit_thresholds: [C], fitted for each tag or the same for all.

    split: that of its own run, None for a model folder by itself; unchanged: whether it was trained with that.
    """

    name: str
    tags: tuple[str, ...]
    model: nn.Module
    logit_thresholds: NDArray[np.float64]
    fitted: bool
    split: Split | None
    unchanged: bool | None

    def was_made_from(self, image_ids: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """bool [N]: the images that its weights, or its fitted thresholds, come from; none where that is not known."""
        if self.split is None:
            return np.zeros(len(image_ids), dtype=np.bool_)
        used = np.isin(self.split.parts, (Part.TRAIN, Part.CALIB) if self.fitted else (Part.TRAIN,))
        found: NDArray[np.bool_] = np.isin(image_ids, self.split.keys[used])
        return found

    def on_tags(self, tags: Sequence[str]) -> tuple[nn.Module, NDArray[np.float64]]:
        """The model with these of its tags as outputs, and their thresholds."""
        place_of = {tag: place for place, tag in enumerate(self.tags)}
        columns = [place_of[tag] for tag in tags]
        return _SomeOutputs(self.model, columns), self.logit_thresholds[columns]

    def _one(self) -> float:
        return probability_of(float(self.logit_thresholds[0]))

    def facts(self, common: Sequence[str], image_ids: NDArray[np.uint64]) -> dict[str, object]:
        """What a report says about it. image_ids: those that were asked for."""
        shared = set(common)
        return {
            "weights": self.name,
            "num_tags": len(self.tags),
            "left_out": [tag for tag in self.tags if tag not in shared],
            "thresholds": "fitted for each tag" if self.fitted else f"{self._one():g} for all tags",
            "num_images_it_was_made_from": None if self.split is None else int(self.was_made_from(image_ids).sum()),
            "training_part_unchanged": self.unchanged,
        }


class _SomeOutputs(nn.Module):
    def __init__(self, model: nn.Module, columns: Sequence[int]) -> None:
        super().__init__()
        self._model, self._columns = model, list(columns)

    def forward(self, images: Tensor, valid_sizes: Tensor) -> Tensor:
        logits: Tensor = self._model(images, valid_sizes)
        return logits[:, self._columns]
