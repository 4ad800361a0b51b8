"""The shards are verified before the first step: each once on a node, whatever the number of its ranks."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from cells import write_set
from conftest import sentences
from distributed_ranks import on_ranks

from distill.run.collectives import FailedElsewhere, rank
from distill.run.stopping import Stopped
from distill.shards import ShardError, reader
from distill.training import shard_verification
from distill.training.shard_verification import open_verified

CPU = torch.device("cpu")


@pytest.fixture
def shards(tmp_path) -> Path:
    (tmp_path / "set").mkdir()
    return write_set(tmp_path / "set", sentences(500), 24)


def read_all(shards: Path, machines: list[str]) -> tuple[list[int], int]:
    """The shards that this rank has hashed, and the rows it has read."""
    hashed: list[int] = []
    check = reader.check_shard
    reader.check_shard = lambda data, path, number, manifest: hashed.append(number) or check(data, path, number, manifest)
    shard_verification.machine = lambda process: machines[rank()]
    opened = open_verified(shards, CPU)
    return hashed, len(opened.vectors(np.arange(len(opened))))


@pytest.mark.parametrize("machines", [["a"], ["a", "a"], ["a", "b"], ["b", "a", "b"]])
def test_each_shard_is_hashed_once_on_every_node(shards, machines):
    found = on_ranks(len(machines), read_all, shards, machines)
    for machine in machines:
        ours = [hashed for (hashed, _), name in zip(found, machines, strict=True) if name == machine]
        assert sorted(chain.from_iterable(ours)) == [0, 1, 2, 3, 4]
    assert {rows for _, rows in found} == {500}


def read_damaged(shards: Path) -> str:
    with pytest.raises((ShardError, FailedElsewhere)) as raised:
        open_verified(shards, CPU)
    return f"{raised.type.__name__}: {raised.value}"


def test_a_damaged_shard_ends_all_ranks_and_the_one_that_has_read_it_names_it(shards):
    path = shards / "000003.tar"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    first, second = on_ranks(2, read_damaged, shards)
    assert first.startswith("FailedElsewhere") and second.startswith("ShardError") and "000003.tar" in second


def test_a_requested_stop_is_checked_between_two_shards(shards):
    requested = iter([False, False, True])

    def check_stop() -> None:
        if next(requested):
            raise Stopped

    with pytest.raises(Stopped):
        open_verified(shards, CPU, check_stop)
    assert next(requested, None) is None
