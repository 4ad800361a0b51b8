"""Products of settings under which a stage must give the same, few cells that meet every pair of them, and a shard set."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from distributed_ranks import on_ranks
from shards.shard_sets import TEACHER, unit_vectors

from distill.corpus import text_hash
from distill.shards import fingerprint, finish, write_shard

C = TypeVar("C")
Trained = tuple[Sequence[float], Sequence[dict[str, np.ndarray]]]
"""The losses of some steps, and the parameters after each."""


def every_pair(cells: Sequence[C]) -> list[C]:
    """Few of the cells, dataclasses, in which every two settings of different kinds meet at least once."""

    def pairs(cell: Any) -> set[tuple[Any, ...]]:
        values = [(field.name, getattr(cell, field.name)) for field in fields(cell)]
        return set(itertools.combinations(values, 2))

    missing = set().union(*map(pairs, cells))
    chosen = []
    while missing:
        best = max(cells, key=lambda cell: len(pairs(cell) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


def results_of(
    cells: Sequence[C], world_size: int, run: Callable[..., list[Any]], *arguments: Any, backend: str = "gloo"
) -> Iterator[tuple[C, Any]]:
    """Each cell with the result of every rank in turn: of `run(cells, *arguments)`, for as many as a launch has time for."""
    for start in range(0, len(cells), 48):
        some = cells[start : start + 48]
        for results in on_ranks(world_size, run, some, *arguments, backend=backend):
            yield from zip(some, results, strict=True)


def errors_within_rounding(cell: Any, found: Trained, expected: Trained, start: dict[str, np.ndarray]) -> tuple[float, float]:
    """The largest relative error of a loss, and that of a parameter relative to its largest change since `start` so far."""
    worst_loss = np.abs(np.array(found[0]) / expected[0] - 1).max()
    assert worst_loss < 2e-6, (cell, found[0], expected[0])
    worst_update = 0.0
    for state, wanted in zip(found[1], expected[1], strict=True):
        assert state.keys() == wanted.keys()
        for name, values in wanted.items():
            update = max(np.abs(values - start[name]).max(), 0.01)
            error = np.abs(state[name] - values).max()
            assert error <= 1e-4 * update, (cell, name, error, update)
            worst_update = max(worst_update, error / update)
    return worst_loss, worst_update


def write_set(folder: Path, texts: list[str], dim: int, teacher: dict[str, Any] = TEACHER) -> Path:
    """A shard set of 100 rows a shard with random unit vectors [len(texts), dim], said to be this teacher's."""
    hashes = np.array([text_hash(text) for text in texts], dtype=np.int64)
    vectors = unit_vectors(len(texts), dim)
    chunks = range(len(texts) // 100)
    for index in chunks:
        rows = slice(index * 100, (index + 1) * 100)
        write_shard(
            folder,
            index,
            texts[rows],
            hashes[rows],
            vectors[rows],
            block_rows=32,
            teacher_fingerprint=fingerprint(teacher),
            text_fingerprint=f"chunk {index}",
        )
    finish(
        folder,
        teacher=teacher,
        teacher_fingerprint=fingerprint(teacher),
        text_fingerprint="text",
        text_fingerprints=[f"chunk {index}" for index in chunks],
        rows=100,
        block_rows=32,
    )
    return folder
