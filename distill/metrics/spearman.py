"""Spearman's correlation, and its bootstrap without sorting again for every resample."""

from __future__ import annotations

import numpy as np


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman of two samples [n], ties by average ranks; 0 where one of them is constant."""
    return float(spearman_rows(x[None], y[None])[0])


def spearman_rows(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman of each row of x with the same row of y: [m, n], [m, n] -> [m]."""
    from scipy.stats import rankdata  # half a second

    return _correlation(rankdata(x, axis=1), rankdata(y, axis=1))


def bootstrap_spearman(x: np.ndarray, y: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Spearman [resamples] of bootstrap resamples of the pairs (x, y).

    A resample has the same values in the same order, each a number of times. So its ranks follow from a running sum of these
    counts over the distinct values, without sorting again.
    """
    num_pairs = len(x)
    group_x, group_y = (np.unique(values, return_inverse=True)[1] for values in (x, y))
    scores = np.empty(resamples)
    for resample in range(resamples):
        count = np.bincount(rng.integers(num_pairs, size=num_pairs), minlength=num_pairs)
        ranks_x, ranks_y = (_ranks(group, count) for group in (group_x, group_y))
        scores[resample] = _correlation(ranks_x[None], ranks_y[None], count)[0]
    return scores


def _ranks(group: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Average ranks [n], where value i occurs count[i] times and group[i] is its position among the distinct values."""
    size = np.bincount(group, weights=count)
    return (np.cumsum(size) - (size - 1) / 2)[group]


def _correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray | float = 1.0) -> np.ndarray:
    """Weighted Pearson of rows: [m, n], [m, n] -> [m]."""
    weights = np.broadcast_to(weights, x.shape[1:])
    x = x - (x @ weights / weights.sum())[:, None]
    y = y - (y @ weights / weights.sum())[:, None]
    scale = np.sqrt((x * x) @ weights) * np.sqrt((y * y) @ weights)
    return (x * y) @ weights / np.where(scale > 0, scale, 1.0)
