"""Energy drawn by the NVIDIA GPU of this process, as NVML reports it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress

import torch


class EnergyMeter:
    """The energy that this process's GPU has drawn since the meter was constructed. device: where this process computes."""

    def __init__(self, device: torch.device) -> None:
        self._counter = _gpu_counter(device) if device.type == "cuda" else None
        self._start = self._counter() if self._counter else 0.0

    def joules(self) -> float | None:
        """Joules since the construction; None without an NVIDIA GPU, without NVML, and once the GPU is lost."""
        if self._counter is not None:
            with suppress(Exception):  # pynvml has an exception class for each error
                return round(self._counter() - self._start, 1)
        return None


def _gpu_counter(device: torch.device) -> Callable[[], float] | None:
    """Reads the joules of a GPU since its driver was loaded; None without NVML, or for a GPU that has no such counter."""
    with suppress(Exception):
        nvml = importlib.import_module("pynvml")  # of nvidia-ml-py
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode())
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    return None
