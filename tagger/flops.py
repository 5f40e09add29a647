"""The arithmetic of training, counted: products of matrices and convolutions, forward and backward, without doing them.

A multiplication with its addition is two operations. What works element by element is not counted, nor is the
optimizer. Refuses nothing.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def training_flops(build: Callable[[], nn.Module], batch_size: int, image_size: int) -> int:
    """Of one forward and backward pass of the model that `build` makes, over uint8 squares [B, 3, S, S]."""
    with torch.device("meta"):
        model = build()
    # Shapes without values, as if on a CPU: some of what models ask about a device is not known of "meta". Attention in
    # plain products, which torch's counter has formulas of; it has none of the kernels for CPUs.
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        images = torch.zeros(batch_size, 3, image_size, image_size, dtype=torch.uint8)
        model.to_empty(device="cpu").train()(images).sum().backward()
    return int(counter.get_total_flops())
