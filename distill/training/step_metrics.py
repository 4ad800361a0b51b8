"""What a logged step shows besides its losses: throughput, fractions of the time, memory, bytes received."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from distill.run.collectives import bytes_received, rank, world_size
from distill.run.throughput import matmul_peak
from distill.student.student import PooledVectors
from distill.training.batches import MicroBatch
from distill.training.step_clock import StepClock, forward_flops, num_passes
from distill.training.task import TrainingModule

GIB = 2**30
APART = ("evaluation", "checkpoint")  # part of the time, but not of the throughput of training
PARTS = ("input wait", "gather", "forward and backward", "optimizer", "logging", *APART)
WHOLE_STEP, KEYS = "bytes_received/step", "bytes_received/keys"


class StepMetrics:
    """Counts on every step what costs nothing; `sums` and `since_last_call` are for steps that are logged.

    Made before the engine: rank 0 alone counts the student's FLOPs, and under ZeRO-3 its forward pass is a collective.
    """

    def __init__(self, module: TrainingModule, device: torch.device) -> None:
        self.clock = StepClock(device)
        self._device = device
        self._linear, self._square, self._peak = 0.0, 0.0, 0.0
        if rank() == 0:
            passes = num_passes(module.student.encoder)
            self._linear, self._square = (passes * count for count in forward_flops(module.student))
            self._peak = world_size() * matmul_peak(device, module.amp, seconds=0.05)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # those products are larger than many a student
        self._steps = self._tokens = self._squares = 0
        self._received: dict[str, int] = {}
        self.clock.take()

    def count(self, micro: list[MicroBatch]) -> None:
        """Counts a step's micro-batches, before they go to the device."""
        self._steps += 1
        for part in micro:
            for chunk in part.tokens if len(part.positions) else []:
                if isinstance(chunk, PooledVectors):
                    continue
                lengths = chunk["attention_mask"].sum(dim=1)
                self._tokens += int(lengths.sum())
                self._squares += int(lengths.square().sum())

    def received(self, what: str, before: int) -> None:
        """Records the bytes received since `bytes_received()` was `before`."""
        self._received[what] = bytes_received() - before

    def sums(self) -> dict[str, Tensor]:
        """The counts that are summed over ranks."""
        numbers = {"tokens": self._tokens, "squares": self._squares}
        return {name: torch.tensor(number, dtype=torch.double, device=self._device) for name, number in numbers.items()}

    def since_last_call(self, tokens: float, squares: float, global_batch: int) -> dict[str, float]:
        """Metrics of all steps since the last call; tokens, squares: `sums` over all ranks."""
        whole, named = self.clock.take()
        training = max(whole - sum(named.get(name, 0.0) for name in APART), 1e-9)
        metrics = {
            "texts_per_second": self._steps * global_batch / training,
            "tokens_per_second": tokens / training,
            "memory/resident": _resident() / GIB,
        }
        if self._peak:
            metrics["mfu"] = (self._linear * tokens + self._square * squares) / training / self._peak
        for name in PARTS:
            metrics[f"time/{name.replace(' ', '_')}"] = named.get(name, 0.0) / whole
        metrics["time/rest"] = max(0.0, 1 - sum(named.values()) / whole)
        if self._device.type == "cuda":
            metrics["memory/device_peak"] = torch.cuda.max_memory_allocated(self._device) / GIB
        metrics |= self._received
        self._steps = self._tokens = self._squares = 0
        return metrics


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
