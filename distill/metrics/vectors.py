"""Vectors of texts, which every metric starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from distill.run.prompts import Role

Encode = Callable[[list[str]], np.ndarray]
"""Texts [n] to their vectors, float32 [n, d], in the same order; not necessarily normalised."""

RoleText = tuple[Role | None, str]


class RoleEncode(Protocol):
    """An Encode that also encodes queries and documents, with the model's prompts for them."""

    def __call__(self, texts: list[str], role: Role | None = None, /) -> np.ndarray: ...


class EncodedTexts:
    """A RoleEncode that looks up the stored vectors [n, d] of n distinct texts instead of running a model."""

    def __init__(self, texts: Sequence[RoleText], vectors: np.ndarray) -> None:
        self.texts, self.vectors = texts, vectors
        self._row_of = {text: row for row, text in enumerate(texts)}

    @classmethod
    def of(cls, encode: Encode, texts: Iterable[str]) -> EncodedTexts:
        """Each text encoded once, all of them in one call, without a role."""
        distinct = list(dict.fromkeys(texts))
        return cls([(None, text) for text in distinct], encode(distinct))

    def __call__(self, texts: Sequence[str], role: Role | None = None, /) -> np.ndarray:
        return self.vectors[[self._row_of[role, text] for text in texts]]


def encode_by_role(encode: RoleEncode, texts: Sequence[RoleText]) -> np.ndarray:
    """The vectors [n, d] of texts of several roles, in their order; all texts of a role are encoded in one call."""
    rows_of: dict[Role | None, list[int]] = {}
    for row, (role, _) in enumerate(texts):
        rows_of.setdefault(role, []).append(row)
    vectors = encode([]) if not rows_of else None
    for role, rows in rows_of.items():
        part = encode([texts[row][1] for row in rows], role)
        if vectors is None:
            vectors = np.empty((len(texts), part.shape[1]), part.dtype)
        vectors[rows] = part
    assert vectors is not None
    return vectors


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows [n, d] of any float type, L2-normalised in float64; a row of zeros stays zero."""
    rows = vectors.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def unit_float32(vectors: np.ndarray) -> np.ndarray:
    """Rows [n, d], L2-normalised in float32 without a float64 copy of them, for large corpora; a row of zeros stays zero."""
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    return np.ascontiguousarray(vectors / np.where(norms > 0, norms, 1)[:, None].astype(np.float32), dtype=np.float32)
