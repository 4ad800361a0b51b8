"""What a logged step shows beside its losses: speed, shares of the time, memory, bytes on the wire, histograms."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from distill.teacher.timing import matmul_peak
from distill.training.batches import MicroBatch
from distill.training.clock import Clock, forward_flops, passes
from distill.training.distributed import bytes_received, rank, world_size
from distill.training.recipe import Task

GIB = 2**30
APART = ("evaluation", "checkpoint")  # of the time, but not of the speed of training
PARTS = ("input wait", "gather", "forward and backward", "optimiser", "logging", *APART)
WHOLE_STEP, KEYS = "wire/all_that_ranks_say", "wire/keys_and_ids"


class Instruments:
    """Counts on every step what costs nothing; `sums` and `figures` are for those that are logged.

    Made before the engine: rank 0 alone counts the student's arithmetic, and under ZeRO-3 its forward pass is a collective.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self.clock = Clock(device)
        self._device = device
        self._linear, self._square, self._peak = 0.0, 0.0, 0.0
        if rank() == 0:
            worth = passes(task.student.encoder)
            self._linear, self._square = (worth * count for count in forward_flops(task.student))
            self._peak = world_size() * matmul_peak(device, task.amp, seconds=0.05)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # those products are larger than many a student
        self._steps = self._tokens = self._squares = 0
        self._received: dict[str, int] = {}
        self.clock.take()

    def count(self, micro: list[MicroBatch]) -> None:
        """Takes note of a step's micro-batches, as they are before they go to the device."""
        self._steps += 1
        for part in micro:
            for chunk in part.tokens if len(part.positions) else []:
                if "attention_mask" not in chunk:  # a frozen encoder's vectors
                    continue
                lengths = chunk["attention_mask"].sum(dim=1)
                self._tokens += int(lengths.sum())
                self._squares += int(lengths.square().sum())

    def received(self, what: str, before: int) -> None:
        """What came since `bytes_received` was `before`."""
        self._received[what] = bytes_received() - before

    def sums(self) -> dict[str, Tensor]:
        """What all ranks' counts are needed of."""
        numbers = {"tokens": self._tokens, "squares": self._squares}
        return {name: torch.tensor(number, dtype=torch.double, device=self._device) for name, number in numbers.items()}

    def figures(self, tokens: float, squares: float, global_batch: int) -> dict[str, float]:
        """Of all steps since the last call; tokens, squares: `sums` over all ranks."""
        whole, named = self.clock.take()
        training = max(whole - sum(named.get(name, 0.0) for name in APART), 1e-9)
        figures = {
            "sentences_a_second": self._steps * global_batch / training,
            "tokens_a_second": tokens / training,
            "memory/resident": _resident() / GIB,
        }
        if self._peak:
            figures["mfu"] = (self._linear * tokens + self._square * squares) / training / self._peak
        for name in PARTS:
            figures[f"time/{name.replace(' ', '_')}"] = named.get(name, 0.0) / whole
        figures["time/rest"] = max(0.0, 1 - sum(named.values()) / whole)
        if self._device.type == "cuda":
            figures["memory/device_peak"] = torch.cuda.max_memory_allocated(self._device) / GIB
        figures |= self._received
        self._steps = self._tokens = self._squares = 0
        return figures


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
