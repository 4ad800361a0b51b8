"""A step's rows for this rank: read, tokenized and cut into micro-batches ahead of time, in one background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distill.sampling import CHUNK_ROWS, GlobalOrder, deal, dealt_order
from distill.shards import ShardReader
from distill.student.student import Tokens

Tokenize = Callable[[list[str]], Tokens]


class Tokenizer(Protocol):
    """What a Student is to the loader."""

    def token_ids(self, sentences: list[str]) -> list[list[int]]: ...

    def pad(self, token_ids: list[list[int]]) -> Tokens: ...


class Inputs(Protocol):
    """What a student reads of the shards' rows."""

    def read(self, rows: np.ndarray) -> list[Any]:
        """Of each row [n], something that has a length."""
        ...

    def pad(self, read: list[Any]) -> Tokens:
        """A chunk of some of what `read` returned; of a placeholder where there is none."""
        ...


PLACEHOLDER = "."  # the one sentence of an empty micro-batch: a rank with a row less still joins every collective


@dataclass(frozen=True)
class MicroBatch:
    """b rows of one backward pass.

    tokens: chunks of rows of like length, input_ids and attention_mask [b_c, L_c] each, b rows in all, or the vectors that a
    frozen encoder made of them; positions [b] int64: the
    rows' places in dealt order; teacher [b, d_t] fp16; hashes [b] int64. An empty micro-batch has b = 0 but one row of tokens.
    most_rows: the b of the rank that has most, which is b or b + 1.
    """

    tokens: list[Tokens]
    positions: Tensor
    teacher: Tensor
    hashes: Tensor
    most_rows: int

    def to(self, device: torch.device) -> MicroBatch:
        tokens = [{name: value.to(device, non_blocking=True) for name, value in chunk.items()} for chunk in self.tokens]
        names = ("positions", "teacher", "hashes")
        return replace(self, tokens=tokens, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


class Tokenized:
    """Tokens, of texts that are read and tokenized as they are needed."""

    def __init__(self, reader: ShardReader, tokenizer: Tokenizer) -> None:
        self._reader = reader
        self._tokenizer = tokenizer

    def read(self, rows: np.ndarray) -> list[list[int]]:
        return self._tokenizer.token_ids(self._reader.texts(rows))

    def pad(self, read: list[list[int]]) -> Tokens:
        return self._tokenizer.pad(read or self._tokenizer.token_ids([PLACEHOLDER]))


class ShardBatches:
    """The steps of a global order over a shard set, as one rank sees them.

    encoded: what a frozen encoder has made of the sentences before (encoded.py), instead of their tokens.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: GlobalOrder,
        tokenizer: Tokenizer,
        *,
        micro_batch: int,
        rank: int,
        world_size: int,
        chunk_rows: int = CHUNK_ROWS,
        encoded: Inputs | None = None,
    ) -> None:
        self.reader = reader
        self.order = order
        self._inputs = encoded or Tokenized(reader, tokenizer)
        self._deal = partial(deal, rank=rank, world_size=world_size, micro_batch=micro_batch, chunk_rows=chunk_rows)
        share = -(-order.global_batch // world_size)
        self._most_rows = [len(rows) for rows in np.array_split(np.arange(share), -(-share // micro_batch))]

    @property
    def num_micro(self) -> int:
        """Micro-batches a step: it follows from sizes alone."""
        return len(self._deal(np.zeros(self.order.global_batch)))

    def rows(self, step: int) -> np.ndarray:
        """Rows of global batch `step` in dealt order, the same on every rank."""
        rows = self.order.batch(step)
        return rows[dealt_order(self.reader.lengths(rows))]

    def __call__(self, step: int) -> list[MicroBatch]:
        dealt = self.rows(step)
        parts = self._deal(self.reader.lengths(dealt))
        sizes = [[len(chunk) for chunk in chunks] for chunks in parts]
        # rows are dealt by their bytes, which every rank knows; a rank then lays its own by their tokens
        own = np.concatenate([chunk for chunks in parts for chunk in chunks])
        read = self._inputs.read(dealt[own])
        falling = dealt_order(np.array([len(row) for row in read], dtype=np.int64))
        ends = np.cumsum([sum(chunks) for chunks in sizes])
        return [
            self._micro_batch(dealt, own[rows], [read[row] for row in rows], chunks, most)
            for rows, chunks, most in zip(np.split(falling, ends[:-1]), sizes, self._most_rows, strict=True)
        ]

    def _micro_batch(
        self, dealt: np.ndarray, positions: np.ndarray, read: list[Any], chunks: list[int], most_rows: int
    ) -> MicroBatch:
        rows = dealt[positions]
        starts = np.cumsum([0, *chunks]).tolist()
        return MicroBatch(
            [self._inputs.pad(read[start:stop]) for start, stop in pairwise(starts)],
            torch.from_numpy(positions),
            torch.from_numpy(self.reader.vectors(rows)),
            torch.from_numpy(self.reader.hashes(rows)),
            most_rows,
        )

    def keys(self, first_step: int, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        """Teacher vectors and hashes of rows of the line that begins with batch `first_step`, in dealt order; `numbers`
        int64, ascending, say which. Batches before 0 are those of epochs before the first."""
        batches, within = np.divmod(numbers, self.order.global_batch)
        rows = [self.rows(first_step + int(batch))[within[batches == batch]] for batch in np.unique(batches)]
        flat = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        return torch.from_numpy(self.reader.vectors(flat)), torch.from_numpy(self.reader.hashes(flat))


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
