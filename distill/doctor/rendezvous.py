"""The store at which ranks rendezvous, and a timed all-reduce over all ranks that have come to it.

The all-reduce runs in a subprocess of each rank: a collective that hangs can only be killed.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import signal
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from distill.doctor.check import Context, Finding, Findings, shorten

SERVE = 5.0  # seconds within which rank 0 reaches the store that it serves itself
SOURCE = re.compile(r"\[/\S+\] ?")  # a place in torch's source, in its messages
NUM_BYTES = 16 * 2**20  # that are all-reduced
TIMEOUTS = {"gloo": 5.0, "nccl": 20.0}  # seconds; NCCL connects its ranks when it is first used
START = "all-reduce"  # rank 0 sets this key once all ranks have come


@dataclass(frozen=True)
class AllReduce:
    """The result of the timed all-reduce.

    errors: rank -> message. bandwidth: the bus bandwidth in bytes per second, as nccl-tests counts it: 2 (W-1)/W x the tensor's
    bytes / time; None if the all-reduce failed.
    """

    errors: Mapping[int, str] = field(default_factory=dict)
    bandwidth: float | None = None


def connect(context: Context, seconds: float, *, serve: bool) -> dist.Store:
    """The store of this run. serve: on rank 0, unless another process does. Raises DistError if it is not reached in time."""
    serve = serve and context.rank == 0 and not context.store_is_served
    timeout = timedelta(seconds=max(1.0, min(seconds, SERVE) if serve else seconds))
    store = dist.TCPStore(context.master_addr, context.master_port, is_master=serve, timeout=timeout, wait_for_workers=False)
    return dist.PrefixStore(f"doctor/{context.run_id}", store)


def wait_for(store: dist.Store, keys: list[str], seconds: float) -> bool:
    """Whether all keys are set within `seconds`. Raises DistNetworkError if the store is gone."""
    try:
        store.wait(keys, timedelta(seconds=max(0.01, seconds)))
    except dist.DistStoreError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """The first line of an error's message; "no answer" for a plain TimeoutError."""
    message = str(error).strip() or ("no answer" if isinstance(error, TimeoutError) else type(error).__name__)
    return SOURCE.sub("", message.splitlines()[0])


def fork(context: Context) -> BaseProcess:
    """This rank's subprocess, which waits for START. It is forked before this process has other threads or uses a GPU."""
    process = multiprocessing.get_context("fork").Process(target=_wait_and_measure, args=(context,), daemon=True)
    process.start()
    return process


def _wait_and_measure(context: Context) -> None:
    signal.alarm(math.ceil(context.remaining()) + 1)  # ends this subprocess wherever it hangs
    with suppress(Exception):  # of the store, which the rank itself reports
        store = connect(context, context.remaining(), serve=False)
        if wait_for(store, [START], context.remaining()):
            try:
                result: float | str = _measure(context, store)
            except Exception as error:
                result = first_line(error)
            store.set(f"{START}/{context.rank}", json.dumps(result))


def _measure(context: Context, store: dist.Store) -> float:
    """The bandwidth of this rank in bytes per second. Raises RuntimeError if the sum is wrong."""
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


def all_reduce(store: dist.Store, world_size: int, seconds: float) -> AllReduce:
    """On rank 0: starts the all-reduce in the subprocesses of all ranks, waits for their results for up to `seconds`."""
    store.set(START, "")
    keys = [f"{START}/{rank}" for rank in range(world_size)]
    wait_for(store, keys, seconds)
    results: list[Any] = [json.loads(store.get(key)) if store.check([key]) else "no result" for key in keys]
    errors = {rank: result for rank, result in enumerate(results) if isinstance(result, str)}
    return AllReduce(errors) if errors else AllReduce(bandwidth=results[0])


def diagnose_all_reduce(reduced: AllReduce, labels: Mapping[int, str]) -> Findings:
    for error in dict.fromkeys(reduced.errors.values()):
        nodes = [labels[rank] for rank in reduced.errors if reduced.errors[rank] == error]
        fix = "open all ports between nodes, and name their interface: export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0"
        yield Finding(nodes[0], f"all ranks came, but the all-reduce failed on {shorten(nodes)}: {error}", fix)


def diagnose(context: Context, labels: Mapping[int, str], came: Collection[int], error: str, waited: float) -> Findings:
    """Why this rank cannot use the store, or on rank 0, which ranks did not come to it.

    labels: the node of each rank. came: the ranks that reported. error: why this rank cannot use the store, or ''. waited:
    seconds from the start of rank 0 until it stopped waiting.
    """
    node, address, port = labels[context.rank], context.store_address, context.master_port
    reach = f"nc -vz {context.master_addr} {port}"
    if error and context.rank > 0:
        fix = f"`{reach}` on {node}; open all ports between nodes (firewall, cable)"
        yield Finding(node, f"rank {context.rank} did not reach rank 0 at {address}: {error}", fix)
    elif "EADDRINUSE" in error:
        fix = f"ssh {node} ss -ltnp sport = :{port}, and end that process; or export MASTER_PORT={port + 1}"
        yield Finding(node, f"port {port} is in use on {node} by another process", fix)
    elif error:
        fix = f"is MASTER_ADDR {context.master_addr} an address of {node}? else export MASTER_ADDR={node}"
        yield Finding(node, f"rank 0 cannot serve {address}: {error}", fix)
    else:
        missing: dict[str, list[str]] = {}
        for rank in set(range(context.world_size)) - set(came):
            missing.setdefault(labels[rank], []).append(str(rank))
        for absent, ranks in missing.items():
            what = f"rank {', '.join(ranks)} did not come to {address} within {waited:.0f} s"
            leave_out = f"; or leave it out: sbatch --exclude {absent}" if context.hosts else ""
            why = f"its process was not started, hangs, or is cut off from {node} and prints what it finds itself"
            yield Finding(absent, f"{what}: {why}", f"`{reach}` on that node{leave_out}")
