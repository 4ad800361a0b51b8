"""The queue: teacher vectors of past global batches as further negatives, first in, first out.

Every rank pushes the same gathered keys in the same global order, once a step, so that the queue's content is a pure function
of the order of samples: before step s it holds the last K rows of batches 0 .. s-1. A checkpoint therefore does not store it;
`training` reads those rows from the shards again, at any world size.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KeyQueue:
    """A ring of at most `capacity` keys, fp16 as stored, with their text hashes. No parameters, no buffers."""

    def __init__(self, capacity: int, dim: int, device: torch.device | str = "cpu") -> None:
        self.capacity = capacity
        self._keys = torch.zeros(capacity, dim, dtype=torch.float16, device=device)
        self._ids = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._pushed = 0

    def __len__(self) -> int:
        return min(self._pushed, self.capacity)

    @torch.no_grad()
    def push(self, keys: Tensor, ids: Tensor) -> None:
        """Appends keys [G, d] and ids [G] in global order; the oldest leave."""
        if self.capacity == 0:
            return
        skipped = max(len(keys) - self.capacity, 0)
        positions = torch.arange(self._pushed + skipped, self._pushed + len(keys), device=self._keys.device) % self.capacity
        self._keys[positions] = keys[skipped:].to(self._keys)
        self._ids[positions] = ids[skipped:].to(self._ids)
        self._pushed += len(keys)

    def restore(self, keys: Tensor, ids: Tensor, pushed: int) -> None:
        """Becomes the queue into which `pushed` keys have gone, the last of them `keys` (oldest first), ring order included."""
        assert len(keys) == min(pushed, self.capacity)
        self._pushed = pushed - len(keys)
        self.push(keys, ids)

    @property
    def keys(self) -> Tensor:
        """[len(self), d] fp16, in ring order."""
        return self._keys[: len(self)]

    @property
    def ids(self) -> Tensor:
        """[len(self)] int64 text hashes of `keys`."""
        return self._ids[: len(self)]
