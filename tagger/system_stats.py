"""Figures of the machine beside a run: processor, memory, disk and, where there is one, the GPU.

1 GB is 10^9 bytes. Reading never synchronises the device and never raises: a figure that cannot be had is left out.
"""

import contextlib
from pathlib import Path

import psutil
import torch

GB = 1e9


class SystemStats:
    """Reads the figures; `folder` names the disk that is watched."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = psutil.Process()
        psutil.cpu_percent(interval=None)  # the first call only starts the interval that the next one measures

    def read(self) -> dict[str, float]:
        """Figures by name: CPU over all cores since the last reading, memory of this process, and what is free."""
        figures: dict[str, float] = {}
        with contextlib.suppress(OSError, psutil.Error):
            figures["system/cpu_percent"] = psutil.cpu_percent(interval=None)
            figures["system/ram_gb"] = self._process.memory_info().rss / GB
            figures["system/ram_free_gb"] = psutil.virtual_memory().available / GB
            figures["system/disk_free_gb"] = psutil.disk_usage(str(self._folder)).free / GB
        if torch.cuda.is_available():
            figures["system/gpu_memory_gb"] = torch.cuda.max_memory_allocated() / GB
            figures["system/gpu_reserved_gb"] = torch.cuda.memory_reserved() / GB
        return figures
