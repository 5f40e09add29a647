"""Compiling a model where that can work and pays, and saying why where it does not."""

import importlib.util
import logging
import os
import shutil
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

logger = logging.getLogger(__name__)

CompileMode = Literal["auto", "on", "off"]
# Blocks alike share what is compiled, anew for each batch shape (up to 21 with aspect buckets, each with a smaller last
# batch in evaluation) and for training and evaluation; past torch's limit of 8 a block compiled with fullgraph=True
# fails.
_VARIANTS_PER_BLOCK = 128


def compile_blocks(model: nn.Module, blocks: Iterable[nn.Module], mode: CompileMode, device: torch.device) -> bool:
    """Compile each block (or, where there is none, the whole model) in place; returns whether that was done.

    "auto" compiles on CUDA with Triton only: elsewhere compiling takes longer than a short run gains. "on" compiles
    wherever a trial compilation works, and otherwise logs one warning that says what is missing. Names of the state
    dict stay as they are.
    """
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return False
    missing = missing_compiler(device) or _trial_failure(device)
    if missing is not None:
        level = logging.WARNING if mode == "on" else logging.INFO
        logger.log(level, "training.compile=%s: not compiled, %s; training runs uncompiled", mode, missing)
        return False
    parts = list(blocks)
    limit = _VARIANTS_PER_BLOCK * max(1, len(parts))
    import torch._dynamo.config as config  # takes seconds, which runs that do not compile should not pay

    config.recompile_limit = max(config.recompile_limit, limit)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, limit)
    for part in parts:
        part.compile(fullgraph=True, dynamic=False)
    if not parts:
        model.compile(dynamic=False)
    return True


def missing_compiler(device: torch.device) -> str | None:
    """What a compilation for this device would lack; None where nothing is known to be missing."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is missing (install it, or use training.compile=off)"
        return None
    if device.type != "cpu":
        return f"torch.compile is not reliable on {device.type} (use training.compile=off)"
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++", "cl"]
    if not any(shutil.which(name) for name in names):
        return f"no C++ compiler is found (looked for {', '.join(names)}; install one, or use training.compile=off)"
    return None


def _trial_failure(device: torch.device) -> str | None:
    """Compile and run one small function: headers, libraries and drivers fail here and not in the first step."""
    try:
        torch.compile(_trial, dynamic=False)(torch.ones(64, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"a trial compilation failed ({lines[0] if lines else type(error).__name__})"
    return None


def _trial(values: torch.Tensor) -> torch.Tensor:
    return values.sin() * values + 1.0
