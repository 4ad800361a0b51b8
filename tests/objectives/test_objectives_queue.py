"""The queue is first in, first out, whatever the sizes of what is pushed and the number of ranks that hold it."""

from __future__ import annotations

import pytest
import torch

from distill.objectives.queue import KeyQueue


def rows_of(numbers):
    return numbers.to(torch.float16)[:, None].expand(-1, 4), numbers * 10


@pytest.mark.parametrize("capacity", [1, 7, 16, 100])
@pytest.mark.parametrize("pushed", [(3, 3, 3, 3), (5, 1, 16), (40,), ()])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_it_holds_the_last_rows_pushed_each_on_one_rank(capacity, pushed, world_size):
    parts = [KeyQueue(capacity, dim=4, rank=rank, world_size=world_size) for rank in range(world_size)]
    numbers = torch.arange(sum(pushed))
    for part in parts:
        for chosen in numbers.split(pushed) if pushed else ():
            part.push(*rows_of(chosen))
        assert (part.keys[:, 0] * 10 == part.ids).all()
    expected = numbers[-capacity:] if len(numbers) else numbers
    assert sorted(n for part in parts for n in part.keys[:, 0].tolist()) == expected.tolist()
    lengths = [len(part) for part in parts]
    assert sum(lengths) == len(expected) and max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("capacity", [1, 7, 16])
@pytest.mark.parametrize("pushed", [0, 5, 16, 23])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_restored_queue_continues_as_the_one_that_was_pushed(capacity, pushed, world_size):
    for rank in range(world_size):
        straight = KeyQueue(capacity, dim=4, rank=rank, world_size=world_size)
        straight.push(*rows_of(torch.arange(pushed)))
        restored = KeyQueue(capacity, dim=4, rank=rank, world_size=world_size)
        restored.restore(*rows_of(torch.from_numpy(restored.rows_after(pushed))), pushed)
        for queue in (straight, restored):
            queue.push(*rows_of(torch.arange(pushed, pushed + 5)))
        assert torch.equal(restored.ids, straight.ids) and torch.equal(restored.keys, straight.keys)


def test_a_capacity_of_zero_keeps_nothing():
    queue = KeyQueue(0, dim=4)
    queue.push(torch.ones(5, 4), torch.ones(5, dtype=torch.int64))
    assert len(queue) == 0 and queue.keys.shape == (0, 4)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_rank_holds_its_part_of_the_bytes(world_size):
    capacity, dim = 4096, 384
    queue = KeyQueue(capacity, dim, rank=world_size - 1, world_size=world_size)
    assert queue.num_bytes == capacity // world_size * (2 * dim + 8)
