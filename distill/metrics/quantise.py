"""Quantised vectors: of d dimensions as float32 (4d bytes), float16 (2d), int8 (d) or binary (d/8).

int8 is affine, with a range for each dimension, since encoders' dimensions are neither of one width nor centred at zero: a
symmetric range would leave half of a skewed dimension's 256 levels unused. It costs a search nothing: the query stays float32,
and the offsets add the same to its score with every document. faiss's QT_8bit differs only in the place of a level within its
step. (sentence_transformers' quantize_embeddings rounds down, which doubles the largest error and shifts every value.)

binary is the sign of each dimension, as in vector databases: queries and documents are compared by Hamming distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Precision = Literal["float32", "float16", "int8", "binary"]
LEVELS = 256


def bytes_per_vector(precision: Precision, dim: int) -> int:
    """Bytes of one vector, without what an index adds to it."""
    return {"float32": 4 * dim, "float16": 2 * dim, "int8": dim, "binary": -(-dim // 8)}[precision]


@dataclass(frozen=True)
class Int8:
    """Vectors as one byte per dimension: a value is low + step x code, code 0 .. 255. low, step: float32 [d]."""

    low: np.ndarray
    step: np.ndarray

    @classmethod
    def of_range(cls, vectors: np.ndarray) -> Int8:
        """Covers in every dimension the least to the largest value of `vectors` [n, d]; a constant one has step 1."""
        low, high = vectors.min(axis=0), vectors.max(axis=0)
        step = (high - low) / np.float32(LEVELS - 1)
        return cls(low.astype(np.float32), np.where(step > 0, step, 1).astype(np.float32))

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """float [n, d] -> uint8 [n, d], to the nearest level; values beyond the range become its ends."""
        return np.clip(np.rint((vectors - self.low) / self.step), 0, LEVELS - 1).astype(np.uint8)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """uint8 [n, d] -> float32 [n, d], at most half a step from the encoded values that lie within the range."""
        return self.low + self.step * codes

    def scores(self, query: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Dot products of a float32 query [d] with the decoded codes [n, d], without decoding them: float32 [n]."""
        return codes @ (query * self.step) + query @ self.low


def quantised(vectors: np.ndarray, precision: Precision, calibration: np.ndarray) -> np.ndarray:
    """Vectors [n, d] stored in a precision and read back: float32 [n, d], not normalised again.

    int8 takes its ranges from the vectors `calibration` [m, d], as an index that is built before all documents are known.
    """
    if precision == "binary":
        return signs(sign_bits(vectors), vectors.shape[1])
    if precision == "int8":
        int8 = Int8.of_range(calibration)
        return int8.decode(int8.encode(vectors))
    return vectors.astype(np.float16 if precision == "float16" else np.float32).astype(np.float32)


def sign_bits(vectors: np.ndarray) -> np.ndarray:
    """float [n, d] -> uint8 [n, ceil(d / 8)], one bit per dimension: 1 above zero; the last byte is padded with zeros."""
    return np.packbits(vectors > 0, axis=1)


def signs(bits: np.ndarray, dim: int) -> np.ndarray:
    """The inverse of sign_bits up to magnitude: uint8 [n, ceil(d / 8)] -> float32 [n, d] of -1 and 1."""
    return np.unpackbits(bits, axis=1, count=dim).astype(np.float32) * 2 - 1
