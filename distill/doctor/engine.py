"""DeepSpeed: it imports, its configuration is usable, and the model's states fit.

Neither a compiler nor a cache of extensions is checked: training uses torch's AdamW under every ZeRO stage, offloaded too.
"""

from __future__ import annotations

import json

import psutil

from distill.doctor.context import Context
from distill.doctor.findings import Facts, Finding, Findings, Nodes, warning
from distill.doctor.needs import num_parameters
from distill.run.formatting import format_bytes
from distill.training.deepspeed_config import find_deepspeed_config


def collect(context: Context) -> Facts:
    facts: Facts = {"error": "", "settings_error": "", "offloads": False, "refuses_adamw": False, "needed": None}
    try:
        import deepspeed
    except Exception as error:  # whatever its own imports raise
        return facts | {"error": f"{type(error).__name__}: {error}"}
    try:
        settings = json.loads(find_deepspeed_config(context.config.engine.deepspeed).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return facts | {"settings_error": str(error)}
    zero = settings.get("zero_optimization", {})
    stage, offloads = zero.get("stage", 0), zero.get("offload_optimizer", {}).get("device") == "cpu"
    refuses = offloads and settings.get("zero_force_ds_cpu_optimizer", True)
    facts |= {"version": deepspeed.__version__, "stage": stage, "offloads": offloads, "refuses_adamw": refuses}
    return facts | _memory(context, stage, offloads)


def _memory(context: Context, stage: int, offloads: bool) -> Facts:
    """Bytes of parameters, gradients and Adam's moments, and of the memory for them: a GPU's, or the node's for its ranks."""
    import torch

    parameters = num_parameters(context.config)
    if parameters is None:
        return {"needed": None}
    bytes_by_stage = {3: 4 * parameters, 2: 4 * parameters, 1: 8 * parameters}  # by the ZeRO stage that splits them over ranks
    ranks = context.world_size * context.ranks_per_node // context.local_world_size  # of the training
    needed = sum(num_bytes / (ranks if stage >= splits else 1) for splits, num_bytes in bytes_by_stage.items())
    if torch.cuda.is_available() and not offloads:
        return {"needed": needed, "memory": torch.cuda.get_device_properties(0).total_memory, "holder": "a GPU"}
    return {"needed": needed * context.ranks_per_node, "memory": psutil.virtual_memory().total, "holder": "the node"}


def diagnose(context: Context, nodes: Nodes) -> Findings:
    for node, facts in nodes.items():
        if facts["error"]:
            yield Finding(node, f"DeepSpeed does not import: {facts['error']}", f"ssh {node} python -c 'import deepspeed'")
        if facts["settings_error"]:
            yield Finding(node, facts["settings_error"], "engine.deepspeed=configs/deepspeed/zero1.json")
        if facts["refuses_adamw"]:
            what = "engine.deepspeed offloads the optimiser, and DeepSpeed would refuse any but its own CPU Adam"
            yield Finding(node, what, f'put "zero_force_ds_cpu_optimizer": false into {context.config.engine.deepspeed}')
        if facts["needed"] is not None and facts["needed"] > facts["memory"]:
            needed, memory = format_bytes(facts["needed"]), format_bytes(facts["memory"])
            fix = "engine.deepspeed=configs/deepspeed/zero3.json (or more nodes) splits them further"
            yield warning(node, f"the model's states need {needed}, and {facts['holder']} has {memory}", fix)


def summarise(facts: Facts) -> str:
    offload = ", offload" if facts["offloads"] else ""
    needed = "" if facts["needed"] is None else f", states {format_bytes(facts['needed'])}"
    return f"{facts.get('version')}, ZeRO {facts.get('stage')}{offload}{needed}"
