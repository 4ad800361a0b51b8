"""What the launcher knows of this process and its environment."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from distill.config import RunConfig


@dataclass(frozen=True)
class Start:
    """One process of a start of the doctor. Its node is examined by the process whose `local_rank` is 0.

    name: of this very start, the same on all ranks. began: time.monotonic() when this process began. launcher: the folder of
    the launchers' code. hosts: where each rank was sent, () if the launcher does not know. ranks_per_node, num_training_ranks:
    those that training will have on this node, and on all. is_store_served: another process serves the store at address:port
    (torchrun's agent). threads: OMP_NUM_THREADS. interfaces: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, where set.
    """

    config: RunConfig
    name: str
    began: float
    launcher: Path
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    hosts: tuple[str, ...] = ()
    ranks_per_node: int = 1
    num_training_ranks: int = 1
    address: str = "127.0.0.1"
    port: int = 29500
    is_store_served: bool = False
    threads: int | None = None
    interfaces: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where reports lie while the doctor is at work; removed at its end."""
        return self.config.run_dir / ".doctor" / self.name

    @property
    def place(self) -> str:
        return f"{self.address}:{self.port}"
