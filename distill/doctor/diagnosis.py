"""The list of checks, the findings of all of them on all nodes, and how they are printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from distill.doctor import hardware, inputs, names, rendezvous, software, storage
from distill.doctor.check import Check, Context, Facts, Finding, describe, shorten
from distill.doctor.rendezvous import AllReduce
from distill.run.formatting import format_bytes, format_table

CHECKS = (
    Check("software", software.collect, software.diagnose),
    Check("deepspeed", software.collect_deepspeed, software.diagnose_deepspeed, imports="deepspeed"),
    Check("devices", hardware.collect_devices, hardware.diagnose_devices),
    Check("names", names.collect, names.diagnose),
    Check("storage", storage.collect, storage.diagnose),
    Check("shm", hardware.collect_shm, hardware.diagnose_shm),
    Check("clocks", hardware.collect_clock, hardware.diagnose_clocks),
    Check("limits", hardware.collect_limits, hardware.diagnose_limits),
    Check("inputs", inputs.collect, inputs.diagnose),
)
RENDEZVOUS, NETWORK = "rendezvous", "network"
ROWS = (RENDEZVOUS, NETWORK, *(check.name for check in CHECKS))  # of the table
CONFIG_CHECKS = ("inputs", "deepspeed")
FINE, WARNING, FAULT = "fine", "warning", "FAULT"
Report = dict[str, Any]  # of one rank: its host, its local_rank, and the facts by check if that is 0


@dataclass(frozen=True)
class Diagnosis:
    """title: what was examined. summaries: by check, of the first node that has one. bandwidth: of the all-reduce in bytes per
    second, if there was one."""

    title: str
    nodes: tuple[str, ...]
    findings: tuple[Finding, ...]
    summaries: dict[str, str]
    bandwidth: float | None = None

    @property
    def code(self) -> int:
        """The exit code. 2: the config names what no node has, so that neither other nodes nor another start would help."""
        faults = [finding for finding in self.findings if finding.is_fault]
        lasting = {(fault.check, fault.node) for fault in faults if not fault.is_transient}
        has_all_nodes = not any(fault.check == RENDEZVOUS for fault in faults)
        if has_all_nodes and any(all((check, node) in lasting for node in self.nodes) for check in CONFIG_CHECKS):
            return 2
        return 1 if faults else 0


def diagnose(
    context: Context, reports: Mapping[int, Report], error: str = "", reduced: AllReduce | None = None, waited: float = 0.0
) -> Diagnosis:
    """reports: by rank. The others are as in rendezvous.diagnose and rendezvous.diagnose_all_reduce."""
    reduced = reduced or AllReduce()
    labels = _labels(context, reports)
    collected = {labels[rank]: report["facts"] for rank, report in sorted(reports.items()) if report["facts"]}
    findings = [replace(each, check=RENDEZVOUS) for each in rendezvous.diagnose(context, labels, reports, error, waited)]
    findings += [replace(each, check=NETWORK) for each in rendezvous.diagnose_all_reduce(reduced, labels)]
    summaries: dict[str, str] = {}
    if reduced.bandwidth is not None:
        summaries = {RENDEZVOUS: context.store_address, NETWORK: f"{format_bytes(reduced.bandwidth)}/s"}
    for check in CHECKS:
        found = {node: facts[check.name] for node, facts in collected.items()}
        complete = {node: facts for node, facts in found.items() if "failed" not in facts}
        findings += [_failure(check, node, facts) for node, facts in found.items() if "failed" in facts]
        for facts in islice(complete.values(), 1):
            summaries[check.name] = facts["summary"]
        try:
            findings += [replace(each, check=check.name) for each in check.diagnose(context, complete)]
        except Exception as raised:  # the findings of the other checks are reported all the same
            findings.append(_failure(check, labels[context.rank], {"failed": describe(raised), "cause": "error"}))
    nodes = tuple(dict.fromkeys([*collected, *(finding.node for finding in findings)]))
    title = f"{_count(len(nodes), 'node')}, {_count(context.world_size, 'process', 'processes')}"
    if context.rank > 0:
        title = f"rank {context.rank} on {labels[context.rank]}"
    return Diagnosis(title, nodes, tuple(dict.fromkeys(findings)), summaries, reduced.bandwidth)


def _failure(check: Check, node: str, facts: Facts) -> Finding:
    """Why a check has no facts of a node, or no findings. It is a warning where a package is only slow to import."""
    why, cause, fix = facts["failed"], facts["cause"], f"does every file system on {node} answer? else leave it out"
    if cause == "error":
        what, fix = f"the check {check.name} raised {why}", "the other checks hold; if only some nodes have it, leave them out"
    elif cause == "import":
        what = f"`import {check.imports}` is {why}: a slow file system, or a busy node"
    else:
        what = f"the check failed: {why}"
    return Finding(
        node, what, f"{fix}: sbatch --exclude {node}", is_fault=cause != "import", check=check.name, is_transient=True
    )


def _labels(context: Context, reports: Mapping[int, Report]) -> dict[int, str]:
    """The name of each rank's node: its host, with the rank that examined it where another node has the same host name."""
    labels = {rank: f"rank {rank}" for rank in range(context.world_size)} | dict(enumerate(context.hosts))
    examined: set[str] = set()
    for rank, report in sorted(reports.items()):
        labels[rank] = host = report["host"]
        if report["local_rank"] == 0 and host in examined:
            labels[rank] = f"{host} (rank {rank})"
        examined.add(host)
    return labels


def _count(number: int, singular: str, plural: str = "") -> str:
    return f"{number:,} {singular if number == 1 else plural or f'{singular}s'}"


def format_diagnosis(diagnosis: Diagnosis, *, with_table: bool) -> str:
    """One line, the table of all checks, and each finding with its fix: faults first, those of several nodes once."""
    nodes: dict[tuple[bool, str, str, str], list[str]] = {}
    for each in diagnosis.findings:
        nodes.setdefault((each.is_fault, each.check, each.what, each.fix), []).append(each.node)
    faults = sum(finding.is_fault for finding in diagnosis.findings)
    counts = ((faults, "fault"), (len(diagnosis.findings) - faults, "warning"))
    found = ", ".join(_count(number, noun) for number, noun in counts if number) or "all is well"
    speed = f" (all-reduce {format_bytes(diagnosis.bandwidth)}/s)" if diagnosis.bandwidth is not None else ""
    lines = [f"doctor: {diagnosis.title}: {found}{speed}"]
    if with_table:
        lines += ["", format_table(("check", "result", ""), [_row(diagnosis, check) for check in ROWS], align="left")]
    for is_fault, check, what, fix in sorted(nodes, key=lambda key: not key[0]):
        where = shorten(nodes[is_fault, check, what, fix])
        lines += ["", f"{FAULT if is_fault else WARNING}  {check}  {where}: {what}", f"  fix: {fix}"]
    return "\n".join(lines)


def _row(diagnosis: Diagnosis, check: str) -> tuple[str, str, str]:
    """(check, result, the nodes that are not fine; else what the first node has)"""
    found = [finding for finding in diagnosis.findings if finding.check == check]
    if found:
        result = FAULT if any(finding.is_fault for finding in found) else WARNING
        return check, result, shorten(finding.node for finding in found)
    return (check, FINE, diagnosis.summaries[check]) if check in diagnosis.summaries else (check, "-", "")
