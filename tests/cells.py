"""Products of settings under which a stage must give the same, few cells that meet every pair of them, and a shard set."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from shards.shard_sets import TEACHER, unit_vectors

from distill.corpus import text_hash
from distill.shards import fingerprint, finish, write_shard

C = TypeVar("C")


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


def launches(cells: Sequence[C], most: int = 48) -> list[Sequence[C]]:
    """The cells in parts that one launch of ranks has time for."""
    return [cells[start : start + most] for start in range(0, len(cells), most)]


def write_set(folder: Path, texts: list[str], dim: int) -> Path:
    """A shard set of 100 rows a shard with random unit vectors [len(texts), dim]."""
    hashes = np.array([text_hash(text) for text in texts], dtype=np.int64)
    vectors = unit_vectors(len(texts), dim)
    pieces = range(len(texts) // 100)
    for index in pieces:
        rows = slice(index * 100, (index + 1) * 100)
        write_shard(
            folder,
            index,
            texts[rows],
            hashes[rows],
            vectors[rows],
            block_rows=32,
            teacher_fingerprint=fingerprint(TEACHER),
            text_fingerprint=f"piece {index}",
        )
    finish(
        folder,
        teacher=TEACHER,
        teacher_fingerprint=fingerprint(TEACHER),
        text_fingerprint="text",
        text_fingerprints=[f"piece {index}" for index in pieces],
        rows=100,
        block_rows=32,
    )
    return folder
