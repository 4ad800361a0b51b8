"""GPUs or processors: alike on all nodes, and enough for their ranks."""

from __future__ import annotations

import os
import re
from pathlib import Path

from distill.config import RunConfig
from distill.doctor.context import Context
from distill.doctor.findings import Facts, Finding, Findings, Nodes, outliers, warning

DRIVER = Path("/proc/driver/nvidia/version")


def collect(context: Context) -> Facts:
    import torch

    from distill.run.precision import autocast_dtype

    on_gpu = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())] if on_gpu else []
    driver = re.search(r"Kernel Module\D*([\d.]+)", DRIVER.read_text()) if DRIVER.exists() else None
    return {
        "gpus": [[gpu.name, round(gpu.total_memory / 2**30)] for gpu in gpus],
        "driver": driver and driver[1],
        "cuda": torch.version.cuda,
        "bf16": autocast_dtype("auto", torch.device("cuda" if on_gpu else "cpu")) is not None,
        "cores": os.cpu_count() or 1,
        "ranks": context.ranks_per_node,
        "threads": context.threads,
    }


def diagnose(context: Context, nodes: Nodes) -> Findings:
    for node, here, usual, where in outliers({node: facts["gpus"] for node, facts in nodes.items()}):
        fix = f"ask for nodes of one kind (sbatch --constraint or --gpus-per-node), or leave it out: sbatch --exclude {node}"
        yield Finding(node, f"{_gpus(here)} here, {_gpus(usual)} on {where}", fix)
    for key, name in (("driver", "the GPU driver"), ("cuda", "torch's CUDA")):
        for node, here, usual, where in outliers({node: facts[key] for node, facts in nodes.items()}):
            yield Finding(node, f"{name} is {here} here, {usual} on {where}", f"install {usual}, or: sbatch --exclude {node}")
    yield from _diagnose_precision(context.config, nodes)
    for node, facts in nodes.items():
        if facts["gpus"] and facts["ranks"] > len(facts["gpus"]):
            fix = f"one rank per GPU: sbatch --ntasks-per-node {len(facts['gpus'])}, or --gpus-per-node {facts['ranks']}"
            yield Finding(node, f"{facts['ranks']} ranks for {_gpus(facts['gpus'])}", fix)
        elif facts["driver"] and not facts["gpus"]:
            fix = "a torch built for CUDA, and CUDA_VISIBLE_DEVICES that names the GPUs; else training runs on the processor"
            yield warning(node, f"a GPU driver ({facts['driver']}) is there, but torch sees no GPU", fix)
        yield from _diagnose_threads(context, node, facts)


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


def _diagnose_threads(context: Context, node: str, facts: Facts) -> Findings:
    ranks, threads, cores = facts["ranks"], facts["threads"], facts["cores"]
    fix = f"export OMP_NUM_THREADS={max(1, cores // ranks)}"
    if threads is None and context.world_size > 1 and ranks > 1:
        yield warning(node, f"OMP_NUM_THREADS is not set: each of {ranks} ranks takes all {cores} cores", fix)
    elif threads is not None and ranks * threads > cores:
        yield warning(node, f"{ranks} ranks x {threads} threads (OMP_NUM_THREADS) on {cores} cores", fix)


def _gpus(gpus: list[list[object]]) -> str:
    kinds = sorted({f"{name} {memory} GiB" for name, memory in gpus})
    return f"{len(gpus)} x {', '.join(kinds)}" if gpus else "no GPU"


def summarise(facts: Facts) -> str:
    precision = "bf16" if facts["bf16"] else "no bf16"
    return f"{_gpus(facts['gpus'])}, {precision}" if facts["gpus"] else f"{facts['cores']} cores, {precision}"
