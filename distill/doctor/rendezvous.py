"""The store at which ranks rendezvous, and the ranks that did not come to it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from distill.doctor.context import Context
from distill.doctor.findings import Finding, Findings

if TYPE_CHECKING:
    from torch.distributed import Store

SERVE = 5.0  # seconds within which rank 0 reaches the store that it serves itself
SOURCE = re.compile(r"\[/\S+\] ?")  # a place in torch's source, in its messages


def connect(context: Context, fraction: float, *, serve: bool) -> Store:
    """The store of this run. serve: on rank 0, unless another process does.

    Raises torch's DistError if the store is not reached before this fraction of the timeout has passed.
    """
    from torch.distributed import PrefixStore, TCPStore

    serve = serve and context.rank == 0 and not context.store_is_served
    seconds = min(context.remaining(fraction), SERVE) if serve else context.remaining(fraction)
    timeout = timedelta(seconds=max(1.0, seconds))
    store = TCPStore(context.master_addr, context.master_port, is_master=serve, timeout=timeout, wait_for_workers=False)
    return PrefixStore(f"doctor/{context.run_id}", store)


def wait_for(store: Store, keys: list[str], seconds: float) -> bool:
    """Whether all keys are set within `seconds`. Raises DistNetworkError if the store is gone."""
    from torch.distributed import DistStoreError

    try:
        store.wait(keys, timedelta(seconds=max(0.01, seconds)))
    except DistStoreError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """The first line of an error's message; "no answer" for a plain TimeoutError."""
    message = str(error).strip() or ("no answer" if isinstance(error, TimeoutError) else type(error).__name__)
    return SOURCE.sub("", message.splitlines()[0])


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
