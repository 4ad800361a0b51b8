"""Texts whose neighbours student and teacher agree on, and those on which they differ most: examples for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distill.metrics.fidelity import cosines_between, num_common

NEAREST = 10  # that count as shared or not
SHOWN = 3


def neighbours(texts: Sequence[str], student: np.ndarray, teacher: np.ndarray, *, examples: int = 5) -> dict[str, Any]:
    """{"texts": n, "nearest": 10, "shared": [..], "agree": [example, ..], "differ": [example, ..]}, JSON-able.

    student [n, d_s] and teacher [n, d_t] are vectors of the same n texts, 2 or more, normalised here.

    shared            how many texts have 0, 1, .. 10 of their 10 nearest by the teacher among the 10 nearest by the student
    agree, differ     the texts with most and with fewest of them; of those with equally many, first in `agree` where the
                      student's nearest are as near to the teacher as its own, first in `differ` where they are farthest
    example           {"query", "shared", "teacher": [near, ..], "student": [near, ..]}: the 3 nearest by each
    near              {"text", "teacher": cosine, "student": cosine, "both": whether it is among the 3 of both}
    """
    count = min(NEAREST, len(texts) - 1)
    cosines = {"teacher": cosines_between(teacher), "student": cosines_between(student)}
    nearest = {side: np.argsort(-values, axis=1, kind="stable")[:, :count] for side, values in cosines.items()}
    shared = num_common(nearest["teacher"], nearest["student"])
    own, found = (np.take_along_axis(cosines["teacher"], rows, axis=1).mean(axis=1) for rows in nearest.values())
    order = np.lexsort((own - found, -shared))  # most shared first; then by how much nearer the teacher's own are

    def example(row: int) -> dict[str, Any]:
        firsts = {side: rows[row, :SHOWN].tolist() for side, rows in nearest.items()}

        def near(other: int) -> dict[str, Any]:
            scores = {side: round(float(values[row, other]), 4) for side, values in cosines.items()}
            return {"text": texts[other], **scores, "both": all(other in first for first in firsts.values())}

        sides = {side: [near(other) for other in first] for side, first in firsts.items()}
        return {"query": texts[row], "shared": int(shared[row]), **sides}

    examples = min(examples, len(texts) // 2)
    return {
        "texts": len(texts),
        "nearest": count,
        "shared": np.bincount(shared, minlength=count + 1).tolist(),
        "agree": [example(row) for row in order[:examples].tolist()],
        "differ": [example(row) for row in order[::-1][:examples].tolist()],
    }
