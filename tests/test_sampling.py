"""Law 1: the order is a pure function of (seed, epoch, step)."""

from __future__ import annotations

import numpy as np
import pytest

from distill.sampling import GlobalOrder, deal, dealt_order, permutation


def epoch_rows(order: GlobalOrder, epoch: int) -> np.ndarray:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    return np.concatenate([order.batch(step) for step in steps])


@pytest.mark.parametrize("window_rows", [1, 2500, 1 << 20])
@pytest.mark.parametrize("shard_rows", [[1000] * 7 + [123], [5000], [10, 2000, 3]])
def test_an_epoch_holds_every_row_at_most_once_and_drops_less_than_a_batch(shard_rows, window_rows):
    order = GlobalOrder(np.array(shard_rows), global_batch=64, seed=3, window_rows=window_rows)
    rows = epoch_rows(order, 0)
    assert len(set(rows.tolist())) == len(rows) == sum(shard_rows) - order.dropped_rows
    assert order.dropped_rows < 64 and rows.min() >= 0 and rows.max() < sum(shard_rows)


def test_a_batch_does_not_depend_on_what_was_asked_before():
    shard_rows = np.array([500] * 9)
    straight = GlobalOrder(shard_rows, global_batch=32, seed=1, window_rows=1000)
    expected = {step: straight.batch(step).tolist() for step in range(300)}
    jumping = GlobalOrder(shard_rows, global_batch=32, seed=1, window_rows=1000)
    for step in (299, 3, 141, 140, 0, 298):
        assert jumping.batch(step).tolist() == expected[step]


def test_epochs_and_seeds_differ():
    shard_rows = np.array([500] * 9)
    first, second = (GlobalOrder(shard_rows, global_batch=32, seed=seed) for seed in (0, 1))
    assert first.batch(0).tolist() != second.batch(0).tolist()
    assert first.batch(0).tolist() != first.batch(first.steps_per_epoch).tolist()


def test_the_order_is_what_it_was_when_it_was_written():
    """A change of this list changes every run's batches and breaks resuming: do not."""
    assert permutation(10, 1, 2).tolist() == [0, 5, 6, 3, 9, 2, 1, 8, 4, 7]


def test_neighbours_do_not_stay_neighbours():
    order = GlobalOrder(np.array([1000] * 20), global_batch=100, seed=0)
    rows = epoch_rows(order, 0).reshape(-1, 100)
    together = sum(len(set(batch) & set(batch + 1)) for batch in rows)
    # chance: each of 20,000 rows shares its batch of 100 with its neighbour with probability 99 / 19,999
    assert abs(together - 99) < 5 * 99**0.5


def test_too_little_text_for_a_batch_is_an_error():
    with pytest.raises(ValueError, match="do not fill one global batch"):
        GlobalOrder(np.array([10]), global_batch=11, seed=0)


@pytest.mark.parametrize("global_batch", [4, 37, 256])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch", [1, 5, 64, 1000])
def test_every_row_is_dealt_once_and_shares_differ_by_at_most_one(global_batch, world_size, micro_batch):
    dealt = [deal(global_batch, rank=r, world_size=world_size, micro_batch=micro_batch) for r in range(world_size)]
    assert sorted(np.concatenate([part for parts in dealt for part in parts]).tolist()) == list(range(global_batch))
    shares = [sum(map(len, parts)) for parts in dealt]
    assert max(shares) - min(shares) <= 1
    assert len({len(parts) for parts in dealt}) == 1
    assert max(len(part) for parts in dealt for part in parts) <= micro_batch


def test_micro_batches_hold_rows_of_like_length():
    lengths = np.random.default_rng(0).integers(1, 500, 1024)
    by_length = lengths[dealt_order(lengths)]
    parts = deal(1024, rank=1, world_size=2, micro_batch=64)
    padded = sum(len(part) * by_length[part].max() for part in parts)
    assert sum(by_length[part].sum() for part in parts) / padded > 0.9
