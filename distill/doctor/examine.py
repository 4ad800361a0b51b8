"""What one rank does: it collects facts, exchanges them through the store, and diagnoses what it has."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from distill.doctor import all_reduce, storage
from distill.doctor.checks import collect
from distill.doctor.context import Context, in_background
from distill.doctor.diagnosis import Diagnosis, Report, diagnose
from distill.doctor.rendezvous import connect, first_line, wait_for

if TYPE_CHECKING:
    from torch.distributed import Store

IMPORTED, COLLECTED, REPORTED, DONE = 0.45, 0.55, 0.7, 0.95  # fractions of the timeout at which each ends


def examine(context: Context) -> Diagnosis | None:
    """On rank 0 the diagnosis of all nodes; on another rank None if rank 0 has its report, else that of its own node."""
    is_alone = context.world_size == 1
    error = "" if is_alone else _import_torch(context)
    subprocess = connecting = None
    try:
        if not is_alone and not error:
            subprocess = all_reduce.fork(context)
            connecting = in_background(partial(connect, context, REPORTED, serve=True))
        facts = collect(context, COLLECTED) if context.local_rank == 0 else {}
        own: Report = {"host": socket.gethostname(), "local_rank": context.local_rank, "facts": facts}
        if connecting is None:
            return diagnose(context, {context.rank: own}, error)
        try:
            store = connecting.result(context.remaining(REPORTED) + 1)
            exchange = in_background(partial(_send if context.rank else _gather, context, store, own))
            return exchange.result(context.remaining())
        except Exception as failure:
            return diagnose(context, {context.rank: own}, first_line(failure))
    finally:
        if subprocess is not None:
            subprocess.kill()


def _import_torch(context: Context) -> str:
    """Why torch, which has the store, cannot be imported in time; '' if it can."""
    try:
        in_background(partial(import_module, "torch.distributed")).result(context.remaining(IMPORTED))
    except TimeoutError:
        return f"`import torch` is not done after {IMPORTED * context.timeout:.0f} s; if it is only slow, --timeout more"
    except Exception as error:
        return f"`import torch` fails: {error}"
    return ""


def _gather(context: Context, store: Store, own: Report) -> Diagnosis:
    """On rank 0: waits for the reports of the others, and for the all-reduce if all have come."""
    with storage.marker(context, own["facts"]["storage"]) as marker:
        store.set("marker", marker)
        keys = {f"report/{rank}": rank for rank in range(1, context.world_size)}
        all_came = wait_for(store, list(keys), context.remaining(REPORTED))
    waited = time.monotonic() - context.started
    reports = {0: own} | {rank: json.loads(store.get(key)) for key, rank in keys.items() if store.check([key])}
    reduced = all_reduce.AllReduce()
    if all_came:
        reduced = all_reduce.run_on_all_ranks(store, context.world_size, context.remaining(DONE))
    store.set("done", json.dumps(list(reports)))
    return diagnose(context, reports, "", reduced, waited)


def _send(context: Context, store: Store, own: Report) -> None:
    """On another rank: sends its report, and waits for the end of rank 0."""
    if not wait_for(store, ["marker"], context.remaining(REPORTED)):
        raise TimeoutError("no rank 0 of this run is there")
    facts = own["facts"].get("storage", {"failed": ""})
    if "failed" not in facts:
        facts |= storage.check_marker(context, store.get("marker").decode())
    store.set(f"report/{context.rank}", json.dumps(own))
    came = [context.rank]
    with suppress(Exception):  # rank 0 has ended
        if wait_for(store, ["done"], context.remaining(DONE)):
            came = json.loads(store.get("done"))
    if context.rank not in came:
        raise TimeoutError("rank 0 stopped waiting before this rank was done")
