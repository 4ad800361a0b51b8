"""Precomputed vectors, from any model or API: one for each raw text, in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute as compute
import pyarrow.parquet as parquet

from distill.teacher.teacher_config import TeacherConfig

BLOCK = 4096  # rows normalised at once, in float64


class ImportedVectors:
    """Rows of an .npy file, memory-mapped, or of a list column of a .parquet file. Raises ValueError for anything else."""

    def __init__(self, config: TeacherConfig) -> None:
        assert config.vectors is not None
        self.path = Path(config.vectors)
        if not self.path.is_file():
            raise ValueError(f"teacher.vectors: no file at {self.path}")
        if self.path.suffix == ".npy":
            self._rows = _open_npy(self.path)
        elif self.path.suffix == ".parquet":
            self._rows = _open_parquet(self.path, config.vectors_field)
        else:
            raise ValueError(f"teacher.vectors: {self.path} is neither .npy nor .parquet")
        if self._rows.dtype.kind != "f":
            raise ValueError(
                f"teacher.vectors: {self.path} holds {self._rows.dtype}, not float16, float32 or float64: decode quantised or"
                " packed vectors first"
            )
        if self._rows.ndim != 2:
            raise ValueError(f"teacher.vectors: {self.path} has shape {self._rows.shape}; it must be [texts, dimensions]")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def dim(self) -> int:
        return int(self._rows.shape[1])

    def read(self, texts: list[str], numbers: np.ndarray | None) -> np.ndarray:
        """The L2-normalised fp16 vectors of the raw texts with these row numbers. Raises ValueError naming a zero vector."""
        assert numbers is not None
        blocks = [numbers[start : start + BLOCK] for start in range(0, len(numbers), BLOCK)]
        return np.concatenate([self._unit(block) for block in blocks] or [np.empty((0, self.dim), np.float16)])

    def _unit(self, numbers: np.ndarray) -> np.ndarray:
        vectors = np.asarray(self._rows[numbers], dtype=np.float64)
        largest = np.abs(vectors).max(axis=1, initial=0, keepdims=True)
        bad = np.flatnonzero(~np.isfinite(largest) | (largest == 0))
        if len(bad):
            raise ValueError(f"teacher.vectors: row {numbers[bad[0]]} of {self.path} is zero or not finite")
        vectors /= largest  # the squares of very large and very small float64 are not finite or zero
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)

    def encode(self, read: np.ndarray, tick: Callable[[int], object] = lambda rows: None) -> np.ndarray:
        tick(len(read))
        return read


def _open_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"teacher.vectors: {path} is not a plain .npy array: {error}") from None


def _open_parquet(path: Path, field: str) -> np.ndarray:
    try:
        schema = parquet.read_schema(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"teacher.vectors: {path} is not a readable parquet file: {error}") from None
    if field not in schema.names:
        raise ValueError(
            f"teacher.vectors: {path} has no column {field}; it has {', '.join(schema.names)}: set teacher.vectors_field"
        )
    kind = schema.field(field).type
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind)
    if not is_list or not pyarrow.types.is_floating(kind.value_type):
        raise ValueError(f"teacher.vectors: column {field} of {path} holds {kind}, not lists of floats")
    column = parquet.read_table(path, columns=[field], memory_map=True).column(field)
    lengths = compute.unique(compute.list_value_length(column)).to_pylist()
    if len(lengths) != 1 or not lengths[0]:
        raise ValueError(
            f"teacher.vectors: the vectors in {field} of {path} differ in length, are empty or null: {lengths[:5]}"
        )
    # chunk by chunk: a chunk's offsets are int32, and all chunks together may hold more than 2^31 numbers
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, lengths[0]) for chunk in column.chunks]
    return np.concatenate(chunks)
