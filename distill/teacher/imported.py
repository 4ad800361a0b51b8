"""Precomputed vectors, from any model or API: one for each raw text, in order, in one file or in several one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute as compute
import pyarrow.parquet as parquet
import torch
from safetensors import SafetensorError, safe_open

from distill.corpus import TextChunk
from distill.corpus.sources import glob_files
from distill.teacher.teacher_config import TeacherConfig

BLOCK = 4096  # rows normalised at once, in float64
MAX_OPEN = 16  # files
MAX_SHOWN = 4  # names of files in a message
FLOATS = ("float16", "float32", "float64")
ADVICE = "quantised or binary codes are no vectors: give the float vectors that they were made from"


class VectorFile(NamedTuple):
    """Vectors on disk. read: those of ascending row numbers, [n, dim] in float16, float32 or float64."""

    rows: int
    dim: int
    read: Callable[[np.ndarray], np.ndarray]


class ImportedVectors:
    """Rows of .npy, .safetensors and .parquet files, which are never in memory as a whole. Raises ValueError for anything
    else, and for files of different widths."""

    def __init__(self, config: TeacherConfig) -> None:
        self.paths = vector_files(config)
        self._open = lru_cache(MAX_OPEN)(partial(_open, field=config.vectors_field))  # there may be more than can be open
        files = [(path, self._open(path)) for path in self.paths]
        self.counts = [file.rows for _, file in files]
        self._ends = np.cumsum(self.counts)
        first, width = self.paths[0], files[0][1].dim
        for path, file in files:
            if file.dim != width:
                raise ValueError(
                    f"teacher.vectors: {path} has {file.dim} dimensions, and {first} {width}: give those of one model"
                )
        if config.dimensions is not None and config.dimensions > width:
            raise ValueError(
                f"teacher.dimensions {config.dimensions} is above the {width} dimensions of {first}; lower it, or leave it out"
            )
        self.dim = config.dimensions or width

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __str__(self) -> str:
        """The files, with the rows of each where there are several."""
        shown = [f"{path} ({count:,})" for path, count in zip(self.paths, self.counts, strict=True)]
        more = f" and {len(shown) - MAX_SHOWN} more" if len(shown) > MAX_SHOWN else ""
        return self.paths[0] if len(shown) == 1 else ", ".join(shown[:MAX_SHOWN]) + more

    def read(self, chunk: TextChunk) -> np.ndarray:
        """The L2-normalised fp16 vectors of a chunk's raw row numbers. Raises ValueError naming a zero vector."""
        numbers = chunk.rows
        assert numbers is not None
        vectors = np.empty((len(numbers), self.dim), np.float16)
        order = np.argsort(numbers, kind="stable")  # a .parquet file is read forwards
        for start in range(0, len(order), BLOCK):
            places = order[start : start + BLOCK]
            ends = np.searchsorted(numbers[places], self._ends)
            for path, count, end, its in zip(self.paths, self.counts, self._ends, np.split(places, ends[:-1]), strict=True):
                if len(its):
                    vectors[its] = self._unit(path, numbers[its] - (end - count))
        return vectors

    def _unit(self, path: str, numbers: np.ndarray) -> np.ndarray:
        vectors = self._open(path).read(numbers)[:, : self.dim].astype(np.float64)
        largest = np.abs(vectors).max(axis=1, initial=0, keepdims=True)
        bad = np.flatnonzero(~np.isfinite(largest) | (largest == 0))
        if len(bad):
            raise ValueError(f"teacher.vectors: row {numbers[bad[0]]} of {path} is zero or not finite")
        vectors /= largest  # the squares of very large and very small float64 are not finite or zero
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)

    def encode(self, read: np.ndarray, tick: Callable[[int], object] = lambda rows: None) -> np.ndarray:
        tick(len(read))
        return read


def vector_files(config: TeacherConfig) -> list[str]:
    """The files of `vectors` in their order: a path as it is given, the sorted files of a glob, or one that matches none."""
    return [path for pattern in config.vector_paths for path in _matching(pattern)]


def _matching(pattern: str) -> list[str]:
    return [pattern] if Path(pattern).is_file() else list(map(str, glob_files(pattern))) or [pattern]


def _open(path: str, field: str) -> VectorFile:
    """Raises ValueError for a file that does not hold float vectors."""
    openers = {".npy": _open_npy, ".safetensors": _open_safetensors, ".parquet": _ParquetVectors.open}
    place = Path(path)
    if place.is_dir():
        raise ValueError(f"teacher.vectors: {path} is a folder; add a glob such as /*.npy")
    if not place.is_file():
        raise ValueError(f"teacher.vectors: no file at {path}, and as a glob it matches none (relative to {Path.cwd()})")
    if place.suffix not in openers:
        raise ValueError(f"teacher.vectors: {path} is neither .npy nor .safetensors nor .parquet")
    opened = openers[place.suffix](path, field)
    if opened.rows == 0:
        raise ValueError(f"teacher.vectors: {path} has no rows; leave it out")
    return opened


def _check(path: str, dtype: str, is_float: bool, shape: tuple[int, ...]) -> None:
    """Raises ValueError for an array that is not one of float vectors."""
    if not is_float:
        raise ValueError(f"teacher.vectors: {path} holds {dtype}, not float16, bfloat16, float32 or float64; {ADVICE}")
    if len(shape) != 2 or not shape[1]:
        raise ValueError(f"teacher.vectors: {path} has shape {shape}; it must be [texts, dimensions]")


def _open_npy(path: str, field: str) -> VectorFile:
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"teacher.vectors: {path} is not a plain .npy array: {error}") from None
    _check(path, str(rows.dtype), rows.dtype.name in FLOATS, rows.shape)
    return VectorFile(len(rows), rows.shape[1], lambda numbers: rows[numbers])


def _open_safetensors(path: str, field: str) -> VectorFile:
    try:
        file = safe_open(path, "pt")  # numpy has no bfloat16
    except (OSError, SafetensorError) as error:
        raise ValueError(f"teacher.vectors: {path} is not a readable .safetensors file: {error}") from None
    names = sorted(file.keys())
    if field not in names and len(names) != 1:
        has = f"the tensors {', '.join(names[:MAX_SHOWN])}" if names else "no tensor"
        raise ValueError(f"teacher.vectors: {path} has {has}, and none is called {field}: set teacher.vectors_field")
    rows = file.get_slice(field if field in names else names[0])
    shape = tuple(rows.get_shape())
    _check(path, rows.get_dtype(), rows.get_dtype() in ("F16", "BF16", "F32", "F64"), shape)

    def read(numbers: np.ndarray) -> np.ndarray:
        vectors: torch.Tensor = rows[torch.from_numpy(numbers)]
        return (vectors.float() if vectors.dtype == torch.bfloat16 else vectors).numpy()

    return VectorFile(shape[0], shape[1], read)


class _ParquetVectors:
    """A list column of a .parquet file, read forwards in batches: a row group may hold the whole file."""

    def __init__(self, path: str, field: str) -> None:
        self.path, self.field = path, field
        try:
            self._file = parquet.ParquetFile(path, memory_map=True)
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"teacher.vectors: {path} is not a readable parquet file: {error}") from None
        self._check_column()
        about: Any = self._file.metadata
        groups = [about.row_group(number) for number in range(about.num_row_groups)]
        self._groups = np.cumsum([0, *(group.num_rows for group in groups)])
        self.rows, self.dim = about.num_rows, 0
        self._rewind(0)
        if not self.rows:
            return
        self._seek(0)
        column = next(n for n in range(about.num_columns) if about.schema.column(n).path.startswith(f"{field}."))
        for start, group in zip(self._groups, groups, strict=False):
            if group.column(column).num_values != group.num_rows * self.dim:
                for number in range(start, start + group.num_rows, BLOCK):
                    self._seek(number)  # names the row

    @classmethod
    def open(cls, path: str, field: str) -> VectorFile:
        vectors = cls(path, field)
        return VectorFile(vectors.rows, vectors.dim, vectors.read)

    def _check_column(self) -> None:
        schema = self._file.schema_arrow
        if self.field not in schema.names:
            has = f"it has {', '.join(schema.names)}: set teacher.vectors_field"
            raise ValueError(f"teacher.vectors: {self.path} has no column {self.field}; {has}")
        kind, types = schema.field(self.field).type, pyarrow.types
        is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        if not is_list or not types.is_floating(kind.value_type):
            raise ValueError(f"teacher.vectors: column {self.field} of {self.path} holds {kind}, not lists of floats; {ADVICE}")

    def read(self, numbers: np.ndarray) -> np.ndarray:
        parts = []
        done = 0
        while done < len(numbers):
            self._seek(int(numbers[done]))
            end = int(np.searchsorted(numbers, self._start + len(self._batch)))
            parts.append(self._batch[numbers[done:end] - self._start])
            done = end
        return np.concatenate(parts)

    def _rewind(self, group: int) -> None:
        groups = range(group, len(self._groups) - 1)
        self._batches: Iterator[Any] = self._file.iter_batches(BLOCK, row_groups=groups, columns=[self.field])
        self._start, self._batch = int(self._groups[group]), np.empty((0, self.dim), np.float32)

    def _seek(self, number: int) -> None:
        """Makes the batch that holds row `number` the current one."""
        group = int(np.searchsorted(self._groups, number, side="right")) - 1
        if number < self._start or self._groups[group] > self._start + len(self._batch):
            self._rewind(group)
        while number >= self._start + len(self._batch):
            self._start += len(self._batch)
            try:
                batch = next(self._batches)
            except (OSError, pyarrow.ArrowException) as error:
                raise ValueError(f"teacher.vectors: {self.path} is damaged behind row {self._start}: {error}") from None
            self._batch = self._vectors(batch.column(0))

    def _vectors(self, column: Any) -> np.ndarray:
        lengths = compute.fill_null(compute.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        self.dim = self.dim or int(lengths[0])
        bad = np.flatnonzero((lengths != self.dim) | (lengths == 0))
        if len(bad):
            raise ValueError(
                f"teacher.vectors: the vectors in {self.field} of {self.path} differ in length, are empty or null: row"
                f" {self._start + bad[0]} has {lengths[bad[0]]} numbers, the first {self.dim}"
            )
        numbers: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
        return numbers.reshape(-1, self.dim)
