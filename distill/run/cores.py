"""The processor cores that this process was given, which may be fewer than the machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OF_THIS_PROCESS = Path("/proc/self/cgroup")


def num_cores() -> int:
    """The cores that this process may run on, and no more than the quota of its cgroup and of those around it."""
    return max(1, min([len(os.sched_getaffinity(0)), *_quotas()]))


def _quotas() -> Iterator[int]:
    """The quota of each cgroup that has one, in whole cores, rounded up."""
    try:
        groups = [line.split(":", 2) for line in OF_THIS_PROCESS.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = CGROUPS / controllers
        group = mount / path.lstrip("/")
        for folder in [group, *(parent for parent in group.parents if parent.is_relative_to(mount))]:
            # version 2 has one file, version 1 two
            words = _words(folder / "cpu.max") or [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
            if len(words) == 2 and words[0].isdecimal():
                yield math.ceil(int(words[0]) / int(words[1]))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []
