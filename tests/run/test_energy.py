import sys
from types import SimpleNamespace

import pytest
import torch

from distill.run.energy import EnergyMeter

GPU = torch.device("cuda", 0)


@pytest.fixture
def counters(monkeypatch):
    """The millijoules of two GPUs by UUID, as a library with NVML's functions reads them; torch sees only the second GPU."""
    found = {b"GPU-abc": 5_000, b"GPU-def": 70_000}
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: found[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="def"))
    return found


def test_energy_is_that_of_this_process_gpu_since_the_start(counters):
    energy = EnergyMeter(GPU)
    counters[b"GPU-abc"] += 9_000
    counters[b"GPU-def"] += 2_500
    assert energy.joules() == 2.5


def test_a_gpu_that_is_lost_has_no_energy(counters):
    energy = EnergyMeter(GPU)
    counters.clear()
    assert energy.joules() is None


def test_no_energy_without_nvml_or_without_a_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyMeter(GPU).joules() is None
    assert EnergyMeter(torch.device("cpu")).joules() is None
