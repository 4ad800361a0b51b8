"""A step's rows for this rank: read, tokenized and cut into micro-batches ahead of time, in one background thread."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.run.collectives import gather_rows, rank
from distill.run.sampling import (
    CHUNK_ROWS,
    GlobalOrder,
    TokenBudget,
    assign_rows,
    first_of_permutation,
    length_order,
)
from distill.shards import ShardReader
from distill.student import Student
from distill.student.student import PAD_TO, Chunk, PooledVectors, Tokens
from distill.training.encoded_cache import Encoded
from distill.training.samples import Samples

logger = logging.getLogger(__name__)
LENGTH_SAMPLE = 2000  # texts
PLACEHOLDER = "."  # the one sentence of an empty micro-batch: a rank with a row less still joins every collective


@dataclass(frozen=True)
class MicroBatch:
    """b rows of one backward pass.

    tokens: chunks of rows of similar length, input_ids and attention_mask [b_c, L_c] each, b rows in all, or the vectors that a
    frozen encoder made of them; positions [b] int64: the rows' places in the length-sorted global batch; teacher [b, d_t] fp16;
    hashes [b] int64. An empty micro-batch has b = 0 but one row of tokens. most_rows: the largest b of any rank, which is b or
    b + 1. index: which of the step's micro-batches it is. sources [b] int64: the number of each row's source, None where there
    is one.
    """

    tokens: Sequence[Chunk]
    positions: Tensor
    teacher: Tensor
    hashes: Tensor
    most_rows: int
    index: int = 0
    sources: Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        names = ("positions", "teacher", "hashes", *(() if self.sources is None else ("sources",)))
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, tokens=[_to(chunk, device) for chunk in self.tokens], **moved)


def _to(chunk: Chunk, device: torch.device) -> Chunk:
    if isinstance(chunk, PooledVectors):
        return PooledVectors(chunk.vectors.to(device, non_blocking=True))
    return {name: value.to(device, non_blocking=True) for name, value in chunk.items()}


def gather_in_order(micro: Sequence[MicroBatch], parts: Sequence[Tensor], global_batch: int) -> Tensor:
    """The rows of all ranks in length-sorted order, [G, ...], from those of this rank's micro-batches; no gradient."""
    order = torch.cat([part.positions for part in micro]).argsort()
    return gather_rows(torch.cat(list(parts))[order], global_batch)


class Tokenized:
    """Tokens, of texts that are read and tokenized as they are needed."""

    def __init__(self, reader: ShardReader, student: Student) -> None:
        self._samples = Samples(reader)
        self._student = student

    def read(self, samples: np.ndarray) -> list[list[int]]:
        return self._student.token_ids(self._samples.texts(samples), self._samples.roles(samples))

    def pad(self, read: list[list[int]]) -> Tokens:
        return self._student.pad(read or self._student.token_ids([PLACEHOLDER]))


class ShardBatches:
    """The steps of a global order over a shard set, as one rank sees them.

    encoded: the cached vectors of a frozen encoder (encoded_cache.py), instead of tokens.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: GlobalOrder,
        student: Student,
        *,
        micro_batch: int | TokenBudget,
        rank: int,
        world_size: int,
        chunk_rows: int = CHUNK_ROWS,
        encoded: Encoded | None = None,
    ) -> None:
        """micro_batch: rows, of which every step has the same number of micro-batches, or tokens, of which it may not."""
        self.reader = reader
        self.samples = Samples(reader)
        self.order = order
        self._inputs = encoded or Tokenized(reader, student)
        self._rank = rank
        self._assign = partial(assign_rows, world_size=world_size, micro_batch=micro_batch, chunk_rows=chunk_rows)

    @property
    def num_micro(self) -> int:
        """Micro-batches a step, which follow from sizes alone; by tokens, those of a step of short texts."""
        return len(self._assign(np.zeros(self.order.global_batch), rank=self._rank))

    def rows(self, step: int) -> np.ndarray:
        """Samples of global batch `step` in length-sorted order, the same on every rank: rows, but for translations."""
        samples = self.order.batch(step)
        return samples[length_order(self.samples.lengths(samples))]

    def __call__(self, step: int) -> list[MicroBatch]:
        batch = self.rows(step)
        lengths = self.samples.lengths(batch)
        parts, longest = (self._assign(lengths, rank=rank) for rank in (self._rank, 0))
        sizes = [[len(chunk) for chunk in chunks] for chunks in parts]
        most_rows = [sum(map(len, chunks)) for chunks in longest]  # no rank has more than rank 0
        # rows are assigned by their length in bytes, which every rank knows; a rank then sorts its own by their tokens
        own = np.concatenate([chunk for chunks in parts for chunk in chunks])
        read = self._inputs.read(batch[own])
        falling = length_order(np.array([len(row) for row in read], dtype=np.int64))
        ends = np.cumsum([sum(chunks) for chunks in sizes])
        return [
            self._micro_batch(index, batch, own[rows], [read[row] for row in rows], chunks, most_rows[index])
            for index, (rows, chunks) in enumerate(zip(np.split(falling, ends[:-1]), sizes, strict=True))
        ]

    def _micro_batch(
        self, index: int, batch: np.ndarray, positions: np.ndarray, read: list[Any], chunks: list[int], most_rows: int
    ) -> MicroBatch:
        samples = batch[positions]
        starts = np.cumsum([0, *chunks]).tolist()
        return MicroBatch(
            [self._inputs.pad(read[start:stop]) for start, stop in pairwise(starts)],
            torch.from_numpy(positions),
            torch.from_numpy(self.samples.vectors(samples)),
            torch.from_numpy(self.samples.hashes(samples)),
            most_rows,
            index,
            self.samples.sources(samples),
        )

    def keys(self, first_step: int, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        """Teacher vectors and hashes of rows. `numbers`, int64, ascending, count the rows of the batches from `first_step` on,
        each in length-sorted order; batches before 0 are of epochs before the first."""
        batches, within = np.divmod(numbers, self.order.global_batch)
        rows = [self.rows(first_step + int(batch))[within[batches == batch]] for batch in np.unique(batches)]
        flat = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        return torch.from_numpy(self.samples.vectors(flat)), torch.from_numpy(self.samples.hashes(flat))


def token_budget(limit: int, reader: ShardReader, student: Student) -> TokenBudget:
    """Micro-batches of about `limit` tokens of the student's tokenizer, with padding; the same on every rank.

    Longer texts than those of the sample are taken to have as many tokens a byte as its longest, up to the student's limit.
    """
    rows = first_of_permutation(len(reader), min(LENGTH_SAMPLE, len(reader)), 0)
    num_bytes = np.sort(reader.lengths(rows))
    read = student.token_ids(reader.texts(rows), reader.roles(rows))
    num_tokens = np.sort([-(-len(ids) // PAD_TO) * PAD_TO for ids in read])
    end = -(-student.max_length // PAD_TO) * PAD_TO
    is_last = np.append(np.diff(num_bytes) > 0, True)  # of its length
    longest = num_bytes[-1] * (end / num_tokens[-1]) + 1
    return TokenBudget(limit, np.append(num_bytes[is_last], longest), np.append(num_tokens[is_last], end))


def report_order(order: GlobalOrder) -> None:
    """Logs on rank 0 how often the texts of each source of a mixture are seen, and how many texts of each epoch are left over,
    since they do not fill a global batch."""
    if rank() != 0:
        return
    for source, quota in zip(order.sources, order.quotas, strict=True):
        count, times = source.num_rows, quota / source.num_rows
        words = "source %s: %s texts, weight %g: each is seen %.2f times an epoch"
        logger.info(words, source.name, f"{count:,}", source.weight, times)
    if order.dropped_rows:
        shown = f"{order.dropped_rows:,} of {order.num_rows:,}"
        logger.info("%s texts are left out of each epoch: they do not fill a global batch of %d", shown, order.global_batch)


def prefetch(load: Callable[[int], list[MicroBatch]], steps: range, depth: int = 2) -> Generator[list[MicroBatch]]:
    """load(step) for each step, `depth` ahead in a thread; an error in it is raised here."""
    ready: queue.Queue[list[MicroBatch] | Exception] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: list[MicroBatch] | Exception) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        for step in steps:
            if stopped.is_set():
                return
            try:
                put(load(step))
            except Exception as error:
                return put(error)

    thread = threading.Thread(target=work, daemon=True, name="batches")
    thread.start()
    try:
        for _ in steps:
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
