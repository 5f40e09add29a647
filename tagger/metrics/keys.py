"""Logits rounded to 16 bits, as integers in the same order: the one place where evaluation rounds.

A key is a logit's float16 as a signed integer: its magnitude's bits with its sign. So keys order as logits do, -0 is
+0, and a count per (tag, key) says everything about ranking. Logits beyond float16's finite range are taken as its
largest number, infinite ones too. Refuses NaN, which has no rank.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tagger.errors import DivergedError

# Counts are kept in tables of NUM_KEYS cells, a key's cell being `key + KEY_OFFSET`.
NUM_KEYS = 1 << 16
KEY_OFFSET = 1 << 15
MAX_KEY = 0x7BFF
MAX_LOGIT = 65504.0

Keys = npt.NDArray[np.int16]


def to_keys(logits: Tensor) -> Tensor:
    """int16 keys (-31743..31743) of floating logits of any shape, on their device; raises DivergedError for NaN.

    float64 goes by way of float32. Reading whether there was a NaN waits for the device.
    """
    refuse_nan(logits)
    return to_keys_unchecked(logits)


def to_keys_unchecked(logits: Tensor) -> Tensor:
    """As `to_keys`, without a wait for the device; a NaN becomes a key at an end of the range."""
    bits = logits.detach().to(torch.float16, copy=True, memory_format=torch.contiguous_format).view(torch.int16)
    sign = bits >> 15
    bits &= 0x7FFF
    bits.clamp_(max=MAX_KEY)
    bits ^= sign
    bits -= sign
    return bits


def refuse_nan(logits: Tensor) -> None:
    """Raise DivergedError where logits [..., C] hold NaN, naming the first."""
    if logits.numel() and bool(torch.isnan(logits.amax())):
        first = torch.isnan(logits).nonzero()[0].tolist()
        where = f"row {first[0]}, tag {first[1]}" if len(first) == 2 else f"position {first}"
        raise DivergedError(f"logits hold NaN, first at {where}; the model has diverged")


def from_keys(keys: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The logits that keys stand for, float32 of the same shape; exact."""
    signed = np.asarray(keys, dtype=np.int32)
    bits = (np.abs(signed) | np.where(signed < 0, 0x8000, 0)).astype(np.uint16)
    return bits.view(np.float16).astype(np.float32)


def round_logits(logits: Tensor) -> Tensor:
    """Logits as evaluation sees them: float32 on the CPU, rounded to 16 bits; raises DivergedError for NaN."""
    return torch.from_numpy(from_keys(to_keys(logits).cpu().numpy()))


_LOGITS = from_keys(np.arange(-MAX_KEY, MAX_KEY + 1)).astype(np.float64)


def lowest_keys(logits: npt.ArrayLike) -> npt.NDArray[np.int16]:
    """The lowest key whose logit is at or above each of `logits` (float64); MAX_KEY + 1, no key, where none is."""
    wanted = np.asarray(logits, dtype=np.float64)
    if np.isnan(wanted).any():
        raise ValueError("a threshold is NaN; expected logits")
    return (np.searchsorted(_LOGITS, wanted, side="left") - MAX_KEY).astype(np.int16)


def logit_of(probability: float) -> float:
    """The logit of a threshold that is given as a probability, 0..1: -inf for 0 and inf for 1."""
    if probability in (0, 1):
        return math.inf if probability else -math.inf
    return math.log(probability) - math.log1p(-probability)


def probability_of(logit: float) -> float:
    """The probability, 0..1, of a threshold that is given as a logit."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))
