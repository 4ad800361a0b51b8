"""What a logged step shows besides its losses: throughput, FLOPs, fractions of the time, memory, bytes received."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distill.run.collectives import bytes_received, rank, world_size
from distill.run.throughput import matmul_peak
from distill.student import Student
from distill.student.student import PooledVectors
from distill.training.batches import MicroBatch
from distill.training.task import TrainingModule

GIB = 2**30
APART = ("evaluation", "checkpoint")  # part of the time, but not of the throughput of training
PARTS = ("input wait", "gather", "forward and backward", "optimizer", "logging", *APART)
WIDTHS = (8, 16, 32)  # tokens of the texts whose FLOPs are counted
WHOLE_STEP, KEYS = "bytes_received/step", "bytes_received/keys"


class StepClock:
    """Seconds since the last `take`, by named part; the rest has no name.

    A GPU works asynchronously, so that parts that are `on_device` are timed there by CUDA events.
    """

    def __init__(self, device: torch.device) -> None:
        self._has_events = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []
        self._since = time.perf_counter()

    @contextmanager
    def of(self, what: str, *, on_device: bool = False) -> Iterator[None]:
        if on_device and self._has_events:
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            yield
            ended.record()
            self._events.append((what, begun, ended))
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[what] += time.perf_counter() - started

    def take(self) -> tuple[float, dict[str, float]]:
        """All seconds, and those that have a name. On a GPU, once the host has waited for what was timed."""
        for what, begun, ended in self._events:
            self._seconds[what] += begun.elapsed_time(ended) / 1000
        now = time.perf_counter()
        whole, named = now - self._since, dict(self._seconds)
        self._since, self._events = now, []
        self._seconds.clear()
        return whole, named


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
            "memory/resident": psutil.Process().memory_info().rss / GIB,
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


def source_metrics(means: dict[str, float], global_batch: int) -> dict[str, float]:
    """The number of texts of each source in a step, and the mean of their losses, nan where there is none.

    means: over the global batch, of what `StepContext.observe_sources` keeps.
    """
    metrics: dict[str, float] = {}
    for name in [tag.partition("/")[2] for tag in means if tag.startswith("source_texts/")]:
        share, loss = means[f"source_texts/{name}"], means[f"source_loss/{name}"]
        metrics |= {f"source_texts/{name}": share * global_batch, f"source_loss/{name}": loss / share if share else math.nan}
    return metrics


@torch.no_grad()
def forward_flops(student: Student) -> tuple[float, float]:
    """(a, b): a text of w tokens takes a w + b w^2 FLOPs (2 x multiply-adds) in one forward pass, without its head's."""
    was_training = student.training
    student.eval()
    device, counts = next(student.parameters()).device, []
    for width in WIDTHS:
        tokens = {name: torch.ones((1, width), dtype=torch.int64, device=device) for name in ("input_ids", "attention_mask")}
        with FlopCounterMode(display=False) as counter:
            student(tokens)
        counts.append(counter.get_total_flops())
    student.train(was_training)
    square, linear, _ = np.polyfit(WIDTHS, counts, 2).tolist()
    return linear, square


def num_passes(encoder: nn.Module) -> int:
    """The FLOPs of a step in forward passes: backward counts twice, where there is anything to train."""
    return 3 if any(parameter.requires_grad for parameter in encoder.parameters()) else 1
