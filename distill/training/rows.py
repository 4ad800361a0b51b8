"""The rows of the stages in which students are held against each other: triplets, or the sentences of the shards."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from distill.config import RunConfig
from distill.corpus import read_dataset, read_rows
from distill.shards import ShardReader
from distill.training.distributed import barrier, rank
from distill.training.mining import mine_triplets


class Rows(Protocol):
    """Numbered rows of V views each. shard_rows: how many lie together on disk."""

    num_views: int

    @property
    def shard_rows(self) -> np.ndarray: ...

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """A length of each row, [n] int64, by which rows are dealt."""
        ...

    def views(self, rows: np.ndarray) -> list[list[str]]:
        """The sentences of the rows: V lists of n, the first of them the anchors."""
        ...


class Triplets:
    """(anchor, positive, hard negative) in memory."""

    num_views = 3

    def __init__(self, sentences: Sequence[tuple[str, ...]]) -> None:
        self.sentences = sentences
        self.shard_rows = np.array([len(sentences)])
        self._lengths = np.array([sum(len(sentence) for sentence in triplet) for triplet in sentences])

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return self._lengths[rows]

    def views(self, rows: np.ndarray) -> list[list[str]]:
        return [[self.sentences[row][view] for row in rows] for view in range(self.num_views)]


class Sentences:
    """Each sentence of a shard set, twice."""

    num_views = 2

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader

    @property
    def shard_rows(self) -> np.ndarray:
        return self.reader.shard_rows

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return self.reader.lengths(rows)

    def views(self, rows: np.ndarray) -> list[list[str]]:
        return [self.reader.texts(rows)] * self.num_views


def load_triplets(config: RunConfig, reader: ShardReader, directory: Path) -> Triplets:
    """Triplets from the file or dataset that the config names, else mined from the shards (once, by rank 0)."""
    finetune = config.finetune
    if finetune.triplets or finetune.dataset:
        if finetune.triplets:
            found = read_rows(finetune.triplets, finetune.fields)
        else:
            found = read_dataset(str(finetune.dataset), finetune.fields, finetune.split, finetune.subset)
        return Triplets(list(islice(found, finetune.limit)))
    path = directory / "triplets.npy"
    if rank() == 0 and not path.exists():
        mine_triplets(reader, finetune, config.seed, path)
    barrier()
    rows = np.load(path, allow_pickle=False)
    columns = [reader.texts(rows[:, column]) for column in range(Triplets.num_views)]
    return Triplets(list(zip(*columns, strict=True)))
