"""Versions, the project's own code and the config: the same on all nodes. DeepSpeed: it imports, accepts its configuration,
and the model's states fit.

Neither a compiler nor a cache of extensions is checked: training uses torch's AdamW under every ZeRO stage, offloaded too.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from importlib.metadata import distributions
from pathlib import Path

import torch

import distill
from distill.doctor.check import Context, Facts, Finding, Findings, Nodes, outliers, shorten, warning
from distill.doctor.memory import memory_limit
from distill.doctor.needs import num_parameters
from distill.run.config import dump_config
from distill.run.files import sha256_of
from distill.run.formatting import format_bytes
from distill.training.deepspeed_config import read_deepspeed_config

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "numpy", "webdataset")


def collect(context: Context) -> Facts:
    root = Path(distill.__file__).parents[1]
    files = [path for folder in ("distill", "launcher") for path in sorted((root / folder).rglob("*.py"))]
    python = ".".join(platform.python_version_tuple()[:2])
    packages = {name: next((found.version for found in distributions(name=name)), None) for name in PACKAGES}
    return {
        "python": python,
        "packages": packages,
        "code": {str(path.relative_to(root)): sha256_of(path)[:12] for path in files},
        "config": hashlib.sha256(dump_config(context.config).encode()).hexdigest(),
        "executable": sys.executable,
        "root": str(root),
        "summary": f"Python {python}, torch {packages['torch']}",
    }


def diagnose(context: Context, nodes: Nodes) -> Findings:
    for node, here, usual, where in outliers(nodes, "python"):
        fix = f"start it on {node} with Python {usual} (here it is {nodes[node]['executable']})"
        yield Finding(node, f"Python is {here} here, {usual} on {where}", fix)
    for package in PACKAGES:
        for node, here, usual, where in outliers(nodes, "packages", package):
            fix = f"ssh {node} {nodes[node]['executable']} -m pip install {package}=={usual or here}"
            yield Finding(node, f"{package} is {here or 'missing'} here, {usual or 'missing'} on {where}", fix)
        for node in nodes if not any(facts["packages"][package] for facts in nodes.values()) else ():
            yield Finding(node, f"{package} is not installed", f"{nodes[node]['executable']} -m pip install {package}")
    for node, here, usual, where in outliers(nodes, "code"):
        changed = shorten(sorted(path for path in here.keys() | usual.keys() if here.get(path) != usual.get(path)))
        fix = f"the same commit on all nodes, best in a folder that all see (on {node} it is {nodes[node]['root']})"
        yield Finding(node, f"the code differs from that of {where}: {changed}", fix)
    for node, _, _, where in outliers(nodes, "config"):
        yield Finding(node, f"the config is not the same as on {where}", "keep it in a folder that all nodes see")


def collect_deepspeed(context: Context) -> Facts:
    facts: Facts = {"error": "", "settings_error": "", "needed": None, "summary": ""}
    try:
        import deepspeed
    except Exception as error:  # whatever its own imports raise
        return facts | {"error": f"{type(error).__name__}: {error}"}
    try:
        zero = read_deepspeed_config(context.config.engine.deepspeed).get("zero_optimization", {})
    except (OSError, ValueError) as error:
        return facts | {"settings_error": str(error)}
    stage, offloads = zero.get("stage", 0), (zero.get("offload_optimizer") or {}).get("device") == "cpu"
    facts |= _memory(context, stage, offloads)
    needed = "" if facts["needed"] is None else f", states {format_bytes(facts['needed'])}"
    return facts | {"summary": f"{deepspeed.__version__}, ZeRO {stage}{', offload' if offloads else ''}{needed}"}


def _memory(context: Context, stage: int, offloads: bool) -> Facts:
    """Bytes of parameters, gradients and Adam's moments, and of the memory for them: a GPU's, or the node's for its ranks."""
    parameters = num_parameters(context.config)
    if parameters is None:
        return {"needed": None}
    bytes_by_stage = {3: 4 * parameters, 2: 4 * parameters, 1: 8 * parameters}  # by the ZeRO stage that splits them over ranks
    ranks = context.world_size * context.ranks_per_node // context.local_world_size  # of the training
    needed = sum(num_bytes / (ranks if stage >= splits else 1) for splits, num_bytes in bytes_by_stage.items())
    if torch.cuda.is_available() and not offloads:
        return {"needed": needed, "memory": torch.cuda.get_device_properties(0).total_memory, "holder": "a GPU"}
    return {"needed": needed * context.ranks_per_node, "memory": memory_limit(), "holder": "the node"}


def diagnose_deepspeed(context: Context, nodes: Nodes) -> Findings:
    for node, facts in nodes.items():
        if facts["error"]:
            yield Finding(node, f"DeepSpeed does not import: {facts['error']}", f"ssh {node} python -c 'import deepspeed'")
        if facts["settings_error"]:
            yield Finding(node, facts["settings_error"], "engine.deepspeed=configs/deepspeed/zero1.json")
        if facts["needed"] is not None and facts["needed"] > facts["memory"]:
            needed, memory = format_bytes(facts["needed"]), format_bytes(facts["memory"])
            fix = "engine.deepspeed=configs/deepspeed/zero3.json (or more nodes) splits them further"
            yield warning(node, f"the model's states need {needed}, and {facts['holder']} has {memory}", fix)
