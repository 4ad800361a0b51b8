"""Vectors of texts, which every metric starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

Encode = Callable[[list[str]], np.ndarray]
"""Texts [n] to their vectors, float32 [n, d], in the same order; not necessarily normalised."""


class EncodedTexts:
    """An Encode that looks up the stored vectors [n, d] of n distinct texts instead of running a model."""

    def __init__(self, texts: Sequence[str], vectors: np.ndarray) -> None:
        self.texts, self.vectors = texts, vectors
        self._row_of = {text: row for row, text in enumerate(texts)}

    @classmethod
    def of(cls, encode: Encode, texts: Iterable[str]) -> EncodedTexts:
        """Each text encoded once, all of them in one call."""
        distinct = list(dict.fromkeys(texts))
        return cls(distinct, encode(distinct))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return self.vectors[[self._row_of[text] for text in texts]]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows [n, d] of any float type, L2-normalised in float64; a row of zeros stays zero."""
    rows = vectors.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def unit_float32(vectors: np.ndarray) -> np.ndarray:
    """Rows [n, d], L2-normalised in float32 without a float64 copy of them, for large corpora; a row of zeros stays zero."""
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    return np.ascontiguousarray(vectors / np.where(norms > 0, norms, 1)[:, None].astype(np.float32), dtype=np.float32)
