"""95% percentile intervals, and the difference of two models on the same resamples.

The resamples of a set depend on the seed and on the content of the set, never on the model. So two models measured on the same
set are measured on the same resamples, and their difference, resample by resample, is the paired bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distill.metrics.results import Interval, Resampled
from distill.run.files import fingerprint


def sample_name(seed: int, content: dict[str, Any]) -> str:
    """Identifies resamples: 16 hex digits that are equal for the same seed and the same JSON-able content."""
    return fingerprint({"seed": seed, "content": content})[:16]


def draw_counts(sample: str, num_items: int, resamples: int) -> np.ndarray:
    """How often each item comes in each resample with replacement: int64 [resamples, num_items], a function of `sample`."""
    rng = np.random.default_rng(int(sample, 16))
    return rng.multinomial(num_items, np.full(num_items, 1 / num_items), size=resamples)


def resampled_means(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean of scores [num_items] in each resample: [resamples]."""
    return counts @ scores / len(scores)


def interval(values: np.ndarray | Sequence[float]) -> Interval:
    """The central 95% of `values`."""
    low, high = np.percentile(values, [2.5, 97.5]).tolist()
    return low, high


def paired_difference(first: Resampled, second: Resampled) -> Interval | None:
    """The 95% interval of second - first; None if the two were not measured on the same resamples."""
    are_same = first.sample == second.sample and len(first.values) == len(second.values) > 0
    return difference(first.values, second.values) if are_same else None


def difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The 95% interval of second - first, where both were measured on the same resamples in the same order.

    If 0 lies in it, the two are not distinguishable on this set. Raises ValueError if they cannot be the same resamples.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"{len(first)} and {len(second)} resamples cannot be paired")
    return interval(np.asarray(second) - np.asarray(first))
