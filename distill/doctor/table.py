"""What rank 0 prints: one line if all is well; else what is wrong, where, and what mends it, under a table of all checks."""

from __future__ import annotations

from collections.abc import Sequence

from distill.doctor.checks import CHECKS
from distill.doctor.diagnosis import NETWORK, REPORTS, Diagnosis, rate
from distill.doctor.findings import Finding, names

MOST_COLUMNS = 4
WIDEST = 44
FINE, WARNING, FAULT = "fine", "warning", "FAULT"


def printed(diagnosis: Diagnosis, *, always_table: bool) -> str:
    """The whole output, without a newline at its end."""
    lines = [summary(diagnosis)]
    if diagnosis.findings or always_table:
        lines += ["", *_table(diagnosis), *_explained(diagnosis.findings)]
    return "\n".join(lines)


def summary(diagnosis: Diagnosis) -> str:
    nodes, processes = _number(len(diagnosis.notes), "node", "nodes"), _number(diagnosis.num_processes, "process", "processes")
    faults = sum(finding.is_fault for finding in diagnosis.findings)
    warnings = len(diagnosis.findings) - faults
    found = [_number(count, noun, f"{noun}s") for count, noun in ((faults, "fault"), (warnings, "warning")) if count]
    speed = f" (all-reduce {rate(diagnosis.bandwidth)})" if diagnosis.bandwidth is not None else ""
    how = ", ".join(found) if found else "all is well"
    return f"doctor: {nodes}, {processes}: {how}{speed}"


def _number(count: int, one: str, more: str) -> str:
    return f"{count:,} {one if count == 1 else more}"


def _table(diagnosis: Diagnosis) -> list[str]:
    """A row a check, a column a node; where there are many nodes, a column for all to which the same happened."""
    checks = [REPORTS, NETWORK, *(check.name for check in CHECKS)]
    marks = {node: tuple(_mark(diagnosis, check, node) for check in checks) for node in diagnosis.notes}
    groups = [[node] for node in marks]
    if len(marks) > MOST_COLUMNS:
        groups = [[node for node in marks if marks[node] == each] for each in dict.fromkeys(marks.values())]
    rows = [["", *(names(group) for group in groups)]]
    for number, check in enumerate(checks):
        cells = [marks[group[0]][number] for group in groups]
        if len(marks) <= MOST_COLUMNS:
            cells = [_cell(diagnosis, check, group[0], mark) for group, mark in zip(groups, cells, strict=True)]
        if any(cells):
            rows.append([check, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _mark(diagnosis: Diagnosis, check: str, node: str) -> str:
    found = [finding.is_fault for finding in diagnosis.findings if (finding.check, finding.node) == (check, node)]
    if found:
        return FAULT if any(found) else WARNING
    return FINE if check in diagnosis.notes[node] else ""


def _cell(diagnosis: Diagnosis, check: str, node: str, mark: str) -> str:
    note = diagnosis.notes[node].get(check, "") if mark == FINE else mark
    return note if len(note) <= WIDEST else f"{note[: WIDEST - 3]}..."


def _explained(findings: Sequence[Finding]) -> list[str]:
    """Faults first; what is the same on several nodes, once."""
    lines = []
    said = dict.fromkeys((not each.is_fault, each.check, each.what, each.fix) for each in findings)
    for is_warning, check, what, fix in sorted(said, key=lambda key: key[0]):
        nodes = [each.node for each in findings if (each.check, each.what, each.fix) == (check, what, fix)]
        lines += ["", f"{WARNING if is_warning else FAULT}  {check}  {names(dict.fromkeys(nodes))}: {what}", f"  fix: {fix}"]
    return lines
