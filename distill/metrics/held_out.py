"""Which held-out texts serve the dev evaluations of training, and which the final evaluation.

The held-out set is ordered by text hash, so that its first and its last rows are random samples. Dev evaluations take the last,
at most half of the set, and the final evaluation the first: disjoint, unless half of the set is too small for dev evaluations.
The dev rows do not depend on the number of final ones, so that another final evaluation leaves training as it is.
"""

from __future__ import annotations

import numpy as np

SMALLEST_DEV = 20


def final_rows(num_held_out: int, num_test: int, num_dev: int) -> np.ndarray:
    """Rows for the final evaluation, int64: the first `num_test` of the held-out set, but for dev rows where they are apart."""
    return np.arange(min(num_test, _first_dev_row(num_held_out, num_dev) or num_held_out))


def dev_rows(num_held_out: int, num_dev: int) -> np.ndarray:
    """Rows for dev evaluations, int64: the last `num_dev`, at most half of the set; if that is too few, the first ones."""
    first = _first_dev_row(num_held_out, num_dev)
    return np.arange(first, min(first + num_dev, num_held_out))


def _first_dev_row(num_held_out: int, num_dev: int) -> int:
    count = min(num_dev, num_held_out // 2)
    return num_held_out - count if count >= min(num_dev, SMALLEST_DEV) else 0
