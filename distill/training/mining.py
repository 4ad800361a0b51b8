"""Triplets where a user has no labels: the teacher's near neighbours as positives, mid-rank ones as hard negatives."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from distill.run.sampling import permutation
from distill.shards import ShardReader
from distill.training.recorded_array import save_array

ANCHORS_PER_BLOCK = 1024


class MiningOptions(Protocol):
    """The fields of the section finetune that mining reads."""

    @property
    def num_mined(self) -> int: ...

    @property
    def mining_pool(self) -> int: ...

    @property
    def positive_range(self) -> tuple[float, float]: ...

    @property
    def negative_rank(self) -> int: ...

    @property
    def global_batch(self) -> int: ...


def mine_triplets(reader: ShardReader, config: MiningOptions, seed: int, path: Path) -> int:
    """Writes rows of the shard set, int64 [n, 3] (anchor, positive, hard negative), to `path`; returns n.

    Among `mining_pool` random texts, an anchor's positive is its nearest neighbour by teacher cosine, if that lies in
    `positive_range`; its hard negative is the neighbour of rank `negative_rank`. Raises ValueError if fewer than one global
    batch is found.
    """
    pool = permutation(len(reader), seed, 0)[: config.mining_pool]
    if len(pool) <= config.negative_rank + 1:
        raise ValueError(f"finetune.negative_rank {config.negative_rank} needs more than {len(pool)} texts to mine from")
    vectors = torch.from_numpy(reader.vectors(pool)).float()
    low, high = config.positive_range
    found: list[np.ndarray] = []
    num_found = 0
    for start in range(0, len(pool), ANCHORS_PER_BLOCK):
        anchors = torch.arange(start, min(start + ANCHORS_PER_BLOCK, len(pool)))
        cosines = vectors[anchors] @ vectors.T
        cosines[torch.arange(len(anchors)), anchors] = -torch.inf
        nearest = cosines.topk(config.negative_rank, dim=1)
        good = ((nearest.values[:, 0] >= low) & (nearest.values[:, 0] <= high)).numpy()
        rows = torch.stack([anchors, nearest.indices[:, 0], nearest.indices[:, -1]], dim=1).numpy()[good]
        found.append(pool[rows])
        num_found += len(rows)
        if num_found >= config.num_mined:
            break
    triplets = np.concatenate(found)[: config.num_mined]
    if len(triplets) < config.global_batch:
        raise ValueError(
            f"mining found {len(triplets)} triplets with a positive of cosine {low} to {high}, less than one global batch of"
            f" {config.global_batch}: widen finetune.positive_range or lower finetune.global_batch"
        )
    save_array(path, triplets)
    return len(triplets)
