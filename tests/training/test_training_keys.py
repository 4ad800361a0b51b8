"""The keys of a step, where the queue is sharded, are those of a queue that every rank holds."""

from __future__ import annotations

import pytest
import torch
from distributed_ranks import on_ranks
from torch.nn.functional import normalize

from distill.objectives.queue import KeyQueue
from distill.run.collectives import rank, world_size
from distill.training.batches import MicroBatch
from distill.training.keys import Keys

ROWS, WIDTH, TILE = 7, 5, 3


def negatives_of_my_rows(num_queued, same_meaning):
    """Of this rank's rows, from a sharded queue and from a replicated one."""
    draw = torch.Generator().manual_seed(1)
    keys = normalize(torch.randn(ROWS + num_queued, WIDTH, generator=draw), dim=-1).half()
    queries = normalize(torch.randn(ROWS, WIDTH, generator=draw), dim=-1)
    hashes = torch.randint(6, (ROWS + num_queued,), generator=draw)
    mine = torch.arange(rank(), ROWS, world_size())
    micro = MicroBatch([], mine, keys[mine], hashes[mine], most_rows=-(-ROWS // world_size()))
    found = []
    for part in ({"rank": rank(), "world_size": world_size()}, {}):
        queue = KeyQueue(8, WIDTH, **part)
        queue.push(keys[ROWS:], hashes[ROWS:])
        step = Keys(keys[:ROWS], hashes[:ROWS], queue, sharded=bool(part))
        found.append(step.negatives(queries[mine], micro, tile=TILE, same_meaning=same_meaning))
    return found


@pytest.mark.parametrize("num_queued", [0, 1, 8])
@pytest.mark.parametrize("same_meaning", [None, 0.5])
def test_negatives_are_those_of_all_keys_where_the_queue_is_sharded(num_queued, same_meaning):
    for sharded, replicated in on_ranks(2, negatives_of_my_rows, num_queued, same_meaning):
        for values, expected in zip(sharded, replicated, strict=True):
            torch.testing.assert_close(values, expected)
