"""What a training loop measures between two log steps, without waiting for the device in between."""

import math

import torch
from torch import Tensor

from tagger.errors import DivergedError


class TrainingMeter:
    """Sums since the last log step; the loss stays on the device until it is read."""

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), device=device)
        self._grad_norm = torch.zeros((), device=device)
        self._images, self._waited_s, self._seconds = 0, 0.0, 0.0

    def add(self, loss: Tensor, grad_norm: Tensor, num_images: int, waited_s: float, seconds: float) -> None:
        """Take in an update: its loss summed over images and its gradient norm, scalars on the device.

        `seconds` is what the whole update took, `waited_s` the part of it that went by waiting for data.
        """
        self._loss += loss
        self._grad_norm = grad_norm
        self._images += num_images
        self._waited_s += waited_s
        self._seconds += seconds

    def read(self, step: int, learning_rate: float, nonfinite_steps: Tensor) -> dict[str, float]:
        """The scalars of the updates since the last call, with the loss averaged over images, and a fresh start.

        Waits for the device. Raises DivergedError when the loss is not finite.
        """
        scalars = {
            "train/loss": self._loss.item() / self._images,
            "train/learning_rate": learning_rate,
            "train/grad_norm": self._grad_norm.item(),
            "train/images_per_second": self._images / self._seconds,
            "train/data_wait_fraction": self._waited_s / self._seconds,
            "train/skipped_updates": float(nonfinite_steps.item()),
        }
        if not math.isfinite(scalars["train/loss"]):
            raise DivergedError(f"train/loss is {scalars['train/loss']} at step {step}; try a lower learning rate")
        self._loss.zero_()
        self._images, self._waited_s, self._seconds = 0, 0.0, 0.0
        return scalars
