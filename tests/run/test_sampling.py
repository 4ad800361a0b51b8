"""Invariant 1: the order is a pure function of (seed, epoch, step)."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from distill.run import sampling
from distill.run.sampling import (
    GlobalOrder,
    SampleSource,
    TokenBudget,
    apportion,
    assign_rows,
    evenly_spread,
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


def test_evenly_spread_rows_are_all_of_them_where_there_are_few():
    assert evenly_spread(10, 4).tolist() == [0, 2, 5, 7] and evenly_spread(3, 5).tolist() == [0, 1, 2]


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


def test_the_order_of_an_unweighted_set_never_changes():
    order = GlobalOrder(np.array([500] * 9 + [123]), global_batch=32, seed=1, window_rows=1000)
    rows = np.concatenate([order.batch(step) for step in range(-200, 300)])
    digest = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
    assert digest == "348065c214d8aeaa74c21b63bc5e0fffcfa3e84bdfae46757b2e42c9cd02b9a5"


def mixed_order(shard_rows, sizes, weights, read: Counter | None = None, **options) -> GlobalOrder:
    """An order over a set that has one source of `sizes` rows after the other. read: counts the shards that are read."""
    read = Counter() if read is None else read
    starts, ends = np.concatenate([[0], np.cumsum(shard_rows)]), np.cumsum(sizes)
    sources = []
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        inside = np.clip(starts, ends[number] - size, ends[number])

        def rows_of(shard: int, inside: np.ndarray = inside) -> np.ndarray:
            read[shard] += 1
            return np.arange(inside[shard], inside[shard + 1])

        sources.append(SampleSource(f"source {number}", weight, np.diff(inside), rows_of))
    return GlobalOrder(shard_rows, sources=sources, **{"seed": 3, "global_batch": 64} | options)


SHARDS = np.array([250] * 7 + [13])
MIXTURES = [([1000, 763], [1.0, 1.0]), ([1700, 60, 3], [0.2, 0.5, 0.3]), ([1, 1761, 1], [0.5, 0.4, 0.001])]


@pytest.mark.parametrize("window_rows", [50, 600, 1 << 20])
@pytest.mark.parametrize("sizes, weights", MIXTURES)
def test_each_epoch_has_exactly_the_quota_of_each_source(sizes, weights, window_rows):
    order = mixed_order(SHARDS, sizes, weights, window_rows=window_rows)
    assert sum(order.quotas) == order.steps_per_epoch * 64 == sum(SHARDS) // 64 * 64 and order.dropped_rows == 0
    assert np.abs(np.array(order.quotas) - np.array(weights) / sum(weights) * sum(order.quotas)).max() < 1
    for epoch in (-3, -1, 0, 1, 5):
        sources = np.searchsorted(np.cumsum(sizes), epoch_rows(order, epoch), side="right")
        assert np.bincount(sources, minlength=len(sizes)).tolist() == order.quotas


@pytest.mark.parametrize("first", [-4, 0, 3])
@pytest.mark.parametrize("sizes, weights", MIXTURES)
def test_the_rows_of_a_source_are_seen_equally_often_to_within_one_after_any_number_of_epochs(sizes, weights, first):
    """Counted from epoch 0; between two other epochs, from one cut pass to another, to within two."""
    order = mixed_order(SHARDS, sizes, weights, window_rows=600)
    seen, ends = np.zeros(sum(sizes), np.int64), np.cumsum(sizes)
    for epochs in range(1, 6):
        np.add.at(seen, epoch_rows(order, first + epochs - 1), 1)
        for size, end, quota in zip(sizes, ends, order.quotas, strict=True):
            counts = seen[end - size : end]
            assert counts.sum() == epochs * quota
            assert np.abs(counts - epochs * quota / size).max() < (1 if first == 0 else 2)


def test_every_window_of_a_mixture_has_all_sources_in_proportion():
    """A source that lies in one shard of a large set is not read at once."""
    order = mixed_order(np.array([1000] * 100), [99_000, 1000], [0.8, 0.2], global_batch=1000, window_rows=5000)
    windows = epoch_rows(order, 0).reshape(-1, 5000)
    assert [int((window >= 99_000).sum()) for window in windows] == [1000] * 20


def test_a_batch_of_a_mixture_does_not_depend_on_earlier_calls():
    def start():
        return mixed_order(SHARDS, [1700, 60, 3], [0.2, 0.5, 0.3], window_rows=300)

    straight = start()
    expected = {step: straight.batch(step).tolist() for step in range(-60, 90)}
    for step in (89, -60, 3, 41, 40, 0, -1):
        assert start().batch(step).tolist() == expected[step]
    assert len({tuple(rows) for rows in expected.values()}) == len(expected)
    assert mixed_order(SHARDS, [1700, 60, 3], [0.2, 0.5, 0.3], seed=4).batch(0).tolist() != expected[0]


def test_the_order_of_a_mixture_never_changes():
    """A change of this list changes the batches of every run with weights and breaks resuming: do not."""
    order = mixed_order(SHARDS, [1700, 63], [1.0, 1.0], global_batch=8, window_rows=300)
    assert order.batch(0).tolist() == [1747, 553, 725, 1714, 1714, 695, 633, 510]
    assert order.batch(-1).tolist() == [1747, 1746, 1753, 915, 1702, 963, 962, 1725]


def test_a_mixture_of_a_billion_rows_takes_little_memory_and_reads_few_shards():
    read, sizes, weights = Counter(), [900_000_000, 90_000_000, 10_005_000], [0.3, 0.2, 0.5]
    order = mixed_order(np.full(15_000, 66_667), sizes, weights, read, global_batch=4096)
    tracemalloc.start()
    try:
        for step in (0, 123_456, -7):
            order.batch(step)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert 3 * 16 <= sum(read.values()) < 3 * 30  # a window has 16 shards' rows, and of each source a cut shard on both sides
    assert sum(source.shard_rows.nbytes for source in order.sources) == 3 * 15_000 * 8


@pytest.mark.parametrize("total, weights, expected", [
    (10, [1, 1, 1], [4, 3, 3]), (0, [0.5], [0]), (7, [1e-9, 1], [0, 7]), (1000, [0.1, 0.2, 0.7], [100, 200, 700]),
    (10**12 + 1, [1.0, 3.0], [250_000_000_000, 750_000_000_001]),
])  # fmt: skip
def test_a_total_is_apportioned_by_largest_remainders(total, weights, expected):
    assert apportion(total, weights) == expected


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
