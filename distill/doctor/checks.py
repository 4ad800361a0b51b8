"""The list of all checks, in the order of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import wait
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module

from distill.doctor import devices, engine, inputs, names, software, storage, system
from distill.doctor.context import Context, in_background
from distill.doctor.findings import Facts, Finding, Findings, Nodes


@dataclass(frozen=True)
class Check:
    name: str
    collect: Callable[[Context], Facts]
    diagnose: Callable[[Context, Nodes], Findings]
    summarise: Callable[[Facts], str]
    imports: str = ""  # a package that takes long to import: that it takes too long is a warning


CHECKS = (
    Check("software", software.collect, software.diagnose, software.summarise),
    Check("deepspeed", engine.collect, engine.diagnose, engine.summarise, imports="deepspeed"),
    Check("devices", devices.collect, devices.diagnose, devices.summarise, imports="torch"),
    Check("names", names.collect, names.diagnose, names.summarise),
    Check("storage", storage.collect, storage.diagnose, storage.summarise),
    Check("shm", system.collect_shm, system.diagnose_shm, system.summarise_shm),
    Check("clocks", system.collect_clock, system.diagnose_clocks, system.summarise_clock),
    Check("limits", system.collect_limits, system.diagnose_limits, system.summarise_limits),
    Check("inputs", inputs.collect, inputs.diagnose, inputs.summarise),
)


def collect(context: Context, fraction: float) -> dict[str, Facts]:
    """This node's facts by check. A check that raises, or is not done at this fraction of the timeout, has {"failed": why}."""
    imports = {check.name: in_background(partial(import_module, check.imports)) for check in CHECKS if check.imports}
    facts = {check.name: in_background(partial(check.collect, context)) for check in CHECKS}
    wait(facts.values(), timeout=context.remaining(fraction))
    collected: dict[str, Facts] = {}
    for name, future in facts.items():
        if not future.done():
            is_importing = name in imports and not imports[name].done()
            collected[name] = {"failed": f"not done after {fraction * context.timeout:.0f} s", "is_importing": is_importing}
        elif error := future.exception():
            collected[name] = {"failed": f"{type(error).__name__}: {error}", "is_importing": False}
        else:
            collected[name] = future.result()
    return collected


def diagnose(context: Context, collected: Mapping[str, Mapping[str, Facts]]) -> Findings:
    """The findings of all checks; `collected` is by node, then by check."""
    for check in CHECKS:
        nodes = {node: facts[check.name] for node, facts in collected.items()}
        complete = {node: facts for node, facts in nodes.items() if "failed" not in facts}
        for node in (node for node in nodes if node not in complete):
            what, fix = (
                f"the check failed: {nodes[node]['failed']}",
                f"does every file system on {node} answer? else leave it out",
            )
            if is_importing := nodes[node]["is_importing"]:
                what = f"`import {check.imports}` is {nodes[node]['failed']}: a slow file system, or a busy node"
            yield Finding(node, what, f"{fix}: sbatch --exclude {node}", not is_importing, check.name)
        for finding in check.diagnose(context, complete):
            yield replace(finding, check=check.name)


def summarise(facts: Mapping[str, Facts]) -> dict[str, str]:
    """One node's facts in a few words, by check."""
    return {check.name: check.summarise(facts[check.name]) for check in CHECKS if "failed" not in facts[check.name]}
