"""Random queries and keys with text hashes and masks, for the tests of losses over keys."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

BATCH, QUEUE, WIDTH = 37, 101, 24


def problem(dtype, *, queue: bool, ids: bool, masked: bool, scale: float = 3.0):
    draw = torch.Generator().manual_seed(1)
    num_keys = BATCH + QUEUE * queue
    queries = normalize(torch.randn(BATCH, WIDTH, generator=draw, dtype=torch.float64), dim=1)
    keys = normalize(torch.randn(num_keys, WIDTH, generator=draw, dtype=torch.float64), dim=1)
    positives = torch.randperm(BATCH, generator=draw)
    key_ids = torch.randint(-5, 40, (num_keys,), generator=draw) if ids else None
    query_ids = key_ids[positives] if key_ids is not None else None
    mask = torch.rand(BATCH, num_keys, generator=draw) < 0.3 if masked else None
    return (queries.to(dtype), keys.to(dtype), positives, torch.tensor([scale], dtype=dtype), query_ids, key_ids, mask)
