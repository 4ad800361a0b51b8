"""Loss terms: the keys of a stage's `weights`, one file each. The loss of a row is the weighted sum of its terms.

Students and teacher are compared in one space of width d: the teacher's after a projection (ckd), or the teacher's first
principal components (hpd). A term is one of three kinds:

    RowTerm      sees a row alone                                       cosine, mse, pca
    KeyTerm      sees the row against all keys through their softmax     ckd, congen
    BatchTerm    sees the students' vectors of the whole global batch    relational

A term is found in this folder or, in an installed package, by the entry-point group "distill.loss_terms" (name = class).
"""

from __future__ import annotations

from distill.objectives.loss_terms.base import Attention, BatchTerm, KeyQuery, KeyTerm, LossTerm, RowTerm, TermInputs
from distill.run.registry import find_entries

__all__ = ["Attention", "BatchTerm", "KeyQuery", "KeyTerm", "LossTerm", "RowTerm", "TermInputs", "loss_terms"]


def loss_terms() -> dict[str, type[LossTerm]]:
    """All terms by name, built-in and installed ones."""
    return find_entries("distill.objectives.loss_terms", "distill.loss_terms", LossTerm)
