"""Joules that this process has drawn, where the machine tells it: GPUs through NVML, processors through Linux's RAPL counters.

A GPU belongs to one process. A processor's packages are shared: of their joules, a process is given its share of the time in
which any core was busy. So the figures of processes side by side add up, and none counts for another.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")
STAT = Path("/proc/stat")
IDLE = slice(3, 5)  # idle and iowait, among the fields of /proc/stat


class Energy:
    """Counts from its making on. device: where this process computes. rapl, stat: where Linux keeps its counters."""

    def __init__(self, device: torch.device, *, rapl: Path = RAPL, stat: Path = STAT) -> None:
        self._stat = stat
        self._gpu = _gpu_counter(device) if device.type == "cuda" else None
        self._gpu_start = self._gpu() if self._gpu else 0.0
        read = {zone: _number(zone / "energy_uj") for zone in _packages(rapl)}
        self._packages = {zone: microjoules for zone, microjoules in read.items() if microjoules is not None}
        self._drawn = 0.0
        self._own_start, self._busy_start = time.process_time(), _busy_seconds(stat)

    def joules(self) -> dict[str, float]:
        """{"gpu": .., "cpu": ..} since the start; what the machine does not tell is not in it."""
        found = {}
        if self._gpu is not None:
            with suppress(Exception):  # a GPU that is lost by now; as below
                found["gpu"] = self._gpu() - self._gpu_start
        if self._packages:
            self._add_packages()
            busy = _busy_seconds(self._stat) - self._busy_start
            share = min(1.0, (time.process_time() - self._own_start) / busy) if busy > 0 else 0.0
            found["cpu"] = self._drawn * share
        return {name: round(value, 1) for name, value in found.items()}

    def _add_packages(self) -> None:
        """Counters begin again at their range; one that has gone round more than once is counted too low."""
        for zone, before in self._packages.items():
            now = _number(zone / "energy_uj")
            if now is None:
                continue
            gone_round = (_number(zone / "max_energy_range_uj") or 0) if now < before else 0
            self._drawn += (now - before + gone_round) / 1e6
            self._packages[zone] = now


def _packages(rapl: Path) -> list[Path]:
    """The zones that are whole packages, of any maker; others are parts of one, or of more than processors."""
    return sorted(zone for zone in rapl.glob("intel-rapl:*") if _read(zone / "name").startswith("package"))


def _number(path: Path) -> int | None:
    """The number in a file; None where it may not be read (of old, RAPL is root's alone), or is none."""
    try:
        return int(_read(path))
    except ValueError:
        return None


def _read(path: Path) -> str:
    """The text of a file; '' where it may not be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _busy_seconds(stat: Path) -> float:
    """Seconds that cores were busy since boot, of all cores together; 0 where Linux does not say."""
    try:
        ticks = [int(field) for field in stat.read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return 0.0
    return (sum(ticks) - sum(ticks[IDLE])) / 100  # USER_HZ


def _gpu_counter(device: torch.device) -> Callable[[], float] | None:
    """Reads the joules of a GPU since its driver was loaded; None without NVML, or for a GPU that has no such counter."""
    with suppress(Exception):  # pynvml has an exception of its own for each thing that can be amiss
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode())
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    return None
