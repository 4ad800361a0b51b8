"""Reference durations measured on this machine, from which tests derive their deadlines.

The time to start a rank is measured once in a test session (with pytest-xdist, once in each worker).
"""

from __future__ import annotations

import subprocess
import sys
import time
from functools import cache

import numpy as np

IMPORTS = "import torch, deepspeed, transformers, sentence_transformers, distill.training.training_stage"


def starts(count: float) -> float:
    """Seconds in which this machine starts `count` ranks, one after the other: Python, and what a rank imports."""
    return count * _seconds_to_start()


def hang_limit() -> float:
    """Seconds after which a process that should have ended is considered hung; long: it keeps the suite from blocking."""
    return starts(60)


@cache
def _seconds_to_start() -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True)
    return time.monotonic() - started


def cpu_seconds_to_sort(num_values: int, times: int = 1) -> float:
    """CPU seconds in which this process sorts `num_values` random numbers, `times` over."""
    values = np.random.default_rng(0).random(num_values)
    started = time.process_time()
    for _ in range(times):
        np.argsort(values)
    return time.process_time() - started
