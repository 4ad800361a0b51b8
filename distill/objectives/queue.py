"""The queue: teacher vectors of past global batches as further negatives, first in, first out.

Every rank pushes the same gathered keys in the same global order, once a step, so that the queue's content is a pure function
of the order of samples: before step s it holds the last K rows of batches 0 .. s-1. A checkpoint therefore does not store it;
`training` reads those rows from the shards again, at any world size.

    ring position of the n-th key ever pushed    n mod K
    rank that holds it, where it is sharded      (n mod K) mod W
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class KeyQueue:
    """A rank's part of a ring of `capacity` keys, fp16 as stored, with their text hashes. No parameters, no buffers.

    With world_size 1 it is the whole ring; else every world_size-th position of it, from `rank` on.
    """

    def __init__(
        self, capacity: int, dim: int, device: torch.device | str = "cpu", *, rank: int = 0, world_size: int = 1
    ) -> None:
        self.capacity = capacity
        self._rank, self._world_size = rank, world_size
        slots = len(range(rank, capacity, world_size))
        self._keys = torch.zeros(slots, dim, dtype=torch.float16, device=device)
        self._ids = torch.zeros(slots, dtype=torch.int64, device=device)
        self._pushed = 0

    def __len__(self) -> int:
        """The keys that this rank holds."""
        return len(range(self._rank, min(self._pushed, self.capacity), self._world_size))

    @torch.no_grad()
    def push(self, keys: Tensor, ids: Tensor) -> None:
        """Appends keys [G, d] and ids [G] in global order; the oldest leave. A rank keeps what falls to its part."""
        kept = torch.from_numpy(self._kept(len(keys))).to(self._keys.device)
        slots = ((kept + self._pushed) % max(self.capacity, 1)) // self._world_size
        self._keys[slots] = keys[kept].to(self._keys)
        self._ids[slots] = ids[kept].to(self._ids)
        self._pushed += len(keys)

    def rows_after(self, pushed: int) -> np.ndarray:
        """Which of the first `pushed` keys this rank holds once they are all pushed: their numbers, int64, ascending."""
        return self._kept(pushed, first=0)

    def restore(self, keys: Tensor, ids: Tensor, pushed: int) -> None:
        """Becomes the queue into which `pushed` keys have gone: keys and ids are those of `rows_after(pushed)`."""
        self._pushed = pushed
        slots = torch.from_numpy(self.rows_after(pushed)) % max(self.capacity, 1) // self._world_size
        self._keys[slots.to(self._keys.device)] = keys.to(self._keys)
        self._ids[slots.to(self._keys.device)] = ids.to(self._ids)

    def _kept(self, count: int, first: int | None = None) -> np.ndarray:
        """Indices into `count` consecutive keys of those that this rank holds once all of them are pushed.

        first: how many keys were pushed before them; by default, all that have been pushed so far.
        """
        first = self._pushed if first is None else first
        indices = np.arange(max(count - self.capacity, 0), count)
        return indices[(indices + first) % max(self.capacity, 1) % self._world_size == self._rank]

    @property
    def keys(self) -> Tensor:
        """[len(self), d] fp16, in ring order."""
        return self._keys[: len(self)]

    @property
    def ids(self) -> Tensor:
        """[len(self)] int64 text hashes of `keys`."""
        return self._ids[: len(self)]

    @property
    def num_bytes(self) -> int:
        """What this rank's part takes."""
        return self._keys.nbytes + self._ids.nbytes
