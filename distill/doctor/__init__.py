"""Preflight checks: would a run of this config work on these nodes?

Each rank collects facts about its node and sends them to rank 0 through the store at MASTER_ADDR:MASTER_PORT, where training
would rendezvous too; rank 0 diagnoses the facts of all nodes. A rank that cannot reach the store diagnoses its own node.

    context.py      one rank: its config, its place among the ranks, its deadline
    checks.py       the list of checks, which software, engine, devices, names, storage, system and inputs.py implement
    needs.py        estimates of the disk space and the parameters that a run needs
    examine.py      what one rank does: collect, exchange, diagnose
    rendezvous.py   the store, and the ranks that did not come to it
    all_reduce.py   a timed all-reduce, in a subprocess
    findings.py     a finding; nodes that differ from the others
    diagnosis.py    all findings, and how they are printed

A check is three functions: collect(context) -> JSON-able facts of this node; diagnose(context, facts by node) -> findings, a
pure function; summarise(facts) -> a few words for a node without findings.
"""

from distill.doctor.context import Context
from distill.doctor.diagnosis import Diagnosis, format_diagnosis
from distill.doctor.examine import examine

__all__ = ["Context", "Diagnosis", "examine", "format_diagnosis"]
