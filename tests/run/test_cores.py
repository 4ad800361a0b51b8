"""The cores of a process: those it is bound to, and no more than a quota of its cgroups."""

from __future__ import annotations

import os

import pytest

from distill.run import cores


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """A folder in place of /sys/fs/cgroup, on a machine whose 8 cores the process may all use."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(cores, "OF_THIS_PROCESS", tmp_path / "cgroup")
    return tmp_path


@pytest.mark.parametrize(
    "own, files, expected",
    [
        ("0::/", {}, 8),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "1600000 100000"}, 8),
        ("0::/job/step", {"job/step/cpu.max": "max 100000", "job/cpu.max": "300000 100000"}, 3),
        ("4:memory:/a\n3:cpu,x:/a", {"cpu,x/a/cpu.cfs_quota_us": "400000", "cpu,x/a/cpu.cfs_period_us": "100000"}, 4),
        ("3:cpu:/docker/abc", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("3:cpu:/docker/abc", {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 3),
    ],
)  # fmt: skip
def test_a_quota_limits_the_cores(cgroups, own, files, expected):
    (cgroups / "cgroup").write_text(own + "\n")
    for name, text in files.items():
        path = cgroups / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert cores.num_cores() == expected


def test_where_there_are_no_cgroups_the_cores_are_those_that_it_is_bound_to(cgroups):
    assert cores.num_cores() == 8
