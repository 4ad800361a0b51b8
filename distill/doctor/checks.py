"""All checks, in the order of the table."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module

from distill.doctor import clocks, deepspeed, devices, inputs, limits, resolution, shared_memory, software, storage
from distill.doctor.findings import Facts, Finding, Findings, Nodes
from distill.doctor.start import Start


@dataclass(frozen=True)
class Check:
    name: str
    look: Callable[[Start], Facts]
    judge: Callable[[Start, Nodes], Findings]
    note: Callable[[Facts], str]
    imports: str | None = None  # what takes long to import, and longer where the file system is slow


CHECKS = (
    Check("software", software.look, software.judge, software.note),
    Check("deepspeed", deepspeed.look, deepspeed.judge, deepspeed.note, imports="deepspeed"),
    Check("devices", devices.look, devices.judge, devices.note, imports="torch"),
    Check("names", resolution.look, resolution.judge, resolution.note),
    Check("storage", storage.look, storage.judge, storage.note),
    Check("shm", shared_memory.look, shared_memory.judge, shared_memory.note),
    Check("clocks", clocks.look, clocks.judge, clocks.note),
    Check("limits", limits.look, limits.judge, limits.note),
    Check("inputs", inputs.look, inputs.judge, inputs.note),
)


def look(start: Start, until: float, until_imported: float) -> dict[str, Facts]:
    """What this node finds of itself, by check. A check that raises, or is not back in time, leaves {"failed": why}."""
    found: dict[str, Facts] = {}
    imported: set[str] = set()
    threads = [threading.Thread(target=_look, args=(check, start, found, imported), daemon=True) for check in CHECKS]
    for thread in threads:
        thread.start()
    limits = [until_imported if check.imports else until for check in CHECKS]
    for thread, limit in zip(threads, limits, strict=True):
        thread.join(max(0.0, limit - time.monotonic()))
    for check, limit in zip(CHECKS, limits, strict=True):
        if check.name not in found:
            found[check.name] = {"failed": f"not back after {limit - start.began:.0f} s"}
            if check.imports and check.name not in imported:
                found[check.name]["importing"] = check.imports
    return found


def _look(check: Check, start: Start, found: dict[str, Facts], imported: set[str]) -> None:
    try:
        if check.imports:
            with suppress(Exception):  # raised again by look, which knows what it means
                import_module(check.imports)
            imported.add(check.name)
        facts = check.look(start)
    except Exception as error:
        facts = {"failed": f"{type(error).__name__}: {error}"}
    found.setdefault(check.name, facts)


def judge(start: Start, looked: dict[str, dict[str, Facts]]) -> Findings:
    """The findings of all checks; `looked`: by node, then by check."""
    for check in CHECKS:
        found = {node: facts[check.name] for node, facts in looked.items()}
        for node, facts in found.items():
            if "failed" in facts:
                yield _failed(check, node, facts)
        whole = {node: facts for node, facts in found.items() if "failed" not in facts}
        for finding in check.judge(start, whole):
            yield Finding(finding.node, finding.what, finding.fix, finding.is_fault, check.name)


def _failed(check: Check, node: str, facts: Facts) -> Finding:
    if "importing" in facts:  # slow is not broken
        what = f"`import {facts['importing']}` is {facts['failed']}: its file system is slow, or the node is busy"
        return Finding(node, what, f"ssh {node} time python -c 'import {facts['importing']}'", False, check.name)
    fix = "a file system or a service that it asks does not answer: look on that node, or leave it out"
    return Finding(node, f"the check could not be made: {facts['failed']}", fix, True, check.name)
