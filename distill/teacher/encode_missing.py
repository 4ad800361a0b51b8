"""Text chunks to shards: those that are missing and that no other task has claimed.

Reading and tokenizing the next chunk, encoding this one and writing the one before overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

from distill.corpus import TextChunk, read_listed_chunk, text_hashes
from distill.corpus.chunks import chunk_fingerprint
from distill.run.collectives import from_rank_0, is_distributed, rank
from distill.run.throughput import Timing
from distill.shards import missing, write_shard
from distill.teacher.claims import Claims, claimed

Tick = Callable[[int], object]
WAIT = "wait"  # from rank 0, in time for the others' timeout: there is no chunk yet


class Source(Protocol):
    """Makes vectors of a text chunk: `read` on one thread, `encode` on another."""

    def read(self, chunk: TextChunk) -> Any: ...

    def encode(self, read: Any, tick: Tick) -> np.ndarray: ...


class Chunk(NamedTuple):
    """A text chunk whose shard is missing, read and tokenized. sources, translations: as for `write_shard`."""

    folder: Path
    number: int
    claim: Path
    texts: list[str]
    sources: np.ndarray | None
    translations: Sequence[list[str]]
    fingerprint: str
    read: Any


class ShardSet(NamedTuple):
    """The training set or the held-out one: where its shards go, and the text chunks they are made from."""

    folder: Path
    entries: list[dict[str, Any]]


def encode_missing(
    sets: list[ShardSet],
    texts: Path,
    source: Source,
    *,
    teacher_fingerprint: str,
    block_rows: int,
    numbers_sources: bool = False,
    peak: float | None = None,
) -> Timing:
    """Makes missing shards until none is left or live tasks have claimed the rest. Returns the work and its durations.

    texts: the folder of the text chunks. numbers_sources: whether the shards say of which source a text is.
    Raises ValueError for a chunk whose content has changed.
    """
    for shards in sets:
        shards.folder.mkdir(parents=True, exist_ok=True)
    timing = Timing(peak=peak)
    total = sum(entry["rows"] for shards in sets for entry in shards.entries)

    def write(chunk: Chunk, vectors: np.ndarray) -> None:
        with timing.of("write"):
            write_shard(
                chunk.folder,
                chunk.number,
                chunk.texts,
                text_hashes(chunk.texts),
                vectors,
                chunk.sources,
                block_rows=block_rows,
                teacher_fingerprint=teacher_fingerprint,
                text_fingerprint=chunk.fingerprint,
                translations=chunk.translations,
            )
            claims.release(chunk.claim)

    with (
        Claims() as claims,
        ThreadPoolExecutor(1, "reader") as reader,
        ThreadPoolExecutor(1, "writer") as writer,
        tqdm(total=total, desc="precompute", unit=" texts", unit_scale=True, disable=True if rank() else None) as bar,
    ):
        chunks = _read_chunks(sets, texts, source, claims, timing, numbers_sources)
        upcoming: Future[Chunk | None] = reader.submit(next, chunks, None)
        writing: Future[None] | None = None
        try:
            while True:
                with timing.of("wait"):
                    chunk = upcoming.result()
                if chunk is None:
                    break
                upcoming = reader.submit(next, chunks, None)
                bar.n = sum(_rows_present(shards) for shards in sets)
                bar.refresh()
                with timing.of("encode"):
                    vectors = source.encode(chunk.read, bar.update)
                timing.texts += len(chunk.texts)
                with timing.of("wait"):
                    if writing is not None:
                        writing.result()
                if rank() == 0:
                    writing = writer.submit(write, chunk, vectors)
            if writing is not None:
                writing.result()
        finally:
            claims.stop()
    work = getattr(source, "work", None)
    if work is not None:
        timing.texts, timing.reused = timing.texts - work.reused, work.reused
        timing.at_limit, timing.shapes = work.at_limit, len(work.shapes)
        timing.tokens, timing.padded, timing.flops = work.tokens, work.padded, work.flops
    return timing


def _read_chunks(
    sets: list[ShardSet], texts: Path, source: Source, claims: Claims, timing: Timing, numbers_sources: bool
) -> Iterator[Chunk]:
    """Claims missing shards and yields their chunks, read and tokenized."""
    entries_of = {shards.folder: shards.entries for shards in sets}
    for folder, index, claim in _claimed_by_rank_0(claims, sets):
        entry = entries_of[folder][index]
        with timing.of("read"):
            content = read_listed_chunk(texts, entry)
        with timing.of("tokenize"):
            read = source.read(content)
        sources = content.sources if numbers_sources else None
        yield Chunk(folder, index, claim, content.texts, sources, content.translations, chunk_fingerprint(entry), read)


def _claimed_by_rank_0(claims: Claims, sets: list[ShardSet]) -> Iterator[tuple[Path, int, Path]]:
    """What rank 0 claims, on every rank: all ranks of a sharded teacher encode a chunk together."""
    if not is_distributed():
        yield from claimed(claims, lambda: all_missing(sets))
        return
    group = torch.distributed.new_group(backend="gloo")  # another one, since these calls come from the reader's thread
    share = partial(from_rank_0, device=torch.device("cpu"), group=group)
    if rank() == 0:
        for folder, index, claim in claimed(claims, lambda: all_missing(sets), while_waiting=lambda: share(WAIT)):
            share([str(folder), index, str(claim)])
            yield folder, index, claim
        share(None)
        return
    while (item := share(None)) is not None:
        if item != WAIT:
            yield Path(item[0]), item[1], Path(item[2])


def all_missing(sets: Sequence[ShardSet]) -> list[tuple[Path, int]]:
    """(folder, number) of each missing shard."""
    return [(shards.folder, index) for shards in sets for index in missing(shards.folder, len(shards.entries))]


def _rows_present(shards: ShardSet) -> int:
    absent = set(missing(shards.folder, len(shards.entries)))
    return sum(entry["rows"] for index, entry in enumerate(shards.entries) if index not in absent)
