"""Counters as Linux lays them out, in folders of the test's own; a GPU's through a library of the driver's names."""

import sys
from types import SimpleNamespace

import pytest
import torch

from distill.energy import Energy

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Two packages with a part of one, and a processor that this process keeps busy half of the time."""
    clock = SimpleNamespace(own=10.0)
    monkeypatch.setattr("time.process_time", lambda: clock.own)

    def write(first, second, busy_ticks):
        for zone, microjoules in (("intel-rapl:0", first), ("intel-rapl:1", second), ("intel-rapl:0:0", 7 * first)):
            (tmp_path / zone).mkdir(exist_ok=True)
            (tmp_path / zone / "energy_uj").write_text(f"{microjoules}\n")
            (tmp_path / zone / "name").write_text("core\n" if zone.count(":") == 2 else f"package-{zone[-1]}\n")
            (tmp_path / zone / "max_energy_range_uj").write_text("1000000000\n")
        (tmp_path / "stat").write_text(f"cpu  {busy_ticks} 0 0 900 50 0 0 0 0 0\ncpu0 1 1 1 1\n")

    (tmp_path / "intel-rapl:2").mkdir()  # the whole platform, packages and all
    (tmp_path / "intel-rapl:2/name").write_text("psys\n")
    (tmp_path / "intel-rapl:2/energy_uj").write_text("5\n")
    write(0, 990_000_000, 1000)
    return SimpleNamespace(clock=clock, write=write, energy=Energy(CPU, rapl=tmp_path, stat=tmp_path / "stat"))


def test_a_process_is_given_its_share_of_both_packages_and_counters_may_go_round(machine):
    machine.write(100_000_000, 10_000_000, 1000 + 400)  # 100 J, and 20 J through the range's end, in four busy seconds
    machine.clock.own += 2.0
    assert machine.energy.joules() == {"cpu": 60.0}
    machine.write(140_000_000, 10_000_000, 1000 + 800)
    machine.clock.own += 2.0
    assert machine.energy.joules() == {"cpu": 80.0}


def test_shares_of_processes_side_by_side_are_no_more_than_the_whole(machine):
    machine.write(100_000_000, 990_000_000, 1000 + 100)
    machine.clock.own += 50.0  # finer clocks than the kernel's ticks
    assert machine.energy.joules() == {"cpu": 100.0}


def test_what_a_machine_does_not_tell_is_not_made_up(tmp_path):
    assert Energy(CPU, rapl=tmp_path / "none", stat=tmp_path / "none").joules() == {}
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0/name").write_text("package-0")
    (tmp_path / "intel-rapl:0/energy_uj").write_text("not a number")
    assert Energy(CPU, rapl=tmp_path).joules() == {}


def test_a_gpu_is_asked_by_its_own_name(monkeypatch, tmp_path):
    """NVML numbers all GPUs, torch those that it may see."""
    counters = {b"GPU-abc": 5_000, b"GPU-def": 70_000}
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: counters[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="def"))
    energy = Energy(torch.device("cuda", 0), rapl=tmp_path, stat=tmp_path)
    counters[b"GPU-def"] += 2_500
    assert energy.joules() == {"gpu": 2.5}
    counters.clear()  # the GPU has fallen off the bus
    assert energy.joules() == {}


def test_without_nvml_a_gpu_tells_nothing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Energy(torch.device("cuda", 0), rapl=tmp_path).joules() == {}
