"""The rows of tasks in which students are compared with each other: triplets, or the texts of the shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from distill.shards import ShardReader


class Rows(Protocol):
    """Numbered rows of V views each. shard_rows: how many lie together on disk."""

    num_views: int

    @property
    def shard_rows(self) -> np.ndarray: ...

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """A length of each row, [n] int64, by which rows are sorted before they are assigned to ranks."""
        ...

    def views(self, rows: np.ndarray) -> list[list[str]]:
        """The texts of the rows: V lists of n, the first of them the anchors."""
        ...


class Triplets:
    """(anchor, positive, hard negative) in memory."""

    num_views = 3

    def __init__(self, triplets: Sequence[tuple[str, ...]]) -> None:
        self.triplets = triplets
        self.shard_rows = np.array([len(triplets)])
        self._lengths = np.array([sum(len(text) for text in triplet) for triplet in triplets])

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return self._lengths[rows]

    def views(self, rows: np.ndarray) -> list[list[str]]:
        return [[self.triplets[row][view] for row in rows] for view in range(self.num_views)]


class TextPairs:
    """Each text of a shard set, twice."""

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
