"""What a node's system gives to processes: /dev/shm, a clock, open files and locked memory."""

from __future__ import annotations

import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

from distill.doctor.context import Context
from distill.doctor.findings import Facts, Finding, Findings, Nodes, warning
from distill.doctor.storage import PREFIX
from distill.run.formatting import format_bytes

SHM = Path("/dev/shm")
SHM_PER_RANK = 64e6  # bytes; loader workers, NCCL and gloo share tensors through it
SHM_FULL = 1e6
LEFTOVERS = "deepspeed_allreduce_buffer_*"
MAX_SKEW = 10.0  # seconds
MIN_FILES = 1024
MIN_LOCKED = 64 * 2**20  # bytes; InfiniBand and pinned buffers
GPUS = "nvidia[0-9]*"


def collect_shm(context: Context) -> Facts:
    space = os.statvfs(SHM)
    leftovers = sum(path.stat().st_size for path in SHM.glob(LEFTOVERS))
    return {"free": space.f_bavail * space.f_frsize, "leftovers": leftovers, "ranks": context.ranks_per_node}


def diagnose_shm(context: Context, nodes: Nodes) -> Findings:
    for node, facts in nodes.items():
        fix = f"ssh {node} du -ah {SHM}, and delete what ended processes left; or mount -o remount,size=4G {SHM}"
        if facts["leftovers"]:
            fix = f"ssh {node} rm '{SHM}/{LEFTOVERS}' ({format_bytes(facts['leftovers'])}), where nothing else runs"
        if facts["free"] < SHM_FULL:
            yield Finding(node, f"{SHM} is full", fix)
        elif facts["free"] < SHM_PER_RANK * facts["ranks"]:
            limit = f"less than {format_bytes(SHM_PER_RANK)} for each of {facts['ranks']} ranks"
            yield warning(node, f"{SHM} has {format_bytes(facts['free'])} free, {limit}", fix)


def summarise_shm(facts: Facts) -> str:
    return f"{format_bytes(facts['free'])} free"


def collect_clock(context: Context) -> Facts:
    """`ahead`: seconds of this clock before that of the run directory's file system; None where no file can be written."""
    folder = context.config.run_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=PREFIX) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
            return {"ahead": time.time() - Path(file.name).stat().st_mtime}
    except OSError:
        return {"ahead": None}


def diagnose_clocks(context: Context, nodes: Nodes) -> Findings:
    known = {node: facts["ahead"] for node, facts in nodes.items() if facts["ahead"] is not None}
    usual = statistics.median_low(known.values()) if len(known) > 2 else next(iter(known.values()), 0.0)
    for node, ahead in known.items():
        if (skew := abs(ahead - usual)) > MAX_SKEW:
            what = (
                f"its clock is {skew:,.0f} s {'ahead of' if ahead > usual else 'behind'} the others: times in logs will not fit"
            )
            yield warning(node, what, f"ssh {node} chronyc makestep")


def summarise_clock(facts: Facts) -> str:
    return "unknown" if facts["ahead"] is None else f"{facts['ahead']:+.2f} s"


def collect_limits(context: Context) -> Facts:
    return {
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "has_gpus": any(Path("/dev").glob(GPUS)),
    }


def diagnose_limits(context: Context, nodes: Nodes) -> Findings:
    for node, facts in nodes.items():
        if 0 <= facts["files"] < MIN_FILES:
            fix = "ulimit -n 65536 before it is started; under Slurm, LimitNOFILE of slurmd, or nofile in limits.conf"
            yield warning(node, f"a process may open {facts['files']} files", fix)
        if facts["has_gpus"] and 0 <= facts["locked"] < MIN_LOCKED:
            fix = "ulimit -l unlimited before it is started; under Slurm, LimitMEMLOCK=infinity of slurmd"
            what = f"a process may lock {format_bytes(facts['locked'])} of memory, too little for pinned buffers"
            yield warning(node, what, fix)


def summarise_limits(facts: Facts) -> str:
    return f"{facts['files']} files" if facts["files"] >= 0 else "any number of files"
