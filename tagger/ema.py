"""The exponential moving average of a model's weights, which usually scores better than the weights themselves.

    average <- average + (1 - d) * (weights - average),   d = min(decay, (1 + t) / (10 + t)) at update t = 1, 2, ...

The warm-up of d (as in TensorFlow's ExponentialMovingAverage) keeps the random start out of the average. An update
that was left out counts as one of t, since the host does not know of it: after the 16 that fp16 may lose while its
scale finds its place, the start has a weight of 2e-7 in the average of the next 100 updates. Buffers, such as the
running statistics of batch norm, are averages already and are copied. Refuses a decay outside 0..1.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tagger.module_state import load_tensors, named_tensors


class ExponentialMovingAverage:
    """Averages the floating-point parameters of `model`, which must be on its device already and stay there."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay={decay} is not between 0 and 1; try 0.999")
        self.decay = decay
        self.num_updates = 0
        self._model = model
        parameters = {id(parameter) for parameter in model.parameters()}
        source = named_tensors(model)
        # Tied weights have one average under all their names.
        copies = {id(tensor): tensor.detach().clone() for tensor in source.values()}
        self._average = {name: copies[id(tensor)] for name, tensor in source.items()}
        unique = {id(tensor): (tensor, copies[id(tensor)]) for tensor in source.values()}
        averaged = [pair for key, pair in unique.items() if key in parameters and pair[0].is_floating_point()]
        copied = [pair for key, pair in unique.items() if key not in parameters or not pair[0].is_floating_point()]
        self._weights, self._averages = [w.detach() for w, _ in averaged], [a for _, a in averaged]
        self._buffers, self._buffer_copies = [b.detach() for b, _ in copied], [c for _, c in copied]
        self._swapped = False

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's weights after an optimizer update; one pass over them, no wait for the device."""
        assert not self._swapped, "the model holds the averaged weights now"
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self._averages, self._weights, 1.0 - decay)
        if self._buffers:
            torch._foreach_copy_(self._buffer_copies, self._buffers)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """While the block runs the model holds the averaged weights, in place; its own come back bit for bit."""
        assert not self._swapped, "the averaged weights are in the model already"
        self._exchange()
        self._swapped = True
        try:
            yield
        finally:
            self._exchange()
            self._swapped = False

    def online_model(self) -> nn.Module:
        """The model with its own weights while it holds the averaged ones: they are exchanged around each forward pass.

        So that both are scored in one pass over the images. A second model in memory would cost as much as the average
        itself; exchanging costs a few copies of the weights a batch, little beside a forward pass of some images.
        """
        return _Online(self, self._model)

    @contextmanager
    def _swapped_back(self) -> Iterator[None]:
        assert self._swapped, "the model holds its own weights already"
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        pairs = zip(self._weights + self._buffers, self._averages + self._buffer_copies, strict=True)
        for mine, other in pairs:
            kept = mine.clone()
            mine.copy_(other)
            other.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights and copied buffers under the names of the model's own state dict; not copies."""
        assert not self._swapped, "the model holds the averaged weights now"
        return dict(self._average)

    def load_state_dict(self, tensors: Mapping[str, Tensor], num_updates: int) -> None:
        """Go on from a saved average. Raises ValueError where names or shapes are not this model's."""
        load_tensors(self._average, tensors, "EMA weights")
        self.num_updates = num_updates

    def reset(self) -> None:
        """Start again from the model's present weights."""
        self.load_state_dict(named_tensors(self._model), 0)


class _Online(nn.Module):
    def __init__(self, average: ExponentialMovingAverage, model: nn.Module) -> None:
        super().__init__()
        self.model, self._average = model, average
        self.train(model.training)

    def forward(self, *inputs: Tensor) -> Tensor:
        with self._average._swapped_back():
            outputs: Tensor = self.model(*inputs)
        return outputs
