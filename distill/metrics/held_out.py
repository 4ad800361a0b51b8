"""Which held-out texts serve the dev evaluations of training, and which the final evaluation.

The held-out set is ordered by text hash, so that both parts are random samples; they are disjoint unless too few
texts remain for the dev evaluations.
"""

from __future__ import annotations

import numpy as np

SMALLEST_DEV = 20


def final_rows(num_held_out: int, num_test: int) -> np.ndarray:
    """Rows of the held-out set for the final evaluation, int64."""
    return np.arange(min(num_test, num_held_out))


def dev_rows(num_held_out: int, num_test: int, num_dev: int) -> np.ndarray:
    """Rows for dev evaluations, int64: those after the final rows, or, if fewer than SMALLEST_DEV remain, some of these."""
    final = final_rows(num_held_out, num_test)
    dev = np.arange(len(final), min(num_held_out, len(final) + num_dev))
    return dev if len(dev) >= SMALLEST_DEV else final[:num_dev]
