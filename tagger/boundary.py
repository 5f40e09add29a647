"""The last step boundary: what a step changes before its update, so that an error in the middle leaves a state to save.

Forward and backward move torch's random generators and the model's buffers (batch norm); weights, optimizer and
averages move in the update. Until the update begins, the boundary can be had back; from then until the next mark it
cannot.
"""

import torch
from torch import Tensor, nn


class StepBoundary:
    """Marks step boundaries of a training loop; `intact` says whether `restore` gives the last one back."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._buffers = [buffer.detach() for buffer in model.buffers()]
        self._copies = [buffer.clone() for buffer in self._buffers]
        self.intact = False
        self.mark()

    @torch.no_grad()
    def mark(self) -> None:
        """The state is complete: remember what the next step changes before its update. Does not wait for a device."""
        if self._buffers:
            torch._foreach_copy_(self._copies, self._buffers)
        self._host_random = torch.get_rng_state()
        if self._device.type == "cuda":
            self._device_random = torch.cuda.get_rng_state(self._device)
        elif self._device.type == "mps":
            self._device_random = torch.mps.get_rng_state()
        self.intact = True

    def begin_update(self) -> None:
        """Weights are about to move."""
        self.intact = False

    @torch.no_grad()
    def undo_buffers(self, left_out: Tensor) -> None:
        """Put buffers back where `left_out`, a bool scalar on the device, is true: statistics of a bad batch stay out.

        Does not wait for the device.
        """
        for buffer, copy in zip(self._buffers, self._copies, strict=True):
            buffer.copy_(torch.where(left_out, copy, buffer))

    @torch.no_grad()
    def restore(self) -> None:
        """Put generators and buffers back as they were at the mark; the weights have not moved since."""
        assert self.intact, "the update was under way: there is no boundary to go back to"
        pairs: list[tuple[Tensor, Tensor]] = list(zip(self._buffers, self._copies, strict=True))
        for buffer, copy in pairs:
            buffer.copy_(copy)
        torch.set_rng_state(self._host_random)
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(self._device_random, self._device)
        elif self._device.type == "mps":
            torch.mps.set_rng_state(self._device_random)
