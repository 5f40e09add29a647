"""What a training loop measures between two log steps, without waiting for the device in between."""

import logging
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from tagger.checkpoint.format import Json
from tagger.guard import SpikeWatch

logger = logging.getLogger(__name__)


class TrainingMeter:
    """Sums since the last log step; losses stay on the device until they are read."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._images: list[int] = []
        self._steps: list[int] = []
        self._grad_norm: Tensor | None = None
        self._waited_s, self._seconds = 0.0, 0.0
        self._spikes = SpikeWatch()

    def add(self, step: int, loss: Tensor, grad_norm: Tensor, num_images: int, waited_s: float, seconds: float) -> None:
        """Take in update `step` (from 1): its loss summed over images and its gradient norm, scalars on the device.

        `seconds` is what the whole update took, `waited_s` the part of it that went by waiting for data.
        """
        self._losses.append(loss)
        self._images.append(num_images)
        self._steps.append(step)
        self._grad_norm = grad_norm
        self._waited_s += waited_s
        self._seconds += seconds

    def read(self, learning_rate: float, nonfinite_steps: Tensor) -> dict[str, float]:
        """The scalars of the updates since the last call, with the loss averaged over images, and a fresh start.

        A loss that is not finite, whose update was left out, is left out of the average. Waits for the device.
        """
        assert self._grad_norm is not None, "nothing was added since the last call"
        losses = torch.stack(self._losses).tolist()
        finite = [(loss, number) for loss, number in zip(losses, self._images, strict=True) if math.isfinite(loss)]
        spikes = 0
        for step, loss, number in zip(self._steps, losses, self._images, strict=True):
            if self._spikes.is_spike(loss / number):
                spikes += 1
                logger.warning("loss spike at step %d: %.4g, far above the steps before", step, loss / number)
        images = sum(number for _, number in finite)
        scalars = {
            "train/loss": math.fsum(loss for loss, _ in finite) / images if images else math.nan,
            "train/learning_rate": learning_rate,
            "train/grad_norm": self._grad_norm.item(),
            "train/images_per_second": sum(self._images) / self._seconds,
            "train/data_wait_fraction": self._waited_s / self._seconds,
            "train/skipped_updates": float(nonfinite_steps.item()),
            "train/loss_spikes": float(spikes),
        }
        self._losses, self._images, self._steps = [], [], []
        self._waited_s, self._seconds = 0.0, 0.0
        return scalars

    def state_dict(self) -> dict[str, Json]:
        """What has been added since the last `read`, as JSON values; waits for the device."""
        losses = torch.stack(self._losses).tolist() if self._losses else []
        return {
            # A number that is not finite cannot be kept in JSON, and does not count anyway.
            "losses": [loss if math.isfinite(loss) else None for loss in losses],
            "images": cast(list[Json], list(self._images)),
            "steps": cast(list[Json], list(self._steps)),
            "waited_s": self._waited_s,
            "seconds": self._seconds,
            "spikes": self._spikes.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Json], device: torch.device) -> None:
        """Go on adding to what was saved."""
        values = cast(Mapping[str, Any], state)
        self._losses = [torch.tensor(math.nan if v is None else v, device=device) for v in values["losses"]]
        self._images, self._steps = list(values["images"]), list(values["steps"])
        self._waited_s, self._seconds = values["waited_s"], values["seconds"]
        self._spikes.load_state_dict(values["spikes"])
