"""Random access to a finished shard set through memory maps; every shard is verified by its checksum first."""

from __future__ import annotations

import mmap
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from distill.run.files import sha256_of
from distill.run.prompts import Role
from distill.shards.blocks import ShardIndex, open_map, scan
from distill.shards.format import MOMENTS, Manifest, ShardError, repair_hint
from distill.shards.moments import Moments
from distill.shards.remote import Remote, is_remote
from distill.shards.verify import check_layout, check_shard

MAX_OPEN = 256
Int64 = NDArray[np.int64]
_verified: set[tuple[str, str, int, int]] = set()


class _Rows(NamedTuple):
    """Rows of one shard: `positions` in the request, `blocks` and `rows` within the shard."""

    positions: Int64
    shard: _OpenShard
    blocks: Int64
    rows: Int64


class _OpenShard:
    """A mapped tar, as arrays of each element size: every array in it starts at a multiple of 64 bytes."""

    def __init__(self, data: mmap.mmap, index: ShardIndex) -> None:
        self.data = data
        self.index = index
        self._windows = sliding_window_view(np.frombuffer(data, "<f2"), index.dim)
        self._int64 = np.frombuffer(data, "<i8")
        self._uint32 = np.frombuffer(data, "<u4")
        self._uint16 = np.frombuffer(data, "<u2")

    def vectors(self, blocks: Int64, rows: Int64) -> NDArray[np.float16]:
        return self._windows[self.index.embeddings[blocks] // 2 + rows * self.index.dim]

    def hashes(self, blocks: Int64, rows: Int64) -> Int64:
        return self._int64[self.index.hashes[blocks] // 8 + rows]

    def sources(self, blocks: Int64, rows: Int64) -> NDArray[np.uint16]:
        """Zeros where the shard has only one source."""
        if self.index.sources is None:
            return np.zeros(len(rows), np.uint16)
        return self._uint16[self.index.sources[blocks] // 2 + rows]

    def spans(self, blocks: Int64, rows: Int64, columns: Int64) -> tuple[Int64, Int64]:
        """Start and stop positions of the texts in `data`, without their line breaks; 0 and 0 for a missing translation."""
        starts, stops = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        for column, (offsets, texts) in {0: (self.index.offsets, self.index.texts), **self.index.translations}.items():
            wanted = np.flatnonzero((columns == column) & (offsets[blocks] >= 0))
            at, base = offsets[blocks[wanted]] // 4 + rows[wanted], texts[blocks[wanted]]
            starts[wanted], stops[wanted] = base + self._uint32[at], base + self._uint32[at + 1] - 1
        return starts, stops


class ShardReader:
    """`reader[i]` is (text, embedding [d] float16) of text i of the whole set; its methods take index arrays, in any order.

    A shard is opened at its first access; its sha256 is then verified against the manifest, once per process and shard, unless
    `verify` is False. At most MAX_OPEN shards are mapped at a time. Raises ShardError naming what is damaged and the fix.

    place: a folder or the URL of one (any file system of fsspec); a shard behind a URL is downloaded into the folder `cache`
    at its first access.
    """

    def __init__(self, place: str | Path, *, verify: bool = True, cache: str | Path | None = None) -> None:
        self._remote: Remote | None = None
        if is_remote(place):
            if cache is None:
                raise ValueError(f"the shards at {place} are remote: name a local folder to cache them in (cache=)")
            self._remote = Remote(str(place), cache)
        self.directory = Path(place) if self._remote is None else self._remote.folder
        self._reopen = partial(ShardReader, place, verify=verify, cache=cache)
        self.manifest = Manifest.load(self.directory) if self._remote is None else self._remote.download_manifest()
        self.shard_rows: Int64 = np.array([entry.rows for entry in self.manifest.shards], dtype=np.int64)
        self._starts: Int64 = np.concatenate([[0], np.cumsum(self.shard_rows)])
        self._verify = verify
        self._indices: dict[int, ShardIndex] = {}
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reopen, ()

    def __len__(self) -> int:
        return self.manifest.count

    def __getitem__(self, index: int) -> tuple[str, NDArray[np.float16]]:
        index += len(self) if index < 0 else 0
        return self.texts([index])[0], self.vectors([index])[0]

    @property
    def dim(self) -> int:
        return self.manifest.dim

    @cached_property
    def moments(self) -> Moments:
        """Of all stored vectors; checked against the manifest."""
        path = self.directory / MOMENTS
        if not path.exists() or sha256_of(path) != self.manifest.moments_sha256:
            raise ShardError(f"{path}: missing, or not as it was written; {repair_hint(self.directory)}")
        return Moments.load(path)

    def verify(self, number: int) -> None:
        """Opens and verifies a shard by its number."""
        self._shard(number)

    @property
    def num_columns(self) -> int:
        """1, and of parallel text as many more as a text may have translations."""
        return max([1, *(len(source.columns) for source in self.manifest.sources)])

    @property
    def num_samples(self) -> int:
        """The texts of the set with all their translations."""
        return len(self) + sum(count for entry in self.manifest.shards for *_, count in entry.translations)

    def texts(self, indices: Int64 | list[int], columns: Int64 | None = None) -> list[str]:
        """The texts, in the order of `indices` [n]. columns [n]: 0, as without them, for what the teacher has read;
        else the number of a translation, '' where there is none."""
        columns = np.zeros(len(indices), np.int64) if columns is None else columns
        texts = [""] * len(indices)
        for positions, shard, blocks, rows in self._locate(indices):
            starts, stops = shard.spans(blocks, rows, columns[positions])
            data = shard.data
            for position, start, stop in zip(positions.tolist(), starts.tolist(), stops.tolist(), strict=True):
                texts[position] = data[start:stop].decode()
        return texts

    def translations(self, indices: Int64 | list[int]) -> dict[str, tuple[list[int], list[str]]]:
        """Of parallel text: column -> (the m positions in `indices` that have a translation there, the m translations)."""
        found: dict[str, tuple[list[int], list[str]]] = {}
        numbers = self.sources(indices)
        for column in range(1, self.num_columns):
            for position, text in enumerate(self.texts(indices, np.full(len(indices), column))):
                if text:
                    name = self.manifest.sources[numbers[position]].columns[column]
                    positions, translations = found.setdefault(name, ([], []))
                    positions.append(position)
                    translations.append(text)
        return found

    def vectors(self, indices: Int64 | list[int]) -> NDArray[np.float16]:
        """[n, d] float16, a copy."""
        vectors_nd = np.empty((len(indices), self.dim), dtype=np.float16)
        for positions, shard, blocks, rows in self._locate(indices):
            vectors_nd[positions] = shard.vectors(blocks, rows)
        return vectors_nd

    def hashes(self, indices: Int64 | list[int]) -> Int64:
        """The text hashes, [n] int64."""
        hashes_n = np.empty(len(indices), dtype=np.int64)
        for positions, shard, blocks, rows in self._locate(indices):
            hashes_n[positions] = shard.hashes(blocks, rows)
        return hashes_n

    def sources(self, indices: Int64 | list[int]) -> NDArray[np.uint16]:
        """The number of each text's source, [n] uint16; the manifest has their names and roles, if there is more to say."""
        sources_n = np.zeros(len(indices), dtype=np.uint16)
        if self.manifest.sources:
            for positions, shard, blocks, rows in self._locate(indices):
                sources_n[positions] = shard.sources(blocks, rows)
        return sources_n

    @cached_property
    def source_starts(self) -> Int64:
        """The first row of each source, and the end of the last, int64 [num_sources + 1]: a set has one source after the other.

        Found by bisection, which opens a few shards for each source. Raises ShardError for a number that is no source's.
        """
        rows, names = range(len(self)), [source.name for source in self.manifest.sources]
        starts = [bisect_left(rows, number, key=lambda row: int(self.sources([row])[0])) for number in range(len(names) + 1)]
        if names and starts[-1] < len(self):
            row, last = starts[-1], len(names) - 1
            what = f"text {row} is of source {self.sources([row])[0]}, and the manifest has sources 0 to {last}"
            raise ShardError(f"{self.directory}: {what}; {repair_hint(self.directory)}")
        return np.array(starts, dtype=np.int64)

    def roles(self, indices: Int64 | list[int]) -> list[Role | None]:
        """What each text is in retrieval, [n]."""
        roles = [source.role for source in self.manifest.sources]
        if not any(roles):
            return [None] * len(indices)
        return [roles[number] for number in self.sources(indices).tolist()]

    def lengths(self, indices: Int64 | list[int], columns: Int64 | None = None) -> Int64:
        """The UTF-8 bytes of each text, [n] int64; 0 of a translation that is missing. columns [n]: as in `texts`."""
        columns = np.zeros(len(indices), np.int64) if columns is None else columns
        lengths_n = np.empty(len(indices), dtype=np.int64)
        for positions, shard, blocks, rows in self._locate(indices):
            starts, stops = shard.spans(blocks, rows, columns[positions])
            lengths_n[positions] = stops - starts
        return lengths_n

    def _locate(self, indices: Int64 | list[int]) -> Iterator[_Rows]:
        wanted = np.asarray(indices, dtype=np.int64)
        if not wanted.size:
            return
        order = np.argsort(wanted, kind="stable")
        ascending = wanted[order]
        if ascending[0] < 0 or ascending[-1] >= len(self):
            raise IndexError(f"indices {ascending[0]} to {ascending[-1]} are outside the set's 0 to {len(self) - 1}")
        shard_of = np.searchsorted(self._starts, ascending, side="right") - 1
        edges = [0, *(np.flatnonzero(np.diff(shard_of)) + 1).tolist(), len(order)]
        for start, stop in pairwise(edges):
            number = int(shard_of[start])
            shard = self._shard(number)
            blocks, rows = np.divmod(ascending[start:stop] - self._starts[number], shard.index.block_rows)
            yield _Rows(order[start:stop], shard, blocks, rows)

    def _shard(self, number: int) -> _OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self._open[number] = self._open_shard(number)
        if len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)
        return shard

    def _open_shard(self, number: int) -> _OpenShard:
        entry = self.manifest.shards[number]
        path = self.directory / entry.name
        if self._remote is not None:
            self._remote.download(entry)
        try:
            data = open_map(path)
            stat = path.stat()
            seen = (str(path.resolve()), entry.sha256, stat.st_size, stat.st_mtime_ns)
            if self._verify and seen not in _verified:
                check_shard(data, path, number, self.manifest)
                _verified.add(seen)
            if number not in self._indices:
                index = scan(data, number)
                check_layout(index, number, self.manifest)
                self._indices[number] = index
        except ShardError as error:
            if self._remote is not None:
                self._remote.drop(entry)
                raise ShardError(f"{self._remote.url}: {error}; the copy in {path.parent} was deleted, try again") from None
            raise ShardError(f"{self.directory}: {error}; {repair_hint(self.directory)}") from None
        return _OpenShard(data, self._indices[number])
