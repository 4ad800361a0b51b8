"""Where student and teacher agree on what is near to a sentence, and where they differ most: examples for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distill.evaluation.fidelity import cosines_between

NEAREST = 10  # that count for whether they agree
SHOWN = 3


def neighbours(sentences: Sequence[str], student: np.ndarray, teacher: np.ndarray, *, examples: int = 5) -> dict[str, Any]:
    """{"sentences": n, "nearest": 10, "shared": [..], "agree": [example, ..], "differ": [example, ..]}, JSON-able.

    student [n, d_s] and teacher [n, d_t] are vectors of the same n sentences, 2 or more, normalised here.

    shared            how many sentences have 0, 1, .. 10 of their 10 nearest by the teacher among the 10 nearest by the student
    agree, differ     the sentences with most and with fewest of them; among those with equally many, in `agree` the student's
                      nearest ones are as near to the teacher as its own, in `differ` the teacher finds them farthest
    example           {"query", "shared", "teacher": [near, ..], "student": [near, ..]}: the 3 nearest by each
    near              {"sentence", "teacher": cosine, "student": cosine, "both": whether it is among the 3 of both}
    """
    count = min(NEAREST, len(sentences) - 1)
    cosines_t, cosines_s = (cosines_between(vectors) for vectors in (teacher, student))
    nearest_t, nearest_s = (np.argsort(-cosines, axis=1, kind="stable")[:, :count] for cosines in (cosines_t, cosines_s))
    shared = (nearest_t[:, :, None] == nearest_s[:, None, :]).any(axis=2).sum(axis=1)
    own, found = (np.take_along_axis(cosines_t, nearest, axis=1).mean(axis=1) for nearest in (nearest_t, nearest_s))
    order = np.lexsort((own - found, -shared))  # most shared first; then by what the teacher loses by the student's choice

    def example(row: int) -> dict[str, Any]:
        firsts = [nearest[row, :SHOWN].tolist() for nearest in (nearest_t, nearest_s)]

        def near(other: int) -> dict[str, Any]:
            figures = {
                name: round(float(cosines[row, other]), 4) for name, cosines in (("teacher", cosines_t), ("student", cosines_s))
            }
            return {"sentence": sentences[other], **figures, "both": all(other in each for each in firsts)}

        sides = {name: [near(other) for other in first] for name, first in zip(("teacher", "student"), firsts, strict=True)}
        return {"query": sentences[row], "shared": int(shared[row]), **sides}

    examples = min(examples, len(sentences) // 2)
    return {
        "sentences": len(sentences),
        "nearest": count,
        "shared": np.bincount(shared, minlength=count + 1).tolist(),
        "agree": [example(row) for row in order[:examples].tolist()],
        "differ": [example(row) for row in order[::-1][:examples].tolist()],
    }
