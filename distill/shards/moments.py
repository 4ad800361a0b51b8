"""Count, mean and covariance of vectors, in float64, merged by addition; and their PCA."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.run.files import publish

Float64 = NDArray[np.float64]
CHUNK_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Moments:
    """count n, total = sum of x [d], outer = sum of x x^T [d, d]; `source` is the sha256 of the tar they are of, or ""."""

    count: int
    total: Float64
    outer: Float64
    source: str = ""

    @classmethod
    def of(cls, *blocks: NDArray[np.floating], source: str = "") -> Moments:
        """Of all rows of the blocks [n, d] together; memory is that of one chunk and of d x d."""
        dim = blocks[0].shape[1]
        total, outer = np.zeros(dim), np.zeros((dim, dim))
        for block in blocks:
            for start in range(0, len(block), CHUNK_ROWS):
                chunk = block[start : start + CHUNK_ROWS].astype(np.float64)
                total += chunk.sum(axis=0)
                outer += chunk.T @ chunk
        return cls(sum(map(len, blocks)), total, outer, source)

    @classmethod
    def merge(cls, parts: Iterable[Moments]) -> Moments:
        """Of all parts together, added in the given order, one in memory at a time; they must have one width."""
        count, total, outer = 0, np.zeros(0), np.zeros((0, 0))
        for part in parts:
            if count == 0:
                total, outer = np.zeros(part.dim), np.zeros((part.dim, part.dim))
            if part.dim != len(total):
                raise ValueError(f"moments of widths {len(total)} and {part.dim} cannot be merged")
            count += part.count
            total += part.total
            outer += part.outer
        return cls(count, total, outer)

    @property
    def dim(self) -> int:
        return len(self.total)

    @property
    def mean(self) -> Float64:
        return self.total / self.count

    @property
    def covariance(self) -> Float64:
        """Centred, divided by n: [d, d]."""
        return self.outer / self.count - np.outer(self.mean, self.mean)

    def pca(self, dim: int) -> tuple[Float64, Float64]:
        """The `dim` leading components [dim, d] and eigenvalues [dim] of the covariance, largest first.

        The entry of largest magnitude in each component is positive, so that the sign is the same on every machine.
        """
        if not 0 < dim <= self.dim:
            raise ValueError(f"a PCA of {self.dim}-dimensional vectors has 1 to {self.dim} components, not {dim}")
        eigenvalues, vectors = np.linalg.eigh(self.covariance)
        components = vectors.T[::-1][:dim]
        peaks = components[np.arange(dim), np.abs(components).argmax(axis=1)]
        return components * np.sign(peaks)[:, None], eigenvalues[::-1][:dim].copy()

    def save(self, path: Path) -> None:
        """An .npz that holds the upper triangle of `outer` alone; the same moments give the same bytes."""
        upper = np.concatenate([self.outer[row, row:] for row in range(self.dim)])
        with publish(path) as file:
            np.savez(
                file,
                allow_pickle=False,
                count=np.int64(self.count),
                total=self.total,
                upper=upper,
                source=np.bytes_(self.source),
            )

    @classmethod
    def load(cls, path: Path) -> Moments:
        """Raises ValueError naming the file if it is not what `save` writes."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                count, total, upper, source = (arrays[key] for key in ("count", "total", "upper", "source"))
            if count.dtype != np.int64 or total.dtype != np.float64 or upper.dtype != np.float64 or total.ndim != 1:
                raise ValueError("its arrays have the wrong types")
            if upper.shape != (len(total) * (len(total) + 1) // 2,):
                raise ValueError("its arrays do not fit together")
            return cls(int(count), total, _symmetric(upper, len(total)), bytes(source.item()).decode("ascii"))
        except FileNotFoundError:
            raise
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            EOFError,
            AttributeError,
            NotImplementedError,
            zipfile.BadZipFile,
        ) as error:
            raise ValueError(f"{path}: no moments can be read from it: {error}") from None


def _symmetric(upper: Float64, dim: int) -> Float64:
    full = np.empty((dim, dim))
    start = 0
    for row in range(dim):
        stop = start + dim - row
        full[row, row:] = full[row:, row] = upper[start:stop]
        start = stop
    return full
