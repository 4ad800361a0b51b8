"""What a node gives to its ranks: GPUs or processors, /dev/shm, a clock, open files and locked memory."""

from __future__ import annotations

import os
import re
import resource
import shutil
import statistics
import time
from pathlib import Path

import torch

from distill.config import RunConfig
from distill.doctor.check import Context, Facts, Finding, Findings, Nodes, outliers, warning
from distill.doctor.storage import temporary_file
from distill.run.formatting import format_bytes
from distill.run.precision import autocast_dtype

DRIVER = Path("/proc/driver/nvidia/version")
SHM = Path("/dev/shm")
SHM_PER_RANK = 64e6  # bytes; loader workers, NCCL and gloo share tensors through it
SHM_FULL = 1e6
LEFTOVERS = "deepspeed_allreduce_buffer_*"
MAX_SKEW = 10.0  # seconds
MIN_FILES = 1024
MIN_LOCKED = 64 * 2**20  # bytes; InfiniBand and pinned buffers


def collect_devices(context: Context) -> Facts:
    on_gpu = torch.cuda.is_available()
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count() if on_gpu else 0))
    gpus = [[device.name, round(device.total_memory / 2**30)] for device in devices]
    bf16 = autocast_dtype("auto", torch.device("cuda" if on_gpu else "cpu")) is not None
    driver = re.search(r"Kernel Module\D*([\d.]+)", DRIVER.read_text(encoding="utf-8")) if DRIVER.exists() else None
    return {
        "gpus": gpus,
        "driver": driver and driver[1],
        "cuda": torch.version.cuda,
        "bf16": bf16,
        "cores": context.cores,
        "ranks": context.ranks_per_node,
        "threads": context.threads,
        "summary": f"{_gpus(gpus) if gpus else f'{context.cores} cores'}, {'bf16' if bf16 else 'no bf16'}",
    }


def diagnose_devices(context: Context, nodes: Nodes) -> Findings:
    for node, here, usual, where in outliers(nodes, "gpus"):
        fix = f"ask for nodes of one kind (sbatch --constraint or --gpus-per-node), or leave it out: sbatch --exclude {node}"
        yield Finding(node, f"{_gpus(here)} here, {_gpus(usual)} on {where}", fix)
    for key, name in (("driver", "the GPU driver"), ("cuda", "torch's CUDA")):
        for node, here, usual, where in outliers(nodes, key):
            yield Finding(node, f"{name} is {here} here, {usual} on {where}", f"install {usual}, or: sbatch --exclude {node}")
    yield from _diagnose_precision(context.config, nodes)
    for node, facts in nodes.items():
        ranks, threads, cores = facts["ranks"], facts["threads"], facts["cores"]
        if facts["gpus"] and ranks > len(facts["gpus"]):
            fix = f"one rank per GPU: sbatch --ntasks-per-node {len(facts['gpus'])}, or --gpus-per-node {ranks}"
            yield Finding(node, f"{ranks} ranks for {_gpus(facts['gpus'])}", fix)
        elif facts["driver"] and not facts["gpus"]:
            fix = "a torch built for CUDA, and CUDA_VISIBLE_DEVICES that names the GPUs; else training runs on the processor"
            yield warning(node, f"a GPU driver ({facts['driver']}) is there, but torch sees no GPU", fix)
        fix = f"export OMP_NUM_THREADS={max(1, cores // ranks)}"
        if threads is None and context.world_size > 1 and ranks > 1:
            yield warning(node, f"OMP_NUM_THREADS is not set: each of {ranks} ranks takes all {cores} cores", fix)
        elif threads is not None and ranks * threads > cores:
            yield warning(node, f"{ranks} ranks x {threads} threads (OMP_NUM_THREADS) on {cores} cores", fix)


def _diagnose_precision(config: RunConfig, nodes: Nodes) -> Findings:
    precisions = {"engine.precision": config.engine.precision}
    if "precompute" in config.stages:
        precisions["teacher.precision"] = config.teacher.precision
    automatic = [key for key, precision in precisions.items() if precision == "auto"]
    fixed = [key for key, precision in precisions.items() if precision == "bf16"]
    with_bf16 = [node for node, facts in nodes.items() if facts["bf16"]]
    for node in (node for node in nodes if node not in with_bf16):
        if automatic and with_bf16:
            what = f"no bf16 here, but on {with_bf16[0]}: `auto` would compute in two precisions"
            yield Finding(node, what, " ".join(f"{key}=fp32" for key in automatic))
        if fixed:
            what = f"no bf16 here, but the config has {' and '.join(f'{key}=bf16' for key in fixed)}"
            yield Finding(node, what, " ".join(f"{key}=fp32" for key in fixed))


def _gpus(gpus: list[list[object]]) -> str:
    kinds = sorted({f"{name} {memory} GiB" for name, memory in gpus})
    return f"{len(gpus)} x {', '.join(kinds)}" if gpus else "no GPU"


def collect_shm(context: Context) -> Facts:
    free, leftovers = shutil.disk_usage(SHM).free, sum(path.stat().st_size for path in SHM.glob(LEFTOVERS))
    return {"free": free, "leftovers": leftovers, "ranks": context.ranks_per_node, "summary": f"{format_bytes(free)} free"}


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


def collect_clock(context: Context) -> Facts:
    """`ahead`: seconds of this clock before that of the run directory's file system; None where no file can be written."""
    try:
        context.config.run_dir.mkdir(parents=True, exist_ok=True)
        with temporary_file(context) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
            ahead = time.time() - Path(file.name).stat().st_mtime
            return {"ahead": ahead, "summary": f"{ahead:+.2f} s"}
    except OSError:
        return {"ahead": None, "summary": "unknown"}


def diagnose_clocks(context: Context, nodes: Nodes) -> Findings:
    known = {node: facts["ahead"] for node, facts in nodes.items() if facts["ahead"] is not None}
    usual = statistics.median_low(known.values()) if len(known) > 2 else next(iter(known.values()), 0.0)
    for node, ahead in known.items():
        if (skew := abs(ahead - usual)) > MAX_SKEW:
            direction = "ahead of" if ahead > usual else "behind"
            what = f"its clock is {skew:,.0f} s {direction} the others: times in logs will not fit"
            yield warning(node, what, f"ssh {node} chronyc makestep")


def collect_limits(context: Context) -> Facts:
    files, locked = (resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    summary = f"{files} files" if files >= 0 else "any number of files"
    return {"files": files, "locked": locked, "has_gpus": torch.cuda.is_available(), "summary": summary}


def diagnose_limits(context: Context, nodes: Nodes) -> Findings:
    for node, facts in nodes.items():
        if 0 <= facts["files"] < MIN_FILES:
            fix = "ulimit -n 65536 before it is started; under Slurm, LimitNOFILE of slurmd, or nofile in limits.conf"
            yield warning(node, f"a process may open {facts['files']} files", fix)
        if facts["has_gpus"] and 0 <= facts["locked"] < MIN_LOCKED:
            fix = "ulimit -l unlimited before it is started; under Slurm, LimitMEMLOCK=infinity of slurmd"
            what = f"a process may lock {format_bytes(facts['locked'])} of memory, too little for pinned buffers"
            yield warning(node, what, fix)
