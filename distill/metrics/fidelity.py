"""How much of the teacher's geometry a student keeps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill.metrics.spearman import spearman, spearman_rows
from distill.metrics.vectors import unit
from distill.run.prompts import Role

SMALLEST = 3  # texts among which there is something to rank


def rows_by_role(roles: Sequence[Role | None]) -> dict[str, list[int]]:
    """The rows of each role that has at least SMALLEST texts, if there are several roles; {} otherwise."""
    rows_of: dict[str, list[int]] = {}
    for row, role in enumerate(roles):
        if role is not None:
            rows_of.setdefault(role, []).append(row)
    return {role: rows for role, rows in sorted(rows_of.items()) if len(rows) >= SMALLEST} if len(set(roles)) > 1 else {}


def fidelity(student: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    """Three metrics, 1 for a student whose cosines are ordered as its teacher's; widths and float types may differ.

    student [n, d_s] and teacher [n, d_t] are vectors of the same n texts, normalised here.

    spearman        Spearman of student's and teacher's cosines over all n(n-1)/2 pairs, in -1..1
    spearman_top50  for each text, Spearman of both cosines over its 50 nearest by the teacher; the mean over texts, in -1..1
    top10           for each text, the fraction of its 10 nearest by the teacher that the student has too; the mean, in 0..1

    A text is not its own neighbour; with few texts, 50 and 10 become n - 1. Memory is 8 n^2 bytes a few times over.
    Raises ValueError if the vectors are not of the same texts, fewer than 3, or not finite.
    """
    num_texts = len(student)
    if num_texts != len(teacher):
        raise ValueError(f"fidelity needs vectors of the same texts: the student has {num_texts}, the teacher {len(teacher)}")
    if num_texts < SMALLEST:
        raise ValueError(f"fidelity needs {SMALLEST} texts or more, got {num_texts}")
    if not (np.isfinite(student).all() and np.isfinite(teacher).all()):
        raise ValueError("fidelity: the student or the teacher gives a vector that is not finite")
    cosines_s, cosines_t = cosines_between(student), cosines_between(teacher)
    pairs = np.triu_indices(num_texts, k=1)
    nearest_50 = _nearest(cosines_t, 50)
    near_s, near_t = (np.take_along_axis(cosines, nearest_50, axis=1) for cosines in (cosines_s, cosines_t))
    nearest_10_s, nearest_10_t = _nearest(cosines_s, 10), _nearest(cosines_t, 10)
    return {
        "spearman": spearman(cosines_s[pairs], cosines_t[pairs]),
        "spearman_top50": float(spearman_rows(near_s, near_t).mean()),
        "top10": float(num_common(nearest_10_s, nearest_10_t).sum() / nearest_10_t.size),
    }


def cosines_between(vectors: np.ndarray) -> np.ndarray:
    """Cosines [n, n], with -inf on the diagonal so that no text is its own neighbour."""
    rows = unit(vectors)
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -np.inf)
    return cosines


def _nearest(cosines: np.ndarray, count: int) -> np.ndarray:
    """Indices [n, count] of each row's largest cosines, in no order; the row itself is never one of them."""
    count = min(count, len(cosines) - 1)
    return np.argpartition(cosines, -count, axis=1)[:, -count:]


def num_common(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Number [n] of the indices that each row of a has in common with the same row of b, [n, k] each."""
    return (a[:, :, None] == b[:, None, :]).any(axis=2).sum(axis=1)
