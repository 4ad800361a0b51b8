"""The nodes' clocks, each held against the one that the run directory's file system gives its files."""

from __future__ import annotations

import time

from distill.doctor.findings import Facts, Findings, Nodes, warning
from distill.doctor.start import Start

FAR = 10.0  # seconds


def look(start: Start) -> Facts:
    """`ahead`: seconds that this clock is before the file system's; None where no file can be written."""
    file = start.folder / f"clock-{start.rank}"
    try:
        start.folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
        now = time.time()
        written = file.stat().st_mtime
        file.unlink()
    except OSError:
        return {"ahead": None}
    return {"ahead": now - written}


def judge(start: Start, nodes: Nodes) -> Findings:
    known = {node: facts["ahead"] for node, facts in nodes.items() if facts["ahead"] is not None}
    if not known:
        return
    usual = sorted(known.values())[(len(known) - 1) // 2] if len(known) > 2 else next(iter(known.values()))
    for node, ahead in known.items():
        if abs(ahead - usual) > FAR:
            which = "ahead of" if ahead > usual else "behind"
            what = f"its clock is {abs(ahead - usual):,.0f} s {which} the others: times in logs will not fit"
            yield warning(node, what, f"ssh {node} chronyc makestep")


def note(facts: Facts) -> str:
    return "unknown" if facts["ahead"] is None else "fine"
