"""What the system lets a process have: open files, locked memory."""

from __future__ import annotations

import resource
from pathlib import Path

from distill.doctor.findings import Facts, Findings, Nodes, size, warning
from distill.doctor.start import Start

ENOUGH_FILES = 1024
ENOUGH_LOCKED = 64 * 2**20  # bytes; InfiniBand and pinned buffers
GPUS = "nvidia[0-9]*"


def look(start: Start) -> Facts:
    return {
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "has_gpus": any(Path("/dev").glob(GPUS)),
    }


def judge(start: Start, nodes: Nodes) -> Findings:
    for node, facts in nodes.items():
        if 0 <= facts["files"] < ENOUGH_FILES:
            fix = "ulimit -n 65536 before it is started; under Slurm, LimitNOFILE of slurmd, or nofile in limits.conf"
            yield warning(node, f"a process may open {facts['files']} files", fix)
        if facts["has_gpus"] and 0 <= facts["locked"] < ENOUGH_LOCKED:
            fix = "ulimit -l unlimited before it is started; under Slurm, LimitMEMLOCK=infinity of slurmd"
            yield warning(node, f"a process may lock {size(facts['locked'])} of memory, too little for pinned buffers", fix)


def note(facts: Facts) -> str:
    return f"{facts['files']} files" if facts["files"] >= 0 else "any number of files"
