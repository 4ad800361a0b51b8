"""The queue is first in, first out, whatever the sizes of what is pushed."""

from __future__ import annotations

import pytest
import torch

from distill.objectives.queue import KeyQueue


@pytest.mark.parametrize("capacity", [1, 7, 16, 100])
@pytest.mark.parametrize("pushed", [(3, 3, 3, 3), (5, 1, 16), (40,), ()])
def test_it_holds_the_last_rows_pushed(capacity, pushed):
    queue = KeyQueue(capacity, dim=4)
    rows = torch.arange(sum(pushed), dtype=torch.float16)
    start = 0
    for count in pushed:
        chosen = rows[start : start + count]
        queue.push(chosen[:, None].expand(-1, 4), chosen.to(torch.int64) * 10)
        start += count
    expected = rows[-capacity:] if len(rows) else rows
    assert sorted(queue.keys[:, 0].tolist()) == expected.tolist()
    assert sorted(queue.ids.tolist()) == (expected.to(torch.int64) * 10).tolist()
    assert (queue.keys[:, 0] * 10 == queue.ids).all()


def test_a_capacity_of_zero_keeps_nothing():
    queue = KeyQueue(0, dim=4)
    queue.push(torch.ones(5, 4), torch.ones(5, dtype=torch.int64))
    assert len(queue) == 0 and queue.keys.shape == (0, 4)
