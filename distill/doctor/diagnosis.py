"""The findings on all nodes, and how they are printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from distill.doctor import all_reduce, checks, rendezvous
from distill.doctor.all_reduce import AllReduce
from distill.doctor.context import Context
from distill.doctor.findings import Finding, shorten
from distill.run.formatting import format_bytes, format_table

Report = dict[str, Any]  # of one rank: its host, its local_rank, and the facts by check if that is 0
RENDEZVOUS, NETWORK = "rendezvous", "network"
ROWS = (RENDEZVOUS, NETWORK, *(check.name for check in checks.CHECKS))  # of the table
CONFIG_CHECKS = ("inputs", "deepspeed")
FINE, WARNING, FAULT = "fine", "warning", "FAULT"


@dataclass(frozen=True)
class Diagnosis:
    """title: what was examined. summaries: by node, then by check. bandwidth: of the all-reduce in bytes per second, if any."""

    title: str
    findings: tuple[Finding, ...]
    summaries: dict[str, dict[str, str]]
    bandwidth: float | None = None

    @property
    def code(self) -> int:
        """The exit code. 2: the config names what no node has, so that neither other nodes nor another start would help."""
        faulty = {(finding.check, finding.node) for finding in self.findings if finding.is_fault}
        has_all_nodes = not any(check == RENDEZVOUS for check, _ in faulty)
        if has_all_nodes and any(all((check, node) in faulty for node in self.summaries) for check in CONFIG_CHECKS):
            return 2
        return 1 if faulty else 0


def diagnose(
    context: Context, reports: Mapping[int, Report], error: str = "", reduced: AllReduce | None = None, waited: float = 0.0
) -> Diagnosis:
    """reports: by rank. The others are as in rendezvous.diagnose and all_reduce.diagnose."""
    reduced = reduced or AllReduce()
    labels = _labels(context, reports)
    collected = {labels[rank]: report["facts"] for rank, report in sorted(reports.items()) if report["facts"]}
    missing = rendezvous.diagnose(context, labels, reports, error, waited)
    findings = [replace(finding, check=RENDEZVOUS) for finding in missing]
    findings += [replace(finding, check=NETWORK) for finding in all_reduce.diagnose(reduced, labels)]
    findings += checks.diagnose(context, collected)
    summaries = {node: checks.summarise(facts) for node, facts in collected.items()}
    if reduced.bandwidth is not None:
        for summary in summaries.values():
            summary |= {RENDEZVOUS: context.store_address, NETWORK: f"{format_bytes(reduced.bandwidth)}/s"}
    for finding in findings:
        summaries.setdefault(finding.node, {})
    title = f"{_count(len(summaries), 'node', 'nodes')}, {_count(context.world_size, 'process', 'processes')}"
    if context.rank > 0:
        title = f"rank {context.rank} on {labels[context.rank]}"
    return Diagnosis(title, tuple(dict.fromkeys(findings)), summaries, reduced.bandwidth)


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


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number:,} {singular if number == 1 else plural}"


def format_diagnosis(diagnosis: Diagnosis, *, with_table: bool) -> str:
    """One line, the table of all checks, and each finding with its fix: faults first, those of several nodes once."""
    nodes: dict[tuple[bool, str, str, str], list[str]] = {}
    for each in diagnosis.findings:
        nodes.setdefault((each.is_fault, each.check, each.what, each.fix), []).append(each.node)
    faults = sum(finding.is_fault for finding in diagnosis.findings)
    counts = ((faults, "fault"), (len(diagnosis.findings) - faults, "warning"))
    found = ", ".join(_count(number, noun, f"{noun}s") for number, noun in counts if number) or "all is well"
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
    summary = next((each[check] for each in diagnosis.summaries.values() if check in each), None)
    return (check, "-", "") if summary is None else (check, FINE, summary)
