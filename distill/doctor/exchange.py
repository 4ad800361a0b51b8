"""What one rank does: it collects the facts of its node, exchanges them through the store, and diagnoses what it has."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import wait
from contextlib import suppress
from functools import partial
from importlib import import_module

from torch.distributed import Store

from distill.doctor import storage
from distill.doctor.check import Context, Facts, describe, in_background
from distill.doctor.diagnosis import CHECKS, Diagnosis, Report, diagnose
from distill.doctor.rendezvous import all_reduce, connect, first_line, fork, wait_for

COLLECTED, REPORTED, DONE = 0.55, 0.7, 0.95  # fractions of the timeout at which each ends


def examine(context: Context) -> Diagnosis | None:
    """On rank 0 the diagnosis of all nodes; on another rank None if rank 0 has its report, else that of its own node."""
    subprocess = connecting = None
    try:
        if context.world_size > 1:
            subprocess = fork(context)
            connecting = in_background(partial(connect, context, context.remaining(REPORTED), serve=True))
        facts = collect(context, COLLECTED) if context.local_rank == 0 else {}
        own: Report = {"host": socket.gethostname(), "local_rank": context.local_rank, "facts": facts}
        if connecting is None:
            return diagnose(context, {context.rank: own})
        try:
            store = connecting.result(context.remaining(REPORTED) + 1)
            exchange = in_background(partial(_send if context.rank else _gather, context, store, own))
            return exchange.result(context.remaining())
        except Exception as failure:
            return diagnose(context, {context.rank: own}, first_line(failure))
    finally:
        if subprocess is not None:
            subprocess.kill()


def collect(context: Context, fraction: float) -> dict[str, Facts]:
    """This node's facts by check. A check that raises, or is not done at this fraction of the timeout, has only `failed`, which
    says why, and `cause`: error, time, or import where its package is not imported either."""
    imports = {check.name: in_background(partial(import_module, check.imports)) for check in CHECKS if check.imports}
    facts = {check.name: in_background(partial(check.collect, context)) for check in CHECKS}
    done, _ = wait(facts.values(), timeout=context.remaining(fraction))
    collected: dict[str, Facts] = {}
    for name, future in facts.items():
        if future not in done:
            cause = "import" if name in imports and not imports[name].done() else "time"
            collected[name] = {"failed": f"not done after {fraction * context.timeout:.0f} s", "cause": cause}
        elif error := future.exception():
            collected[name] = {"failed": describe(error), "cause": "error"}
        else:
            collected[name] = future.result()
    return collected


def _gather(context: Context, store: Store, own: Report) -> Diagnosis:
    """On rank 0: waits for the reports of the others, and for the all-reduce if all have come."""
    with storage.marker(context, own["facts"]["storage"]) as marker:
        store.set("marker", marker)
        keys = {f"report/{rank}": rank for rank in range(1, context.world_size)}
        all_came = wait_for(store, list(keys), context.remaining(REPORTED))
    waited = time.monotonic() - context.started
    reports = {0: own} | {rank: json.loads(store.get(key)) for key, rank in keys.items() if store.check([key])}
    reduced = all_reduce(store, context.world_size, context.remaining(DONE)) if all_came else None
    store.set("done", json.dumps(list(reports)))
    return diagnose(context, reports, "", reduced, waited)


def _send(context: Context, store: Store, own: Report) -> None:
    """On another rank: sends its report, and waits for the end of rank 0."""
    if not wait_for(store, ["marker"], context.remaining(REPORTED)):
        raise TimeoutError("no rank 0 of this run is there")
    facts = own["facts"].get("storage", {"failed": ""})
    if "failed" not in facts:  # else the run directory may hang
        facts |= storage.check_marker(context, store.get("marker").decode())
    store.set(f"report/{context.rank}", json.dumps(own))
    came = [context.rank]
    with suppress(Exception):  # rank 0 has ended
        if wait_for(store, ["done"], context.remaining(DONE)):
            came = json.loads(store.get("done"))
    if context.rank not in came:
        raise TimeoutError("rank 0 stopped waiting before this rank was done")
