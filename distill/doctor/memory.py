"""The memory that this process may use of its machine's: the limits of its control groups and of its Slurm job."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

CGROUP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
MIB = 2**20


def memory_limit() -> int:
    """Bytes that the processes of this node share: the machine's, or a lower limit."""
    return min([psutil.virtual_memory().total, *_cgroup_limits(), *_slurm_limits(os.environ)])


def _cgroup_limits() -> Iterator[int]:
    """The limits of the groups that this process is in and of those around them; none where there are no control groups."""
    try:
        lines = CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2 has no names of controllers
            root, file = (CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (CGROUPS, "memory.max")
            inner = root / path.lstrip("/")
            for folder in (inner, *inner.parents):
                if not folder.is_relative_to(root):
                    break
                try:
                    found = (folder / file).read_text(encoding="utf-8").strip()
                except OSError:  # in a container, the path is not below its own root
                    continue
                if found.isdigit():  # not "max"
                    yield int(found)


def _slurm_limits(environment: Mapping[str, str]) -> Iterator[int]:
    """What the job asked for on this node, in MiB in its environment; 0 is all."""
    per_node, per_cpu = environment.get("SLURM_MEM_PER_NODE", ""), environment.get("SLURM_MEM_PER_CPU", "")
    cpus = environment.get("SLURM_CPUS_ON_NODE", "")
    if per_node.isdigit() and int(per_node):
        yield int(per_node) * MIB
    if per_cpu.isdigit() and int(per_cpu) and cpus.isdigit():
        yield int(per_cpu) * int(cpus) * MIB
