"""/dev/shm: loader workers, NCCL and gloo hand tensors over through it."""

from __future__ import annotations

import os
from pathlib import Path

from distill.doctor.findings import Facts, Finding, Findings, Nodes, size, warning
from distill.doctor.start import Start

SHM = Path("/dev/shm")
ENOUGH = 64e6  # bytes a rank
FULL = 1e6
LEFTOVERS = "deepspeed_allreduce_buffer_*"


def look(start: Start) -> Facts:
    space = os.statvfs(SHM)
    left = sum(path.stat().st_size for path in SHM.glob(LEFTOVERS))
    return {"free": space.f_bavail * space.f_frsize, "left": left, "ranks": start.ranks_per_node}


def judge(start: Start, nodes: Nodes) -> Findings:
    for node, facts in nodes.items():
        needed = ENOUGH * facts["ranks"]
        fix = f"ssh {node} du -ah {SHM}, and delete what ended processes left; or mount -o remount,size=4G {SHM}"
        if facts["left"]:
            fix = f"ssh {node} rm '{SHM}/{LEFTOVERS}' ({size(facts['left'])}), where nothing else runs"
        if facts["free"] < FULL:
            yield Finding(node, f"{SHM} is full", fix)
        elif facts["free"] < needed:
            yield warning(
                node, f"{SHM} has {size(facts['free'])} free, less than 64 MB for each of {facts['ranks']} ranks", fix
            )


def note(facts: Facts) -> str:
    return f"{size(facts['free'])} free"
