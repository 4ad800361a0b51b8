"""What all checks share: the context of a rank, facts, findings, and the comparison of nodes."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from typing import Any

from distill.config import RunConfig

MAX_NAMED = 3
Facts = dict[str, Any]
Nodes = Mapping[str, Facts]  # by the node's name, rank 0's node first


@dataclass(frozen=True)
class Context:
    """One rank of a doctor run, as the launcher describes it. The rank whose `local_rank` is 0 examines its node.

    started: time.monotonic() at the start of this process. timeout: seconds from then within which it prints, whatever hangs.
    run_id: the same on all ranks, another in each concurrent run. hosts: the node of each rank, () if unknown. ranks_per_node:
    of the training. store_is_served: by another process: torchrun's agent. cores: those that the ranks of this node share.
    threads: OMP_NUM_THREADS. interfaces: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, where set.
    """

    config: RunConfig
    started: float
    timeout: float = 120.0
    run_id: str = ""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    hosts: tuple[str, ...] = ()
    ranks_per_node: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    store_is_served: bool = False
    cores: int = 1
    threads: int | None = None
    interfaces: dict[str, str] = field(default_factory=dict)

    @property
    def store_address(self) -> str:
        return f"{self.master_addr}:{self.master_port}"

    @property
    def has_several_nodes(self) -> bool:
        return self.world_size > self.local_world_size

    def remaining(self, fraction: float = 1.0) -> float:
        """Seconds until this fraction of the timeout has passed, at least 0."""
        return max(0.0, self.started + fraction * self.timeout - time.monotonic())


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong on one node. A fault ends the run or falsifies its results; a warning does neither.

    is_transient: the check itself failed or took too long, so that another start may find nothing.
    """

    node: str
    what: str
    fix: str
    is_fault: bool = True
    check: str = ""
    is_transient: bool = False


Findings = Iterator[Finding]


def warning(node: str, what: str, fix: str) -> Finding:
    return Finding(node, what, fix, is_fault=False)


@dataclass(frozen=True)
class Check:
    """collect: this node's facts, JSON-able, with a `summary` in a few words. diagnose: a pure function of all nodes' facts."""

    name: str
    collect: Callable[[Context], Facts]
    diagnose: Callable[[Context, Nodes], Findings]
    imports: str = ""  # a package that takes long to import: that it takes too long is a warning


def describe(error: BaseException) -> str:
    """The type of an exception and its message."""
    return f"{type(error).__name__}: {error}"


def outliers(nodes: Nodes, *path: str) -> Iterator[tuple[str, Any, Any, str]]:
    """The nodes whose value at facts[path[0]][path[1]]... is not that of most; nodes without such a value are left out.

    Yields (node, its value, the usual value, nodes with the usual value). Of values that are equally frequent, the first
    node's is the usual one.
    """
    parents = {node: reduce(getitem, path[:-1], facts) for node, facts in nodes.items()}
    values = {node: parent[path[-1]] for node, parent in parents.items() if path[-1] in parent}
    encoded = {node: json.dumps(value, sort_keys=True) for node, value in values.items()}
    for usual, _ in Counter(encoded.values()).most_common(1):
        like_most = [node for node, value in encoded.items() if value == usual]
        for node in (node for node in values if encoded[node] != usual):
            yield node, values[node], values[like_most[0]], shorten(like_most)


def shorten(names: Iterable[str]) -> str:
    """n1, n2, n3 and 5 more"""
    listed = list(dict.fromkeys(names))
    more = len(listed) - MAX_NAMED
    return ", ".join(listed[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def in_background(function: Callable[[], Any]) -> Future[Any]:
    """Runs a function in a daemon thread: a call that a file system or a network blocks cannot be interrupted, only left."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future
