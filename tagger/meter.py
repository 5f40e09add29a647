"""What a training loop measures between two log steps, without waiting for the device in between."""

import time

import torch
from torch import Tensor


class TrainingMeter:
    """Sums since the last log step; the loss stays on the device until it is read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._clear()

    def _clear(self) -> None:
        self._loss, self._grad_norm = torch.zeros((), device=self._device), torch.zeros((), device=self._device)
        self._images, self._waited_s, self._started = 0, 0.0, time.perf_counter()

    def add(self, loss: Tensor, grad_norm: Tensor, num_images: int, waited_s: float) -> None:
        self._loss += loss
        self._grad_norm = grad_norm
        self._images += num_images
        self._waited_s += waited_s

    def read(self, learning_rate: float) -> dict[str, float]:
        """The scalars of the steps since the last call (means over images), and a fresh start."""
        elapsed = time.perf_counter() - self._started
        scalars = {
            "train/loss": self._loss.item() / self._images,
            "train/learning_rate": learning_rate,
            "train/grad_norm": self._grad_norm.item(),
            "train/images_per_second": self._images / elapsed,
            "train/data_wait_fraction": self._waited_s / elapsed,
        }
        self._clear()
        return scalars
