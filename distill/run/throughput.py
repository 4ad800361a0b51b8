"""Throughput of a precompute task: durations, texts per second, FLOP/s, MFU against a measured matmul peak."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Timing:
    """Seconds by activity: read, tokenize and write overlap with encode; `wait` is the encoder waiting for them.

    peak: FLOP/s of a large matrix product on this device, or None if it was not measured. texts: those that were embedded,
    reused: those whose vectors are another run's. at_limit: texts of the longest input that the encoder reads, most of which
    were longer.
    """

    peak: float | None = None
    texts: int = 0
    reused: int = 0
    at_limit: int = 0
    tokens: int = 0
    padded: int = 0
    flops: int = 0
    shapes: int = 0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - started

    def metrics(self) -> dict[str, Any]:
        """JSON-able. mfu: FLOP/s on tokens without padding, as a fraction of the measured peak."""
        encode = self.seconds["encode"]
        padding = self.tokens / self.padded if self.padded else None
        rate = self.flops * (padding or 0) / encode if encode else 0.0
        return {
            "texts": self.texts,
            "reused": self.reused,
            "at_limit": self.at_limit,
            "texts_per_second": round(self.texts / (encode + self.seconds["wait"]), 1) if encode else None,
            "seconds": {name: round(value, 2) for name, value in sorted(self.seconds.items())},
            "tokens": self.tokens,
            "padding_efficiency": None if padding is None else round(padding, 4),
            "shapes": self.shapes,
            "flops_per_second": round(rate),
            "mfu": round(rate / self.peak, 3) if self.peak and rate else None,
        }

    def __str__(self) -> str:
        metrics = self.metrics()
        parts = [f"{self.texts:,} texts", f"{metrics['texts_per_second'] or 0:,.0f} per second"]
        if self.reused:
            parts[:1] = [f"{self.reused:,} texts reused", f"{self.texts:,} embedded"]
        parts.append(
            ", ".join(f"{name} {self.seconds[name]:.1f} s" for name in ("read", "tokenize", "encode", "write", "wait"))
        )
        if metrics["padding_efficiency"]:
            parts.append(f"{metrics['padding_efficiency']:.3f} padding efficiency, {self.shapes} shapes")
        if metrics["flops_per_second"]:
            mfu = f", {metrics['mfu']:.0%} of this device's matmul peak (MFU)" if metrics["mfu"] else ""
            parts.append(f"{metrics['flops_per_second'] / 1e12:.2f} TFLOP/s{mfu}")
        return "; ".join(parts)


def matmul_peak(device: torch.device, dtype: torch.dtype | None, seconds: float = 0.3) -> float:
    """FLOP/s of a large matrix product in `dtype` (None: float32) on this device: the best of several measurements."""
    size = 8192 if device.type == "cuda" else 1024
    draw = torch.Generator(device).manual_seed(0)  # the global generator is not used
    a, b = (torch.randn(size, size, generator=draw, device=device, dtype=dtype or torch.float32) for _ in range(2))
    best, until = float("inf"), None
    while until is None or time.perf_counter() < until:
        started = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if until is None:  # the first product chooses a kernel
            until = time.perf_counter() + seconds
        else:
            best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
