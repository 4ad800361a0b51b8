"""Preflight checks: would a run of this config work on these nodes?

Each rank collects facts about its node and sends them to rank 0 through the store at MASTER_ADDR:MASTER_PORT, where training
would rendezvous too; rank 0 diagnoses the facts of all nodes. A rank that cannot reach the store diagnoses its own node.

    check.py        a rank's context, a check, a finding; nodes that differ from the others
    preflight.py    what pipeline.py checks too, before its first stage: models, widths, poolings, text, evaluation sets
    encoder_files.py  an encoder's files, without its weights
    software.py, hardware.py, names.py, storage.py, inputs.py     the checks
    needs.py        estimates of the disk space and the parameters that a run needs
    rendezvous.py   the store, the ranks that did not come to it, and a timed all-reduce in a subprocess
    exchange.py     what one rank does: collect, exchange, diagnose
    memory.py       the memory that a job may use
    diagnosis.py    the list of checks, their findings on all nodes, and how they are printed

A check is two functions: collect(context) -> JSON-able facts of this node; diagnose(context, facts by node) -> findings, a
pure function.
"""

from distill.doctor.check import Context
from distill.doctor.diagnosis import Diagnosis, format_diagnosis
from distill.doctor.exchange import examine

__all__ = ["Context", "Diagnosis", "examine", "format_diagnosis"]
