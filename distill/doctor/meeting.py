"""Reports from rank to rank over the network, where training will meet; then an all-reduce, timed, if all have come.

All of it is in a thread, since a network that hangs, hangs whoever asks it.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from distill.doctor.notices import Report
from distill.doctor.start import Start

if TYPE_CHECKING:
    import torch

Join = Callable[[Any, float], "torch.device"]
"""join(store, timeout): this process becomes a rank of the process group that meets in that store; returns its device."""

POLL = 0.05
NUM_BYTES = 16 * 2**20
SERVE = 5.0  # seconds that rank 0 may take to reach its own store
REDUCE = 5.0  # seconds that joining and reducing may take
A_MOMENT = 1.0
SOURCE = re.compile(r"\[/\S+\] ?")
OVER, TOGETHER = "over", "together"


class Meeting(threading.Thread):
    """One rank's part, which begins with its report and waits for others until `until`, a time.monotonic().

    heard: on rank 0, the reports of those who came. has_come: whether this rank reached the store. error: why it could not.
    reduce_errors: by rank, on rank 0 of all, elsewhere its own. bandwidth: of the all-reduce, bytes a second.
    """

    def __init__(self, start: Start, report: Report, until: float, join: Join) -> None:
        super().__init__(name="meeting", daemon=True)
        self.heard: dict[int, Report] = {start.rank: report}
        self.error = ""
        self.reduce_errors: dict[int, str] = {}
        self.bandwidth: float | None = None
        self.has_come = False
        self.has_begun_to_reduce = False
        self.is_done = threading.Event()
        self._stopped = threading.Event()
        self._start = start
        self._until = until
        self._join = join
        self._store: Any = None

    def run(self) -> None:
        try:
            self._store = self._open()
            self.has_come = True
            self._host() if self._start.rank == 0 else self._attend()
        except Exception as error:  # torch raises what it likes
            self.error = self.error or first_line(error)
        finally:
            self.is_done.set()

    def stop_waiting(self) -> None:
        """On rank 0: those who have not come by now are missing."""
        self._stopped.set()

    def close(self) -> None:
        """On rank 0: lets the others go."""
        if self._store is not None and self.is_done.is_set():
            with suppress(Exception):
                self._store.set(OVER, b"1")

    @property
    def is_over(self) -> bool:
        """Whether rank 0 has let this rank go, or is gone itself."""
        if not self.is_done.is_set() or self._store is None:
            return False
        try:
            return bool(self._store.check([OVER]))
        except Exception:  # the store's process has ended
            return True

    def _open(self) -> Any:
        from torch.distributed import PrefixStore, TCPStore

        is_first = self._start.rank == 0
        patience = SERVE if is_first else max(1.0, self._until - time.monotonic())
        store = TCPStore(
            self._start.address,
            self._start.port,
            is_master=is_first and not self._start.is_store_served,
            timeout=timedelta(seconds=patience),
            wait_for_workers=False,
        )
        return PrefixStore(f"doctor/{self._start.name}", store)

    def _host(self) -> None:
        missing = set(range(1, self._start.world_size))
        while missing and not self._stopped.is_set() and time.monotonic() < self._until:
            for rank in sorted(missing):
                if self._store.check([str(rank)]):
                    self.heard[rank] = json.loads(self._store.get(str(rank)))
                    missing.remove(rank)
            time.sleep(POLL)
        self._store.set(TOGETHER, b"0" if missing else b"1")
        if missing:
            return
        self._reduce()
        others = [f"reduced/{rank}" for rank in range(1, self._start.world_size)]
        patience = time.monotonic() + A_MOMENT
        while not self._store.check(others) and time.monotonic() < patience:
            time.sleep(POLL)
        for rank in range(1, self._start.world_size):
            if self._store.check([f"reduced/{rank}"]) and (error := self._store.get(f"reduced/{rank}").decode()):
                self.reduce_errors[rank] = error

    def _attend(self) -> None:
        rank = str(self._start.rank)
        self._store.set(rank, json.dumps(self.heard[self._start.rank]))
        while not self._store.check([TOGETHER]):
            time.sleep(POLL)
        if self._store.get(TOGETHER) == b"1":
            self._reduce()
            self._store.set(f"reduced/{rank}", self.reduce_errors.get(self._start.rank, ""))

    def _reduce(self) -> None:
        from torch.distributed import PrefixStore

        self.has_begun_to_reduce = True
        try:
            device = self._join(PrefixStore("group", self._store), REDUCE)
            self.bandwidth = all_reduce_bandwidth(device, self._start.world_size)
        except Exception as error:
            self.reduce_errors[self._start.rank] = first_line(error)


def all_reduce_bandwidth(device: torch.device, world_size: int) -> float:
    """Bytes a second, as a ring counts them: 2 (W-1)/W x the tensor's. Raises RuntimeError if the sum is wrong."""
    import torch
    import torch.distributed as dist

    def reduce(num_bytes: int) -> float:
        values = torch.ones(num_bytes // 4, device=device)
        started = time.perf_counter()
        dist.all_reduce(values)
        total = float(values[-1])
        if total != world_size:
            raise RuntimeError(f"the sum of {world_size} ones is {total:g}")
        return time.perf_counter() - started

    reduce(1024)
    return 2 * (world_size - 1) / world_size * NUM_BYTES / reduce(NUM_BYTES)


def first_line(error: Exception) -> str:
    """Without the places in torch's own source that it may name."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return SOURCE.sub("", line)
