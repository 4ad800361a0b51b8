"""Verification of the shards before the first step: each once on every node, by the ranks of the node in turn."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from distill.run.collectives import FailedElsewhere, any_rank, gather, rank
from distill.run.liveness import machine, this_process
from distill.run.stopping import CheckStop, never
from distill.shards import ShardError, ShardReader


def open_verified(directory: Path, device: torch.device, check_stop: CheckStop = never) -> ShardReader:
    """A reader of shards whose sha256 were verified just now; a collective.

    Raises ShardError naming a damaged shard on the rank that has found it, FailedElsewhere on the others.
    """
    reader = ShardReader(directory)
    machines = gather(torch.tensor([int(machine(this_process()), 16)], device=device)).flatten().tolist()
    ranks = [number for number, each in enumerate(machines) if each == machines[rank()]]
    first, num_shards, fewest = ranks.index(rank()), len(reader.shard_rows), min(map(machines.count, machines))
    error: ShardError | None = None
    with tqdm(total=num_shards, desc="verify shards", unit="shard", disable=None if rank() == 0 else True) as bar:
        for turn in range(-(-num_shards // fewest)):
            if (number := turn * len(ranks) + first) < num_shards:
                try:
                    reader.verify(number)
                except ShardError as found:
                    error = found
            if any_rank(error is not None):  # after each shard, so that no rank waits longer than for one
                raise error or FailedElsewhere(f"{directory}: another rank found a damaged shard")
            check_stop()
            bar.update(min(fewest, num_shards - bar.n))
    return ShardReader(directory, verify=False)
