"""GPUs, or the processor's abilities: alike on all nodes, and enough for their ranks."""

from __future__ import annotations

import os
import re
from pathlib import Path

from distill.config import RunConfig
from distill.doctor.findings import Facts, Finding, Findings, Nodes, odd_ones, warning
from distill.doctor.start import Start

DRIVER = Path("/proc/driver/nvidia/version")


def look(start: Start) -> Facts:
    import torch

    from distill.precision import autocast_dtype

    on_gpu = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())] if on_gpu else []
    return {
        "gpus": [[gpu.name, round(gpu.total_memory / 2**30)] for gpu in gpus],
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "bf16": autocast_dtype("auto", torch.device("cuda" if on_gpu else "cpu")) is not None,
        "cores": os.cpu_count() or 1,
        "ranks": start.ranks_per_node,
        "threads": start.threads,
    }


def _driver() -> str | None:
    found = re.search(r"Kernel Module\D*([\d.]+)", DRIVER.read_text()) if DRIVER.exists() else None
    return found and found[1]


def judge(start: Start, nodes: Nodes) -> Findings:
    for node, own, usual, where in odd_ones({node: facts["gpus"] for node, facts in nodes.items()}):
        fix = f"ask for nodes of one kind (sbatch --constraint or --gpus-per-node), or leave it out: sbatch --exclude {node}"
        yield Finding(node, f"{_gpus(own)} here, {_gpus(usual)} on {where}", fix)
    for key, name in (("driver", "the GPU driver"), ("cuda", "torch's CUDA")):
        for node, own, usual, where in odd_ones({node: facts[key] for node, facts in nodes.items()}):
            yield Finding(node, f"{name} is {own} here, {usual} on {where}", f"install {usual}, or: sbatch --exclude {node}")
    yield from _judge_precision(start.config, nodes)
    for node, facts in nodes.items():
        if facts["gpus"] and facts["ranks"] > len(facts["gpus"]):
            fix = f"one rank a GPU: sbatch --ntasks-per-node {len(facts['gpus'])}, or --gpus-per-node {facts['ranks']}"
            yield Finding(node, f"{facts['ranks']} ranks for {_gpus(facts['gpus'])}", fix)
        elif facts["driver"] and not facts["gpus"]:
            fix = "a torch built for CUDA, and CUDA_VISIBLE_DEVICES that names the GPUs; else training runs on the processor"
            yield warning(node, f"a GPU driver ({facts['driver']}) is there, but torch sees no GPU", fix)
        yield from _judge_cores(start, node, facts)


def _judge_precision(config: RunConfig, nodes: Nodes) -> Findings:
    wanted = {"engine.precision": config.engine.precision}
    if "precompute" in config.stages:
        wanted["teacher.precision"] = config.teacher.precision
    automatic = [key for key, precision in wanted.items() if precision == "auto"]
    fixed = [key for key, precision in wanted.items() if precision == "bf16"]
    having = [node for node, facts in nodes.items() if facts["bf16"]]
    for node, facts in nodes.items():
        if facts["bf16"]:
            continue
        if automatic and having:
            what = f"no bf16 here, but on {having[0]}: `auto` would compute in two precisions"
            yield Finding(node, what, " ".join(f"{key}=fp32" for key in automatic))
        if fixed:
            what = f"no bf16 here, and {' and '.join(fixed)} asks for it"
            yield Finding(node, what, " ".join(f"{key}=fp32" for key in fixed))


def _judge_cores(start: Start, node: str, facts: Facts) -> Findings:
    ranks, threads, cores = facts["ranks"], facts["threads"], facts["cores"]
    if threads is None and start.world_size > 1 and ranks > 1:
        what = f"OMP_NUM_THREADS is not set: each of {ranks} ranks takes all {cores} cores"
        yield warning(node, what, f"export OMP_NUM_THREADS={max(1, cores // ranks)}")
    elif threads is not None and ranks * threads > cores:
        what = f"{ranks} ranks x {threads} threads (OMP_NUM_THREADS) on {cores} cores"
        yield warning(node, what, f"export OMP_NUM_THREADS={max(1, cores // ranks)}")


def _gpus(gpus: list[list[object]]) -> str:
    if not gpus:
        return "no GPU"
    kinds = {f"{name} {memory} GiB" for name, memory in gpus}
    return f"{len(gpus)} x {', '.join(sorted(kinds))}"


def note(facts: Facts) -> str:
    precision = "bf16" if facts["bf16"] else "no bf16"
    return f"{_gpus(facts['gpus'])}, {precision}" if facts["gpus"] else f"{facts['cores']} cores, {precision}"
