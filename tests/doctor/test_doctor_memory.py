"""The memory of a job is the lowest of the machine's and of its control groups' and Slurm's limits."""

from __future__ import annotations

import psutil
import pytest

from distill.doctor import memory

TOTAL = psutil.virtual_memory().total
SLURM = ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE")


@pytest.fixture(autouse=True)
def no_limits(tmp_path, monkeypatch):
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "fs")


def test_without_limits_it_is_the_machine_s():
    assert memory.memory_limit() == TOTAL


@pytest.mark.parametrize(
    "line, file", [("0::/job/step", "job/memory.max"), ("4:memory:/job/step", "memory/job/memory.limit_in_bytes")]
)
def test_a_control_group_around_the_process_limits_it(tmp_path, line, file):
    (tmp_path / "cgroup").write_text(f"1:cpu:/job\n{line}\n")
    path = tmp_path / "fs" / file
    (path.parent / "step").mkdir(parents=True)
    (path.parent / "step" / path.name).write_text("max\n")
    path.write_text("123456\n")
    assert memory.memory_limit() == 123456
    path.write_text(f"{2**63}\n")
    assert memory.memory_limit() == TOTAL


def test_slurm_s_memory_limits_it(monkeypatch):
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "2")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "3")
    assert memory.memory_limit() == 6 * 2**20
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "5")
    assert memory.memory_limit() == 5 * 2**20
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")
    assert memory.memory_limit() == 6 * 2**20
