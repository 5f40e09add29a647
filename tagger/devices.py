"""Which device a run uses, and in which precision it computes there. Refuses what the machine does not have."""

import contextlib
import logging
from typing import Literal

import torch

from tagger.errors import InputError

logger = logging.getLogger(__name__)

PrecisionMode = Literal["auto", "bf16", "fp16", "off"]


def resolve_device(name: str) -> torch.device:
    """The device that `training.device` means; "auto" is CUDA, else Apple's GPU, else the CPU.

    Also tells torch that products in 16 bits add up in float32 throughout: its default lets CUDA add parts in 16 bits.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available.get(name, False):
        there = ", ".join(kind for kind, usable in available.items() if usable)
        raise InputError(
            f"training.device={name}, but torch {torch.__version__} finds no such device (it finds: {there}); "
            "use training.device=auto, or install the build of torch for that device"
        )
    return torch.device(name)


def autocast_dtype(mode: PrecisionMode, device: torch.device) -> torch.dtype | None:
    """What `training.mixed_precision` means on a device; None is float32 throughout."""
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return None
    if mode == "fp16":
        if device.type != "cuda":
            raise InputError(
                f"training.mixed_precision=fp16 needs a CUDA device, this run is on {device.type}; "
                "use auto, or bf16 where the hardware has it"
            )
        return torch.float16
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        if mode == "bf16":
            raise InputError("training.mixed_precision=bf16, but this GPU has no bfloat16; use fp16 or off")
        logger.warning("this GPU has no bfloat16: training in float32; training.mixed_precision=fp16 is faster")
        return None
    return torch.bfloat16


def product_dtype(like: torch.Tensor) -> torch.dtype:
    """What a matrix product with this tensor of floats is computed in here: autocast's type where that is on."""
    kind = like.device.type
    # Torch knows no autocast on "meta", where tensors have shapes alone.
    enabled = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled else like.dtype


def without_autocast(like: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Context in which products with this tensor are computed in the dtypes of what is multiplied."""
    if like.device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(like.device.type, enabled=False)
