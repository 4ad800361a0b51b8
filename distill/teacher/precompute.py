"""Text pieces to shards. No task talks to another: what is missing is a pure function of the directory.

    <run>/precompute/text/000007.txt  ->  <run>/shards/000007.tar        and held_out.txt -> <run>/shards/held_out/000000.tar

`prepare` cuts the text, once. Any number of tasks then call `encode_missing`, which deals out what is missing by claims
(claims.py) and overlaps three things: reading and tokenising the next piece, encoding this one, writing the one before.
The ranks of a teacher that is spread over them (ZeRO-3) are one task: rank 0 claims and writes.
Whoever finds nothing missing calls `finish_set`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

from distill.config import RunConfig
from distill.corpus import can_resume, prepare_text, read_piece, text_hash
from distill.files import sha256_of, write_json
from distill.sessions import session
from distill.shards import Manifest, fingerprint, finish, missing, write_shard
from distill.stages import Stage, read_json, stage_of
from distill.teacher.claims import Claims, dealt
from distill.teacher.dev import keep_dev_score
from distill.teacher.identity import teacher_identity
from distill.teacher.imported import ImportedVectors
from distill.teacher.timing import Timing, matmul_peak
from distill.training.distributed import barrier, from_rank_0, is_distributed, rank

Tick = Callable[[int], object]


class Source(Protocol):
    """Sentences of a piece, and their raw row numbers, to vectors: `read` on one thread, `encode` on another."""

    def read(self, sentences: list[str], numbers: np.ndarray | None) -> Any: ...

    def encode(self, read: Any, tick: Tick) -> np.ndarray: ...


class Piece(NamedTuple):
    folder: Path
    number: int
    claim: Path
    sentences: list[str]
    fingerprint: str
    read: Any


class ShardSet(NamedTuple):
    """The training set or the held-out one: where its shards go, and the pieces of text they are made from."""

    folder: Path
    names: list[str]
    entries: list[dict[str, Any]]


def prepare(config: RunConfig) -> dict[str, Any]:
    """Checks that the run's shards, if any, are this config's; then cuts the text into pieces. Returns the text's manifest.

    Raises ValueError if the run directory was begun with another text or teacher: vectors are too dear to be overwritten.
    """
    with _locked(config):
        return _prepare(config)


@contextmanager
def _locked(config: RunConfig) -> Iterator[None]:
    """Of tasks that start together, one at a time; a killed one holds the lock no longer."""
    run_dir = config.precompute_dir.parent
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".precompute.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _prepare(config: RunConfig) -> dict[str, Any]:
    stage = stage_of(config, "precompute")
    begun = read_json(stage.directory / "BEGUN.json")
    changes = stage.changes_since(begun) if begun is not None else []
    if changes and any(config.shards_dir.rglob("*.tar")):
        raise ValueError(
            f"{stage.directory.parent} was begun with another text or teacher ({'; '.join(changes)}): put the config back to"
            f" go on with it, use another name=, or delete {stage.directory} and {config.shards_dir}"
        )
    if changes or begun is None:
        (stage.directory / "BEGUN.json").unlink(missing_ok=True)  # so that begin() clears the rest at once
        stage.begin()
    text = stage.directory / "text"
    if not (text / "manifest.json").exists():
        part = stage.directory / "text.part"
        keep_row_numbers = config.teacher.vectors is not None
        try:
            with session(stage.directory, "text", torch.device("cpu"), alone=True):
                prepare_text(config.text, part, rows_per_piece=config.shards.rows, keep_row_numbers=keep_row_numbers)
        except BaseException:
            if not can_resume(part):
                shutil.rmtree(part, ignore_errors=True)
            raise
        part.rename(text)
    manifest = read_json(text / "manifest.json")
    assert manifest is not None
    return manifest


def identify(config: RunConfig, amp: torch.dtype | None) -> dict[str, Any]:
    """The teacher's identity, kept in precompute/teacher.json, so that only the first task reads all of the weights for it.

    Raises ValueError where it has changed since then, or where this processor would run it in another precision.
    """
    path = config.precompute_dir / "teacher.json"
    with _locked(config):
        known = read_json(path) or {}
        identity, digests = teacher_identity(config.teacher, "fp32" if amp is None else "bf16", known.get("digests"))
        begun_as = known.get("identity", identity)
        if begun_as["precision"] != identity["precision"]:
            raise ValueError(
                f"{config.shards_dir} was begun in {begun_as['precision']}, and this processor would run the teacher in"
                f" {identity['precision']}: set teacher.precision={begun_as['precision']}, or use processors of one kind"
            )
        if begun_as != identity:
            raise ValueError(
                f"the teacher's files have changed since {config.shards_dir} was begun; put them back, use another"
                f" name=, or delete {config.shards_dir} and {path.parent}"
            )
        if not known:
            write_json(path, {"identity": identity, "digests": digests})
    return identity


def open_source(config: RunConfig, device: torch.device, amp: torch.dtype | None, text: dict[str, Any]) -> Source:
    """The teacher, or the vectors that stand for it."""
    if config.teacher.vectors is not None:
        imported = ImportedVectors(config.teacher)
        if len(imported) != text["counts"]["read"]:
            raise ValueError(
                f"teacher.vectors: {config.teacher.vectors} has {len(imported):,} rows, the text {text['counts']['read']:,}"
                " raw sentences; there must be one vector for each, in order"
            )
        return imported
    from distill.teacher.encoder import Teacher

    return Teacher(config.teacher, device, amp, offload=config.precompute_dir / "offload")


def encode_missing(
    config: RunConfig, text: dict[str, Any], source: Source, identity: dict[str, Any], peak: float | None = None
) -> Timing:
    """Makes missing shards until none is left or live tasks have claimed the rest. Returns what it did and how long it took.

    Raises ValueError for a piece of the text that is not as it was written.
    """
    sets = shard_sets(config, text)
    for folder, _, _ in sets:
        folder.mkdir(parents=True, exist_ok=True)
    timing = Timing(peak=peak)
    teacher = fingerprint(identity)
    total = sum(entry["rows"] for shards in sets for entry in shards.entries)
    with (
        Claims() as claims,
        ThreadPoolExecutor(1, "reader") as reader,
        ThreadPoolExecutor(1, "writer") as writer,
        tqdm(total=total, desc="precompute", unit=" sentences", unit_scale=True, disable=True if rank() else None) as bar,
    ):
        pieces = _read_pieces(config, sets, source, claims, timing)
        upcoming: Future[Piece | None] = reader.submit(next, pieces, None)
        writing: Future[None] | None = None
        try:
            while True:
                with timing.of("wait"):
                    piece = upcoming.result()
                if piece is None:
                    break
                upcoming = reader.submit(next, pieces, None)
                bar.n = sum(_rows_present(shards) for shards in sets)
                bar.refresh()
                with timing.of("encode"):
                    vectors = source.encode(piece.read, bar.update)
                timing.sentences += len(piece.sentences)
                with timing.of("wait"):
                    if writing is not None:
                        writing.result()
                if rank() == 0:
                    writing = writer.submit(_write, config, piece, vectors, teacher, claims, timing)
            if writing is not None:
                writing.result()
        finally:
            claims.stop()
    work = getattr(source, "work", None)
    if work is not None:
        timing.tokens, timing.padded, timing.flops, timing.shapes = work.tokens, work.padded, work.flops, len(work.shapes)
    return timing


def _read_pieces(config: RunConfig, sets: list[ShardSet], source: Source, claims: Claims, timing: Timing) -> Iterator[Piece]:
    """The pieces that fall to this task, read and tokenised."""
    texts = config.precompute_dir / "text"
    of_folder = {shards.folder: shards for shards in sets}
    for folder, index, claim in _as_rank_0(dealt(claims, lambda: all_missing(sets))):
        name, entry = of_folder[folder].names[index], of_folder[folder].entries[index]
        with timing.of("read"):
            path = texts / f"{name}.txt"
            if sha256_of(path) != entry["sha256"]:
                raise ValueError(f"{path} is not as it was written (sha256): delete {texts} to cut the text again")
            sentences = read_piece(path)
            numbers_path = texts / f"{name}.rows.npy"
            numbers = np.load(numbers_path, allow_pickle=False) if numbers_path.exists() else None
        with timing.of("tokenize"):
            read = source.read(sentences, numbers)
        yield Piece(folder, index, claim, sentences, entry["sha256"], read)


def _as_rank_0(items: Iterator[tuple[Path, int, Path]]) -> Iterator[tuple[Path, int, Path]]:
    """Rank 0's items on every rank: a teacher whose weights are spread over ranks encodes a piece on all of them together."""
    if not is_distributed():
        yield from items
        return
    # a group of its own, since these calls come from the reader's thread; rank 0 may wait for long before the next piece
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    cpu = torch.device("cpu")
    while True:
        item = next(items, None) if rank() == 0 else None
        item = from_rank_0(None if item is None else [str(item[0]), item[1], str(item[2])], cpu, group)
        if item is None:
            return
        yield Path(item[0]), item[1], Path(item[2])


def _write(config: RunConfig, piece: Piece, vectors: np.ndarray, teacher: str, claims: Claims, timing: Timing) -> None:
    with timing.of("write"):
        write_shard(
            piece.folder,
            piece.number,
            piece.sentences,
            np.array([text_hash(sentence) for sentence in piece.sentences], dtype=np.int64),
            vectors,
            block_rows=config.shards.block_rows,
            teacher_fingerprint=teacher,
            text_fingerprint=piece.fingerprint,
        )
        claims.give_up(piece.claim)


def finish_set(config: RunConfig, text: dict[str, Any], identity: dict[str, Any], timing: Timing) -> bool:
    """Writes the manifests and DONE.json once no shard is missing; False if some are."""
    stage: Stage = stage_of(config, "precompute")
    sets = shard_sets(config, text)
    if all_missing(sets):
        return False
    manifests: list[Manifest] = []
    for folder, names, entries in sets:
        manifests.append(
            finish(
                folder,
                teacher=identity,
                teacher_fingerprint=fingerprint(identity),
                text_fingerprint=text["fingerprint"],
                text_fingerprints=[entries[index]["sha256"] for index in range(len(names))],
                rows=max(config.shards.rows, max(entry["rows"] for entry in entries)),  # the held-out set is one shard
                block_rows=config.shards.block_rows,
            )
        )
    main = manifests[-1]
    results = {
        "sentences": main.count,
        "held_out": manifests[0].count if len(manifests) > 1 else 0,
        "dim": main.dim,
        "bytes": sum(entry.bytes for entry in main.shards),
        "text": text["counts"],
        "last_task": timing.figures(),
    }
    stage.finish(results, fingerprint({"shards": [entry.sha256 for manifest in manifests for entry in manifest.shards]}))
    return True


def shard_sets(config: RunConfig, text: dict[str, Any]) -> list[ShardSet]:
    """The held-out set, if there is one, and the training set: the small piece first, so that encoding begins at once."""
    shards = config.shards_dir
    sets = [ShardSet(shards, [entry["name"] for entry in text["pieces"]], text["pieces"])]
    if text["held_out"]["rows"]:
        sets.insert(0, ShardSet(shards / "held_out", ["held_out"], [text["held_out"]]))
    return sets


def all_missing(sets: Sequence[ShardSet]) -> list[tuple[Path, int]]:
    return [(shards.folder, index) for shards in sets for index in missing(shards.folder, len(shards.names))]


def _rows_present(shards: ShardSet) -> int:
    absent = set(missing(shards.folder, len(shards.names)))
    return sum(entry["rows"] for index, entry in enumerate(shards.entries) if index not in absent)


def run_precompute(
    config: RunConfig, device: torch.device, amp: torch.dtype | None, report: Callable[[str], object] = lambda line: None
) -> bool:
    """Prepares the text, embeds what falls to this task and finishes the set if it is whole; True if it is.

    `report` is told in one line where the time went.
    """
    if rank() > 0:
        barrier()  # rank 0 cuts the text and reads the weights for their identity
    text = prepare(config)
    identity = identify(config, amp)
    if rank() == 0:
        barrier()
    timing = Timing()
    if from_rank_0(bool(all_missing(shard_sets(config, text))), device):
        with session(config.precompute_dir, "embed", device):
            source = open_source(config, device, amp, text)
            timing = encode_missing(config, text, source, identity, matmul_peak(device, amp))
            if config.teacher.vectors is None:
                keep_dev_score(config, lambda texts: source.encode(source.read(texts, None), lambda rows: None), device)
        if timing.sentences and rank() == 0:
            log_task(config, timing)
            report(str(timing))
    return from_rank_0(finish_set(config, text, identity, timing) if rank() == 0 else None, device)


def log_task(config: RunConfig, timing: Timing) -> None:
    """Adds a line to precompute/tasks.jsonl: what this task did and where its time went."""
    line = {"host": socket.gethostname(), "pid": os.getpid(), "ended": round(time.time()), **timing.figures()}
    with (config.precompute_dir / "tasks.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
