"""One rank of a doctor run, as the launcher describes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from distill.config import RunConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """The rank whose `local_rank` is 0 examines its node.

    launcher: the folder of the launchers. started: time.monotonic() at the start of this process. timeout: seconds from then
    within which it prints, whatever hangs. run_id: the same on all ranks, another in each concurrent run. hosts: the node of
    each rank, () if unknown. ranks_per_node: of the training. store_is_served: by another process: torchrun's agent.
    threads: OMP_NUM_THREADS. interfaces: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, where set.
    """

    config: RunConfig
    launcher: Path
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


def in_background(function: Callable[[], T]) -> Future[T]:
    """Runs a function in a daemon thread: a call that a file system or a network blocks cannot be interrupted, only left."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future
