"""Small shard sets, made by the real writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distill.shards import Manifest, fingerprint, finish, write_shard

TEACHER = {"model": "tiny", "max_length": 64}
ROWS, BLOCK_ROWS, DIM = 50, 16, 24


def make_texts(num: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"Satz {i}: " + "ä∑\n\tword " * int(rng.integers(0, 9)) for i in range(num)]


def unit_vectors(num: int, dim: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(num, dim)) + 0.3
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def text_hashes(num: int) -> np.ndarray:
    return np.random.default_rng(7).integers(-(2**63), 2**63 - 1, num, dtype=np.int64)


def write_one(directory: Path, index: int, rows: int = ROWS, *, teacher: dict | None = None, dim: int = DIM) -> None:
    write_shard(
        directory,
        index,
        make_texts(rows, index),
        text_hashes(rows) + index,
        unit_vectors(rows, dim, index),
        block_rows=BLOCK_ROWS,
        teacher_fingerprint=fingerprint(teacher or TEACHER),
        text_fingerprint=f"chunk {index}",
    )


def finish_set(directory: Path, num_shards: int) -> Manifest:
    return finish(
        directory,
        teacher=TEACHER,
        teacher_fingerprint=fingerprint(TEACHER),
        text_fingerprint="text",
        text_fingerprints=[f"chunk {index}" for index in range(num_shards)],
        rows=ROWS,
        block_rows=BLOCK_ROWS,
    )


def make_set(directory: Path, shard_rows: tuple[int, ...] = (50, 50, 21)) -> Manifest:
    directory.mkdir(parents=True, exist_ok=True)
    for index, rows in enumerate(shard_rows):
        write_one(directory, index, rows)
    return finish_set(directory, len(shard_rows))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
