"""DeepSpeed: it imports, its configuration can be used, and its states fit.

No compiler is looked for, and no cache of extensions: training uses torch's AdamW under every ZeRO stage, offloaded too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.config import EngineConfig
from distill.doctor.findings import Facts, Finding, Findings, Nodes, size, warning
from distill.doctor.needs import num_parameters
from distill.doctor.start import Start


def look(start: Start) -> Facts:
    facts: Facts = {"error": "", "settings_error": "", "offloads": False, "forces": False, "needed": None}
    try:
        import deepspeed
    except Exception as error:  # whatever its own imports raise
        return facts | {"error": f"{type(error).__name__}: {error}"}
    facts["version"] = deepspeed.__version__
    try:
        settings = _settings(start.config.engine)
    except (OSError, ValueError) as error:
        return facts | {"settings_error": str(error)}
    zero = settings.get("zero_optimization", {})
    facts["stage"] = zero.get("stage", 0)
    facts["offloads"] = zero.get("offload_optimizer", {}).get("device") == "cpu"
    facts["forces"] = facts["offloads"] and settings.get("zero_force_ds_cpu_optimizer", True)
    parameters = num_parameters(start.config)
    if parameters is not None:
        facts |= _memory(start, parameters, facts["stage"], facts["offloads"])
    return facts


def _settings(config: EngineConfig) -> dict[str, Any]:
    from distill.training.zero import find_deepspeed_config

    return json.loads(find_deepspeed_config(config.deepspeed).read_text(encoding="utf-8"))


def _memory(start: Start, parameters: int, stage: int, offloads: bool) -> Facts:
    """Bytes that parameters, gradients and Adam's moments take, and what there is: a GPU's, or the node's for all its ranks."""
    import torch

    world = start.num_training_ranks
    parts = {3: 4 * parameters, 2: 4 * parameters, 1: 8 * parameters}  # by the ZeRO stage that splits them over ranks
    per_rank = sum(num_bytes / (world if stage >= splits else 1) for splits, num_bytes in parts.items())
    if torch.cuda.is_available() and not offloads:
        return {"needed": per_rank, "memory": torch.cuda.get_device_properties(0).total_memory, "holder": "a GPU"}
    total = next(
        int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:")
    )
    return {"needed": per_rank * start.ranks_per_node, "memory": total, "holder": "the node"}


def judge(start: Start, nodes: Nodes) -> Findings:
    for node, facts in nodes.items():
        if facts["error"]:
            yield Finding(node, f"DeepSpeed does not import: {facts['error']}", f"ssh {node} python -c 'import deepspeed'")
        if facts["settings_error"]:
            yield Finding(node, facts["settings_error"], "engine.deepspeed=configs/deepspeed/zero1.json")
        if facts["forces"]:
            what = "engine.deepspeed offloads the optimiser, and DeepSpeed would refuse any but its own CPU Adam"
            yield Finding(node, what, f'put "zero_force_ds_cpu_optimizer": false into {start.config.engine.deepspeed}')
        if facts["needed"] is not None and facts["needed"] > facts["memory"]:
            what = f"the model's states need {size(facts['needed'])}, and {facts['holder']} has {size(facts['memory'])}"
            yield warning(node, what, "engine.deepspeed=configs/deepspeed/zero3.json (or more nodes) splits them further")


def note(facts: Facts) -> str:
    offload = ", offload" if facts["offloads"] else ""
    needed = "" if facts["needed"] is None else f", states {size(facts['needed'])}"
    return f"{facts.get('version')}, ZeRO {facts.get('stage')}{offload}{needed}"
