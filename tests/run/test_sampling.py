"""Invariant 1: the order is a pure function of (seed, epoch, step)."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from distill.run import sampling
from distill.run.sampling import (
    GlobalOrder,
    TokenBudget,
    assign_rows,
    first_of_permutation,
    length_order,
    permutation,
    seed_of,
)


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


def test_a_batch_does_not_depend_on_earlier_calls():
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


def test_the_order_never_changes():
    """A change of this list changes every run's batches and breaks resuming: do not."""
    assert permutation(10, 1, 2).tolist() == [0, 5, 6, 3, 9, 2, 1, 8, 4, 7]


@pytest.mark.parametrize("count", [0, 1, 7, 999, 1000, 5000])
def test_the_first_of_a_permutation_are_found_without_sorting_all(monkeypatch, count):
    monkeypatch.setattr(sampling, "SAMPLE_ROWS", 64)
    assert first_of_permutation(1000, count, 3, 0).tolist() == permutation(1000, 3, 0)[:count].tolist()


def test_the_first_of_a_permutation_need_no_memory_for_all(monkeypatch):
    monkeypatch.setattr(sampling, "SAMPLE_ROWS", 1 << 16)
    tracemalloc.start()
    try:
        assert len(first_of_permutation(1 << 22, 2048, 3, 0)) == 2048
        assert tracemalloc.get_traced_memory()[1] < 8 << 20  # a number for each would be 32 MiB
    finally:
        tracemalloc.stop()


def test_seeds_never_change():
    """A change of this list changes every run's dropout masks and shuffles, and breaks resuming: do not."""
    assert [seed_of(0), seed_of(1, 2, 3), seed_of(3, 2, 1)] == [6017775124710473527, 4457002114988122575, 5007933970546577474]
    assert all(0 <= seed_of(7, key) < 2**63 for key in range(1000))


def test_neighbours_do_not_stay_neighbours():
    order = GlobalOrder(np.array([1000] * 20), global_batch=100, seed=0)
    rows = epoch_rows(order, 0).reshape(-1, 100)
    together = sum(len(set(batch) & set(batch + 1)) for batch in rows)
    # chance: each of 20,000 rows shares its batch of 100 with its neighbour with probability 99 / 19,999
    assert abs(together - 99) < 5 * 99**0.5


def test_neighbours_of_a_window_share_a_batch_no_more_often_than_chance_allows():
    """Chance by the window: a row's neighbour is anywhere in the same window, of which a batch is a small part."""
    window, batch = 5000, 100
    order = GlobalOrder(np.array([500] * 40), global_batch=batch, seed=2, window_rows=window)
    rows = epoch_rows(order, 0).reshape(-1, batch)
    together = sum(len(set(found) & set(found + 1)) for found in rows)
    expected = order.num_rows * (batch - 1) / (window - 1)
    assert abs(together - expected) < 5 * expected**0.5
    far = sum(len(set(found) & set(found + 500)) for found in rows)  # the same place in the next shard: mostly another window
    assert far < expected


def test_batches_before_the_first_are_those_of_earlier_epochs():
    order = GlobalOrder(np.array([500] * 9), global_batch=32, seed=1)
    before = [order.batch(step).tolist() for step in range(-order.steps_per_epoch, 0)]
    assert len({row for rows in before for row in rows}) == order.steps_per_epoch * 32
    assert before[0] != order.batch(0).tolist()


def test_memory_grows_with_the_number_of_shards_and_not_of_rows():
    tracemalloc.start()
    order = GlobalOrder(np.full(2000, 1_000_000), global_batch=1024, seed=0, window_rows=1)
    order.batch(order.steps_per_epoch // 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20  # of two billion rows; a window is one shard here


def test_too_little_text_for_a_batch_is_an_error():
    with pytest.raises(ValueError, match="do not fill one global batch"):
        GlobalOrder(np.array([10]), global_batch=11, seed=0)


def descending_lengths(global_batch: int) -> np.ndarray:
    return np.sort(np.random.default_rng(0).integers(10, 500, global_batch))[::-1]


@pytest.mark.parametrize("global_batch", [4, 37, 256])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch", [1, 5, 64, 1000])
def test_every_row_is_assigned_once_and_numbers_of_rows_differ_by_at_most_one(global_batch, world_size, micro_batch):
    lengths = descending_lengths(global_batch)
    assigned = [assign_rows(lengths, rank=r, world_size=world_size, micro_batch=micro_batch) for r in range(world_size)]
    rows = [chunk for micro_batches in assigned for chunks in micro_batches for chunk in chunks]
    assert sorted(np.concatenate(rows).tolist()) == list(range(global_batch))
    counts = [sum(len(chunk) for chunks in micro_batches for chunk in chunks) for micro_batches in assigned]
    assert max(counts) - min(counts) <= 1
    assert max(sum(map(len, chunks)) for micro_batches in assigned for chunks in micro_batches) <= micro_batch


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("micro_batch", [1, 5, 64])
def test_all_ranks_have_the_same_micro_batches_and_chunks(world_size, micro_batch):
    lengths = descending_lengths(254)
    assigned = [assign_rows(lengths, rank=r, world_size=world_size, micro_batch=micro_batch) for r in range(world_size)]
    assert len({tuple(len(chunks) for chunks in micro_batches) for micro_batches in assigned}) == 1
    empty = [chunks for micro_batches in assigned for chunks in micro_batches if any(len(chunk) == 0 for chunk in chunks)]
    assert all(len(chunks) == 1 for chunks in empty)


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_little_is_padded(world_size):
    draw = np.random.default_rng(0)
    lengths = draw.lognormal(3, 0.6, 1024).clip(4, 64).astype(int)
    by_length = lengths[length_order(lengths)]
    chunks = [c for micro in assign_rows(by_length, rank=0, world_size=world_size, micro_batch=128) for c in micro]
    padded = sum(len(chunk) * by_length[chunk].max() for chunk in chunks)
    assert sum(by_length[chunk].sum() for chunk in chunks) / padded > 0.9


def in_bytes(limit: int) -> TokenBudget:
    """A budget for texts with a token a byte."""
    return TokenBudget(limit, np.array([0, 1000]), np.array([0, 1000]))


@pytest.mark.parametrize("global_batch", [4, 37, 254])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("limit", [1, 500, 4000, 10**6])
def test_a_token_budget_assigns_every_row_once_in_the_same_micro_batches_on_all_ranks(global_batch, world_size, limit):
    lengths = descending_lengths(global_batch)
    assigned = [
        assign_rows(lengths, rank=r, world_size=world_size, micro_batch=in_bytes(limit), chunk_rows=8)
        for r in range(world_size)
    ]
    rows = [chunk for micro_batches in assigned for chunks in micro_batches for chunk in chunks]
    assert sorted(np.concatenate(rows).tolist()) == list(range(global_batch))
    assert len({tuple(len(chunks) for chunks in micro_batches) for micro_batches in assigned}) == 1
    for micro_batches in assigned:
        for chunks, of_rank_0 in zip(micro_batches, assigned[0], strict=True):
            num_rows = sum(map(len, chunks))
            assert sum(map(len, of_rank_0)) - 1 <= num_rows <= sum(map(len, of_rank_0))
            padded = sum(len(chunk) * lengths[chunk].max() for chunk in chunks if len(chunk))
            assert padded <= limit or num_rows == 1
    first = sum(map(len, assigned[0][0]))
    if limit > 1 and first < -(-global_batch // world_size):
        assert (first + 1) * lengths[0] > limit  # one row more would be too many


def test_a_token_budget_gives_fewer_micro_batches_where_texts_are_short():
    long_texts, short_texts = np.full(64, 400), np.full(64, 40)
    counts = [
        len(assign_rows(lengths, rank=0, world_size=2, micro_batch=in_bytes(1600))) for lengths in (long_texts, short_texts)
    ]
    assert counts == [8, 1]
