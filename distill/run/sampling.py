"""The order of samples: global batches as a pure function of (seed, epoch, step).

    shards, permuted by (seed, epoch) -> windows of whole shards -> rows of a window, permuted -> epoch order, cut every G rows

A window holds about a million rows: a small set is one window and is shuffled completely; a large one is read window by window,
so that reads are close together on disk. Memory: one number per shard, and the rows of the windows in use. The order does not
depend on world size, micro-batch or loader; `assign_rows` splits a global batch over ranks and micro-batches afterwards.

A mixture of weighted sources has windows of another kind:

    a source's shards, permuted by (seed, pass) -> its rows, pass after pass, without end; an epoch takes the next quota of them
    the k-th part of each source's quota -> window k of an epoch, permuted -> epoch order, cut every G rows

so that every window has all sources in proportion, and after any number of epochs the rows of a source have been drawn equally
often to within one. Memory: one number per shard and source, and the rows of the windows in use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import floor

import numpy as np

WINDOW_ROWS = 1 << 20
SAMPLE_ROWS = 1 << 20
CHUNK_ROWS = 8
CHUNK_ROWS_ON_GPU = 512  # below this, launching kernels takes longer than running them
LENGTH_RATIO = 0.9
OF_SOURCES = 1 << 62  # a key of the sources' permutations, that no epoch has


def splitmix64(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that mixes well (Steele, Lea, Flood 2014); it never changes, unlike a library's generator."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def mix(*keys: int) -> np.uint64:
    """A 64-bit hash of several integers, in their order."""
    state = np.uint64(0)
    for key in keys:
        state = splitmix64(np.array([key % 2**64], dtype=np.uint64) ^ splitmix64(np.array([state], dtype=np.uint64)))[0]
    return state


def seed_of(*keys: int) -> int:
    """A seed for a random generator, 0 <= seed < 2^63, that depends on the integers `keys` alone, on any version of Python."""
    return int(mix(*keys)) >> 1


def permutation(size: int, *keys: int) -> np.ndarray:
    """A permutation of range(size), int64, that depends on the integers `keys` alone."""
    ranks = splitmix64(np.arange(size, dtype=np.uint64) ^ mix(*keys))
    return np.argsort(ranks, kind="stable")


def evenly_spread(total: int, limit: int) -> np.ndarray:
    """int64: at most `limit` of the numbers below `total`, ascending."""
    number = min(total, limit)
    return np.arange(number, dtype=np.int64) * total // max(1, number)


def first_of_permutation(size: int, count: int, *keys: int) -> np.ndarray:
    """`permutation(size, *keys)[:count]` without a sort of all: in memory for `count` rows and a block of SAMPLE_ROWS."""
    rows, ranks, key = np.empty(0, np.int64), np.empty(0, np.uint64), mix(*keys)
    for start in range(0, size, SAMPLE_ROWS):
        block = np.arange(start, min(start + SAMPLE_ROWS, size), dtype=np.uint64)
        found = splitmix64(block ^ key)
        if len(ranks) == count:
            near = found < ranks.max(initial=0)
            block, found = block[near], found[near]
        rows, ranks = np.concatenate([rows, block.astype(np.int64)]), np.concatenate([ranks, found])
        if len(ranks) > count:
            lowest = np.argpartition(ranks, count)[:count]
            rows, ranks = rows[lowest], ranks[lowest]
    return rows[np.argsort(ranks)]  # no two are equal: splitmix64 is a bijection


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` as whole numbers in proportion to the weights, by largest remainders; of equal ones the first is rounded up."""
    whole = sum(map(Fraction, weights))
    exact = [total * Fraction(weight) / whole for weight in weights]
    parts = [floor(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda number: parts[number] - exact[number])
    for number in by_remainder[: total - sum(parts)]:
        parts[number] += 1
    return parts


@dataclass(frozen=True, eq=False)
class SampleSource:
    """A source of a mixture. weight: its share of the samples, relative to the other sources'.

    shard_rows: its rows in each shard, int64 [num_shards]. rows: the number of a shard -> what `GlobalOrder.batch` gives for
    these rows, their numbers, int64 [shard_rows[shard]].
    """

    name: str
    weight: float
    shard_rows: np.ndarray
    rows: Callable[[int], np.ndarray]

    @property
    def num_rows(self) -> int:
        return int(self.shard_rows.sum())


class GlobalOrder:
    """The sequence of global batches over a shard set.

    shard_rows: rows of each shard. Steps are numbered across epochs; the last rows of an epoch that do not fill a global batch
    are dropped (`dropped_rows`). Raises ValueError if the set is smaller than one global batch.

    sources: of a mixture. An epoch has as many whole batches as the sources' rows fill, of `quotas` of each source in
    proportion to their weights: a source's rows are repeated or thinned out, and none are dropped. A row of the set may be a
    row of several sources, under other numbers.
    """

    def __init__(
        self,
        shard_rows: np.ndarray,
        *,
        global_batch: int,
        seed: int,
        window_rows: int = WINDOW_ROWS,
        sources: Sequence[SampleSource] = (),
    ) -> None:
        self.shard_rows = np.asarray(shard_rows, dtype=np.int64)
        self.num_rows = sum(source.num_rows for source in sources) if sources else int(self.shard_rows.sum())
        self.global_batch = global_batch
        self.seed = seed
        self.steps_per_epoch = self.num_rows // global_batch
        self.dropped_rows = self.num_rows - self.steps_per_epoch * global_batch
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{self.num_rows:,} training texts do not fill one global batch of {global_batch:,}: add text or lower it"
            )
        self.sources = sources
        self.quotas = apportion(self.steps_per_epoch * global_batch, [source.weight for source in sources])
        windows: _ShardWindows | _MixedWindows = _ShardWindows(self.shard_rows, seed, window_rows)
        if sources:
            self.dropped_rows = 0
            windows = _MixedWindows(sources, self.quotas, seed, window_rows)
        self._window_starts = windows.starts
        self._window = lru_cache(maxsize=3)(windows.rows)

    def batch(self, step: int) -> np.ndarray:
        """The rows of global batch `step`, int64 [G], indices into the shard set. Steps below 0 are of epochs -1, -2, ..."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._rows(epoch, within * self.global_batch, (within + 1) * self.global_batch)

    def _rows(self, epoch: int, start: int, stop: int) -> np.ndarray:
        window_starts = self._window_starts(epoch)
        first = int(np.searchsorted(window_starts, start, side="right")) - 1
        last = int(np.searchsorted(window_starts, stop - 1, side="right")) - 1
        rows = np.concatenate([self._window(epoch, window) for window in range(first, last + 1)])
        return rows[start - window_starts[first] : stop - window_starts[first]]


class _ShardWindows:
    """The windows of an epoch over all rows: whole shards, in an order of each epoch."""

    def __init__(self, shard_rows: np.ndarray, seed: int, window_rows: int) -> None:
        self._shard_rows, self._seed = shard_rows, seed
        self._shard_starts = np.concatenate([[0], np.cumsum(shard_rows)[:-1]])
        self._shards_per_window = max(1, window_rows // int(shard_rows.max()))
        self._epoch = lru_cache(maxsize=2)(self._lay_out_epoch)

    def starts(self, epoch: int) -> np.ndarray:
        """Where in an epoch each window begins, int64, ascending from 0; the epoch's end may be the last."""
        return self._epoch(epoch)[1]

    def rows(self, epoch: int, window: int) -> np.ndarray:
        shards, _ = self._epoch(epoch)
        members = shards[window * self._shards_per_window : (window + 1) * self._shards_per_window]
        rows = np.concatenate([np.arange(self._shard_rows[s]) + self._shard_starts[s] for s in members])
        return rows[permutation(len(rows), self._seed, epoch, window + 1)]

    def _lay_out_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        shards = permutation(len(self._shard_rows), self._seed, epoch)
        ends = np.cumsum(self._shard_rows[shards])
        return shards, np.concatenate([[0], ends])[:: self._shards_per_window]


class _MixedWindows:
    """The windows of an epoch of a mixture: window k has the k-th part of each source's quota."""

    def __init__(self, sources: Sequence[SampleSource], quotas: Sequence[int], seed: int, window_rows: int) -> None:
        self._seed, self._quotas = seed, quotas
        self._passes = [_Passes(source, seed_of(seed, OF_SOURCES, number)) for number, source in enumerate(sources)]
        edges = np.arange(-(-sum(quotas) // window_rows) + 1, dtype=np.int64)
        self._edges = [edges * quota // edges[-1] for quota in quotas]  # of the windows in each source's quota
        self._starts = np.sum(self._edges, axis=0)

    def starts(self, epoch: int) -> np.ndarray:
        return self._starts

    def rows(self, epoch: int, window: int) -> np.ndarray:
        parts = []
        for passes, quota, edges in zip(self._passes, self._quotas, self._edges, strict=True):
            first, last = edges[window : window + 2].tolist()
            parts.append(passes.rows(epoch * quota + first, epoch * quota + last))
        rows = np.concatenate(parts)
        return rows[permutation(len(rows), self._seed, epoch, window + 1)]


class _Passes:
    """The rows of a source, pass after pass; each pass has all of them once, shard by shard, in an order of its own."""

    def __init__(self, source: SampleSource, seed: int) -> None:
        self._source, self._seed = source, seed
        self._num_rows = source.num_rows
        self._shards = np.flatnonzero(source.shard_rows)
        self._pass = lru_cache(maxsize=2)(self._lay_out_pass)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The rows at places `start` to `stop` of all passes, [stop - start]; those below 0 are of passes -1, -2, ...

        Whole passes between two cut ones are alike: a window is permuted afterwards.
        """
        first, skipped = divmod(start, self._num_rows)
        last, rest = divmod(stop, self._num_rows)
        if first == last:
            return self._part(first, skipped, rest)
        parts = [self._part(first, skipped, self._num_rows), self._part(last, 0, rest)]
        if last - first > 1:
            parts.append(np.tile(self._part(first + 1, 0, self._num_rows), last - first - 1))
        return np.concatenate(parts)

    def _part(self, number: int, start: int, stop: int) -> np.ndarray:
        shards, starts = self._pass(number)
        first = int(np.searchsorted(starts, start, side="right")) - 1
        last = int(np.searchsorted(starts, stop, side="left"))
        parts = [self._shuffled(number, shard) for shard in shards[first:last].tolist()]
        return np.concatenate([np.empty(0, np.int64), *parts])[start - starts[first] : stop - starts[first]]

    def _lay_out_pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        shards = self._shards[permutation(len(self._shards), self._seed, number)]
        return shards, np.concatenate([[0], np.cumsum(self._source.shard_rows[shards])])

    def _shuffled(self, number: int, shard: int) -> np.ndarray:
        rows = self._source.rows(shard)
        if len(rows) != self._source.shard_rows[shard]:
            raise ValueError(
                f"source {self._source.name}: shard {shard} has {len(rows)} of its rows, not those that are counted"
            )
        return rows[permutation(len(rows), self._seed, number, shard + 1)]


def length_order(lengths: np.ndarray) -> np.ndarray:
    """The permutation that sorts a global batch by length: longest first, ties by position."""
    return np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")


@dataclass(frozen=True)
class TokenBudget:
    """Micro-batches of at most `limit` tokens with padding, which are estimated from bytes.

    num_bytes, num_tokens [n]: of a sample of the texts, each ascending. A rank sorts its rows again, by tokens, so that the
    k-th longest by tokens takes the place of the k-th longest by bytes: so it does in the sample, which gives the estimate.
    """

    limit: int
    num_bytes: np.ndarray
    num_tokens: np.ndarray

    def split(self, lengths: np.ndarray) -> list[np.ndarray]:
        """The rows of each micro-batch, from lengths in bytes, descending; one row where the limit is less."""
        widths = np.interp(lengths, self.num_bytes, self.num_tokens)
        starts = [0]
        while starts[-1] < len(lengths):
            starts.append(starts[-1] + max(1, int(self.limit // widths[starts[-1]])))
        return np.split(np.arange(len(lengths)), starts[1:-1])


def assign_rows(
    lengths: np.ndarray, *, rank: int, world_size: int, micro_batch: int | TokenBudget, chunk_rows: int = CHUNK_ROWS
) -> list[list[np.ndarray]]:
    """One rank's rows of a global batch: their positions in length-sorted order, for each chunk of each micro-batch.

    lengths [G]: in length-sorted order, descending. Rank r takes every W-th row, so that the ranks' work is similar; numbers of
    rows differ by at most one. A micro-batch (at most `micro_batch` rows or tokens, one backward pass) consists of neighbours,
    cut into chunks (one forward pass each) where the length has decreased enough to save padding. The cuts are the same on all
    ranks, and so are the numbers of micro-batches and chunks. A chunk can be empty only on a rank with one row fewer, and is
    then the only one of its micro-batch.
    """
    global_batch = len(lengths)
    most_rows = -(-global_batch // world_size)
    if isinstance(micro_batch, TokenBudget):
        split = micro_batch.split(lengths[::world_size])
    else:
        split = np.array_split(np.arange(most_rows), -(-most_rows // micro_batch))
    assigned: list[list[np.ndarray]] = []
    for rows in split:
        cuts = _cut_by_length(lengths[rows * world_size], chunk_rows)
        positions = [chunk * world_size + rank for chunk in np.split(rows, cuts)]
        assigned.append([chunk[chunk < global_batch] for chunk in positions])
    return assigned


def _cut_by_length(lengths: np.ndarray, chunk_rows: int) -> list[int]:
    """Where to cut rows of descending length into chunks.

    Each chunk but the last has a multiple of `chunk_rows` rows; the last has at least `chunk_rows`, unless it is the only one.
    """
    cuts, start = [], 0
    for row in range(chunk_rows, len(lengths) - chunk_rows + 1, chunk_rows):
        if lengths[row] < LENGTH_RATIO * lengths[start]:
            cuts.append(row)
            start = row
    return cuts
