"""Where the time of the training loop goes, and the FLOPs of a student."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distill.student import Student

WIDTHS = (8, 16, 32)


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
