"""Where the texts of a run are in reused ones: a lookup on disk, made once, with one bucket of hashes in memory at a time.

hashes of this run's texts, and of each reused run's  ->  buckets, by the hash's leading bits
the same bucket of both, joined                       ->  the reused run's row of each text
the texts of both, compared chunk by chunk            ->  NAME.npy for each chunk, and manifest.json last
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from distill.corpus import TextChunk, read_listed_chunk, text_hashes
from distill.corpus.spool import RECORD, Spool
from distill.run.files import fingerprint, flush, naming, read_json, sha256_of, write_json
from distill.run.recorded_array import publish_array
from distill.teacher.reused_run import Prompting, ReusedRun

logger = logging.getLogger(__name__)
NUM_BUCKETS = 256  # 32 bytes of memory x texts / NUM_BUCKETS
ROW_BYTES = 8
Entry = dict[str, Any]


class ReusedRows:
    """Rows of the reused runs for each text of this run's chunks. Raises ValueError if a file is not as it was written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        manifest = read_json(folder / "manifest.json")
        if manifest is None:
            raise ValueError(f"{folder} has no manifest.json: start the command again, which makes it")
        self._chunks: dict[str, Entry] = manifest["chunks"]

    def read(self, name: str) -> np.ndarray:
        """Int64 [num_runs, n] for the n texts of a chunk: the row whose vector is taken, -1 where none is."""
        path = self._folder / f"{name}.npy"
        if not path.is_file() or sha256_of(path) != self._chunks[name]["sha256"]:
            raise ValueError(f"{path} is not as it was written (sha256): delete {self._folder} and start the command again")
        rows: np.ndarray = np.load(path, allow_pickle=False)
        return rows

    def num_missing(self, names: Iterable[str]) -> np.ndarray:
        """For each encoder, the texts of these chunks that it has to read: int64 [num_encoders]."""
        return np.sum([self._chunks[name]["missing"] for name in names], axis=0)


def missing_vectors(rows: np.ndarray, runs: Sequence[ReusedRun], num_encoders: int) -> np.ndarray:
    """Bool [num_encoders, n]: where no run has the encoder's vector of a text. rows: [num_runs, n], -1 for none."""
    missing = np.ones((num_encoders, rows.shape[1]), bool)
    for run, found in zip(runs, rows, strict=True):
        missing[run.encoders.start : run.encoders.stop] &= found < 0
    return missing


def look_up(
    runs: Sequence[ReusedRun],
    texts: Path,
    entries: Sequence[Entry],
    prompting: Sequence[Prompting],
    num_encoders: int,
    out: Path,
) -> Path:
    """The folder, in `out`, of the rows of the same texts in `runs`; made, unless it is there.

    texts, entries: the folder of the text chunks and their entries in its manifest. prompting: of each of their sources.
    A text is the same if its hash, its bytes and the prompt before it are. Where two runs have it, the earlier one's vector is
    taken. Raises ShardError if a shard is damaged, ValueError if a chunk is.
    """
    made_from = {
        "version": 1,
        "chunks": list(entries),
        "prompting": [list(each) for each in prompting],
        "runs": [[run.fingerprint, list(run.encoders), [list(each) for each in run.prompting]] for run in runs],
    }
    folder = out / fingerprint(made_from)[:16]
    if read_json(folder / "manifest.json") is not None:
        return folder
    part = folder.with_suffix(".part")
    for leftover in (part, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    working = part / "buckets"
    with naming(working):
        candidates = _join(runs, texts, entries, working)
    chunks, place = {}, 0
    for entry in tqdm(entries, desc="comparing with reused texts", unit=" chunks", disable=None):
        chunk = read_listed_chunk(texts, entry)
        columns = [_read_rows(path, place, len(chunk.texts)) for path in candidates]
        rows = _same_rows(chunk, columns, runs, prompting, num_encoders)
        publish_array(part / f"{chunk.name}.npy", rows)
        missing = missing_vectors(rows, runs, num_encoders).sum(axis=1).tolist()
        chunks[chunk.name] = {"sha256": sha256_of(part / f"{chunk.name}.npy"), "missing": missing}
        place += len(chunk.texts)
    shutil.rmtree(working)
    write_json(part / "manifest.json", {"chunks": chunks})
    part.rename(folder)
    flush(out)
    return folder


def _same_rows(
    chunk: TextChunk,
    candidates: Sequence[np.ndarray],
    runs: Sequence[ReusedRun],
    prompting: Sequence[Prompting],
    num_encoders: int,
) -> np.ndarray:
    """Int64 [num_runs, n] from each run's rows of equal hash, int64 [n], -1 for none: those of the same text and prompt."""
    sources = np.zeros(len(chunk.texts), np.uint16) if chunk.sources is None else chunk.sources
    rows = np.full((len(runs), len(chunk.texts)), -1, np.int64)
    for number, (run, found) in enumerate(zip(runs, candidates, strict=True)):
        is_free = missing_vectors(rows, runs, num_encoders)[run.encoders.start : run.encoders.stop].all(axis=0)
        places = np.flatnonzero((found >= 0) & is_free)
        here = places.tolist()
        same = run.are_same(found[places], [chunk.texts[p] for p in here], [prompting[n] for n in sources[places].tolist()])
        rows[number, places[same]] = found[places[same]]
    return rows


def _join(runs: Sequence[ReusedRun], texts: Path, entries: Sequence[Entry], working: Path) -> list[Path]:
    """For each run, a file of the int64 row + 1 of equal hash for each text of all chunks, 0 for none."""
    total = sum(entry["rows"] for entry in entries)
    ours = _write_buckets((text_hashes(read_listed_chunk(texts, entry).texts) for entry in entries), working / "texts")
    paths = []
    for number, run in enumerate(runs):
        theirs = _write_buckets(run.hashes(), working / f"run{number}")
        paths.append(working / f"rows{number}")
        with paths[-1].open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, total * ROW_BYTES)  # a mapped file that meets a full disk kills the process
        rows = np.memmap(paths[-1], np.int64, "r+", shape=(total,))
        for wanted, known in zip(ours.buckets, theirs.buckets, strict=True):
            records, reused = np.fromfile(wanted, RECORD), np.fromfile(known, RECORD)
            if len(reused):
                reused = reused[np.argsort(reused["hash"])]
                at = np.minimum(np.searchsorted(reused["hash"], records["hash"]), len(reused) - 1)
                is_equal = reused["hash"][at] == records["hash"]
                rows[records["place"][is_equal]] = reused["place"][at[is_equal]] + 1
        rows.flush()
        shutil.rmtree(theirs.folder)
    return paths


def _read_rows(path: Path, place: int, count: int) -> np.ndarray:
    """Int64 [count]: the rows of the texts from `place` on in a file of `_join`, -1 for none."""
    return np.fromfile(path, np.int64, count, offset=place * ROW_BYTES) - 1


def _write_buckets(hashes: Iterable[np.ndarray], folder: Path) -> Spool:
    """Records (hash, place), by bucket, of hashes int64 [n] that are numbered through."""
    spool, place = Spool(folder, NUM_BUCKETS, has_rows=False), 0
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in spool.buckets]
        for block in _progress(hashes):
            records = np.empty(len(block), RECORD)
            records["hash"] = block.view(np.uint64)
            records["place"] = np.arange(place, place + len(block))
            for file, part in zip(files, spool.by_bucket(records), strict=True):
                file.write(part.tobytes())
            place += len(block)
    return spool


def _progress(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    yield from tqdm(blocks, desc="looking up texts in reused runs", unit=" shards", disable=None)
