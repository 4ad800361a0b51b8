"""What the ranks of a sharded teacher share: the shards that rank 0 has claimed, and the wait for others' claims."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import torch
from distributed_ranks import on_ranks

from distill.teacher import claims as claims_module
from distill.teacher.claims import Claims, claim_of
from distill.teacher.encode_missing import ShardSet, _claimed_by_rank_0

WAIT, TIMEOUT = 9.0, 5  # seconds until a claim of another machine is void, and of a collective


def claim_all(folder: Path) -> list[int]:
    claims_module.TIMEOUT = WAIT
    torch.distributed.distributed_c10d.default_pg_timeout = timedelta(seconds=TIMEOUT)
    with Claims() as claims:
        return [number for _, number, _ in _claimed_by_rank_0(claims, [ShardSet(folder, [{}, {}, {}])])]


def test_ranks_wait_longer_for_rank_0_than_for_a_collective(tmp_path):
    """Another machine's task has claimed a shard and does not change its claim any more."""
    elsewhere = {"host": "far", "boot": "b", "pids": 1, "pid": 1, "started": "1", "beat": 1}
    claim_of(tmp_path, 1).write_text(json.dumps(elsewhere))
    assert on_ranks(2, claim_all, tmp_path) == [[0, 2, 1], [0, 2, 1]]
