"""A timed all-reduce over all ranks, in a subprocess of each rank: a collective that hangs can only be killed."""

from __future__ import annotations

import json
import math
import multiprocessing
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from distill.doctor.context import Context
from distill.doctor.findings import Finding, Findings, shorten
from distill.doctor.rendezvous import connect, first_line, wait_for

if TYPE_CHECKING:
    from torch.distributed import Store

NUM_BYTES = 16 * 2**20
TIMEOUTS = {"gloo": 5.0, "nccl": 20.0}  # seconds; NCCL connects its ranks when it is first used
START = "all-reduce"  # rank 0 sets this key once all ranks have come


@dataclass(frozen=True)
class AllReduce:
    """errors: by rank. bandwidth: bytes per second as a ring counts them, 2 (W-1)/W x the tensor's; None if it failed."""

    errors: Mapping[int, str] = field(default_factory=dict)
    bandwidth: float | None = None


def fork(context: Context) -> BaseProcess:
    """This rank's subprocess, which waits for START. It is forked before this process has other threads or uses a GPU."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(context,), daemon=True)
    process.start()
    return process


def run_on_all_ranks(store: Store, world_size: int, seconds: float) -> AllReduce:
    """On rank 0: starts the all-reduce in the subprocesses of all ranks, waits for their results for up to `seconds`."""
    store.set(START, "")
    keys = [f"{START}/{rank}" for rank in range(world_size)]
    wait_for(store, keys, seconds)
    results: dict[int, Any] = {
        rank: json.loads(store.get(key)) if store.check([key]) else "no result" for rank, key in enumerate(keys)
    }
    errors = {rank: result for rank, result in results.items() if isinstance(result, str)}
    return AllReduce(errors) if errors else AllReduce(bandwidth=results[0])


def _run(context: Context) -> None:
    signal.alarm(math.ceil(context.remaining()) + 1)  # ends this subprocess wherever it hangs
    with suppress(Exception):  # of the store, which the rank itself reports
        store = connect(context, 1.0, serve=False)
        if wait_for(store, [START], context.remaining()):
            try:
                result: float | str = _measure(context, store)
            except Exception as error:
                result = first_line(error)
            store.set(f"{START}/{context.rank}", json.dumps(result))


def _measure(context: Context, store: Store) -> float:
    """The bandwidth in bytes per second. Raises RuntimeError if the sum is wrong."""
    import torch
    import torch.distributed as dist

    backend, device = "gloo", torch.device("cpu")
    if torch.cuda.is_available():
        backend, device = "nccl", torch.device("cuda", context.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    timeout, world_size = timedelta(seconds=TIMEOUTS[backend]), context.world_size
    group_store = dist.PrefixStore("group", store)
    dist.init_process_group(backend, store=group_store, rank=context.rank, world_size=world_size, timeout=timeout)
    for num_bytes in (1024, NUM_BYTES):  # the first one connects the ranks
        values = torch.ones(num_bytes // 4, device=device)
        started = time.perf_counter()
        dist.all_reduce(values)
        if (total := float(values[-1])) != world_size:
            raise RuntimeError(f"the sum of {world_size} ones is {total:g}")
    return 2 * (1 - 1 / world_size) * NUM_BYTES / (time.perf_counter() - started)


def diagnose(all_reduce: AllReduce, labels: Mapping[int, str]) -> Findings:
    by_error: dict[str, list[str]] = {}
    for rank, error in all_reduce.errors.items():
        by_error.setdefault(error, []).append(labels[rank])
    for error, nodes in by_error.items():
        fix = "open all ports between nodes, and name their interface: export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0"
        yield Finding(nodes[0], f"all ranks came, but the all-reduce failed on {shorten(nodes)}: {error}", fix)
