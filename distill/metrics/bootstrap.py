"""95% percentile intervals, and the difference of two models on the same resamples.

The resamples of a set depend on the seed and on the content of the set, never on the model. So two models measured on the same
set are measured on the same resamples, and their difference, resample by resample, is the paired bootstrap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from distill.metrics.results import Interval, Resampled
from distill.run.files import fingerprint

BLOCK = 64  # resamples drawn at once


def sample_name(seed: int, content: dict[str, Any]) -> str:
    """Identifies resamples: 16 hex digits that are equal for the same seed and the same JSON-able content."""
    return fingerprint({"seed": seed, "content": content})[:16]


def draw_counts(sample: str, num_items: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each item comes in each resample with replacement: int64 [<= BLOCK, num_items] at a time, since all of them
    may take gigabytes; a function of `sample`."""
    rng = np.random.default_rng(int(sample, 16))
    chances = np.full(num_items, 1 / num_items)
    for start in range(0, resamples, BLOCK):
        yield rng.multinomial(num_items, chances, size=min(BLOCK, resamples - start))


def resampled_means(scores: Sequence[np.ndarray], sample: str, resamples: int) -> list[np.ndarray]:
    """The means [resamples] of each of the scores [num_items] in the same resamples of the items."""
    num_items = len(scores[0])
    blocks: list[list[np.ndarray]] = [[np.empty(0)] for _ in scores]
    for drawn in draw_counts(sample, num_items, resamples):
        counts = drawn.astype(np.float64)
        for of_scores, values in zip(blocks, scores, strict=True):
            of_scores.append(counts @ values / num_items)
    return [np.concatenate(of_scores) for of_scores in blocks]


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
