"""Text pieces to shards. No task talks to another: what is missing is a pure function of the directory.

    <run>/precompute/text/000007.txt  ->  <run>/shards/000007.tar        and held_out.txt -> <run>/shards/held_out/000000.tar

`prepare` cuts the text, once. Any number of tasks then call `encode_missing`; whoever finds nothing missing calls `finish_set`.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from distill.config import RunConfig
from distill.corpus import prepare_text, read_piece, text_hash
from distill.files import sha256_of
from distill.shards import Manifest, fingerprint, finish, missing, write_shard
from distill.stages import Stage, read_json, stage_of
from distill.teacher.identity import teacher_identity
from distill.teacher.imported import ImportedVectors

Encode = Callable[[Sequence[str], np.ndarray | None], np.ndarray]


def prepare(config: RunConfig) -> dict[str, Any]:
    """Checks that the run's shards, if any, are this config's; then cuts the text into pieces. Returns the text's manifest.

    Raises ValueError if the run directory was begun with another text or teacher: vectors are too dear to be overwritten.
    """
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with (config.run_dir / ".precompute.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of tasks that start together one cuts the text; a killed one holds it no longer
        return _prepare(config)


def _prepare(config: RunConfig) -> dict[str, Any]:
    stage = stage_of(config, "precompute")
    begun = read_json(stage.directory / "BEGUN.json")
    changes = stage.changes_since(begun) if begun is not None else []
    if changes and any((config.run_dir / "shards").rglob("*.tar")):
        raise ValueError(
            f"{config.run_dir} was begun with another text or teacher ({'; '.join(changes)}): put the config back to go on with"
            f" it, use another name=, or delete {stage.directory} and {config.run_dir / 'shards'}"
        )
    if changes or begun is None:
        (stage.directory / "BEGUN.json").unlink(missing_ok=True)  # so that begin() clears the rest at once
        stage.begin()
    text = stage.directory / "text"
    if not (text / "manifest.json").exists():
        part = stage.directory / "text.part"
        shutil.rmtree(part, ignore_errors=True)
        try:
            prepare_text(
                config.text, part, rows_per_piece=config.shards.rows, keep_row_numbers=config.teacher.vectors is not None
            )
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        part.rename(text)
    manifest = read_json(text / "manifest.json")
    assert manifest is not None
    return manifest


def build_encode(config: RunConfig, device: torch.device, amp: torch.dtype | None, text: dict[str, Any]) -> Encode:
    """What turns the sentences of a piece, and their raw row numbers, into vectors."""
    if config.teacher.vectors is not None:
        imported = ImportedVectors(config.teacher)
        if len(imported) != text["counts"]["read"]:
            raise ValueError(
                f"teacher.vectors: {config.teacher.vectors} has {len(imported):,} rows, the text {text['counts']['read']:,}"
                " raw sentences; there must be one vector for each, in order"
            )

        def rows_of(sentences: Sequence[str], numbers: np.ndarray | None) -> np.ndarray:
            assert numbers is not None
            return imported.rows(numbers)

        return rows_of
    from distill.teacher.encoder import TeacherEncoder

    encoder = TeacherEncoder(config.teacher, device, amp)
    return lambda sentences, numbers: encoder.encode(sentences)


def encode_missing(
    config: RunConfig, text: dict[str, Any], encode: Encode, identity: dict[str, Any], *, task: int = 0, num_tasks: int = 1
) -> int:
    """Writes this task's share of the missing shards, those with index mod num_tasks = task; returns the sentences embedded.

    Shares depend on nothing else, so tasks that start at different times neither meet nor leave a shard to nobody.
    Raises ValueError for a piece of the text that is not as it was written.
    """
    folder = config.run_dir / "precompute" / "text"
    teacher = fingerprint(identity)
    embedded = 0
    for directory, names, entries in _sets(config, text):
        directory.mkdir(parents=True, exist_ok=True)
        share = [index for index in missing(directory, len(names)) if index % num_tasks == task]
        total = sum(entries[index]["rows"] for index in share)
        with tqdm(total=total, desc=f"precompute {directory.name}", unit="sentence", disable=None) as bar:
            for index in share:
                piece = folder / f"{names[index]}.txt"
                if sha256_of(piece) != entries[index]["sha256"]:
                    raise ValueError(f"{piece} is not as it was written (sha256): delete {folder} to cut the text again")
                sentences = read_piece(piece)
                numbers_path = folder / f"{names[index]}.rows.npy"
                numbers = np.load(numbers_path, allow_pickle=False) if numbers_path.exists() else None
                vectors = _in_blocks(encode, sentences, numbers, config.shards.block_rows, bar)
                hashes = np.array([text_hash(sentence) for sentence in sentences], dtype=np.int64)
                write_shard(
                    directory,
                    index,
                    sentences,
                    hashes,
                    vectors,
                    block_rows=config.shards.block_rows,
                    teacher_fingerprint=teacher,
                    text_fingerprint=entries[index]["sha256"],
                )
                embedded += len(sentences)
    return embedded


def _in_blocks(encode: Encode, sentences: list[str], numbers: np.ndarray | None, rows: int, bar: tqdm) -> np.ndarray:
    """Sorting by length stays within a run of blocks, so that memory and the progress bar are steady."""
    step = max(rows, 4096)
    parts = []
    for start in range(0, len(sentences), step):
        chosen = slice(start, start + step)
        parts.append(encode(sentences[chosen], None if numbers is None else numbers[chosen]))
        bar.update(len(parts[-1]))
    return np.concatenate(parts)


def finish_set(config: RunConfig, text: dict[str, Any], identity: dict[str, Any], embedded: int, seconds: float) -> bool:
    """Writes the manifests and DONE.json once no shard is missing; False if some are."""
    stage: Stage = stage_of(config, "precompute")
    if any(missing(directory, len(names)) for directory, names, _ in _sets(config, text)):
        return False
    manifests: list[Manifest] = []
    for directory, names, entries in _sets(config, text):
        manifests.append(
            finish(
                directory,
                teacher=identity,
                teacher_fingerprint=fingerprint(identity),
                text_fingerprint=text["fingerprint"],
                text_fingerprints=[entries[index]["sha256"] for index in range(len(names))],
                rows=config.shards.rows,
                block_rows=config.shards.block_rows,
            )
        )
    main = manifests[0]
    results = {
        "sentences": main.count,
        "held_out": manifests[1].count if len(manifests) > 1 else 0,
        "dim": main.dim,
        "bytes": sum(entry.bytes for entry in main.shards),
        "text": text["counts"],
        "embedded_now": embedded,
        "seconds": round(seconds, 1),
    }
    stage.finish(results, fingerprint({"shards": [entry.sha256 for manifest in manifests for entry in manifest.shards]}))
    return True


def _sets(config: RunConfig, text: dict[str, Any]) -> list[tuple[Path, list[str], list[dict[str, Any]]]]:
    """(directory, piece names, piece entries) of the training set and, if there is one, of the held-out set."""
    shards = config.run_dir / "shards"
    sets = [(shards, [entry["name"] for entry in text["pieces"]], text["pieces"])]
    if text["held_out"]["rows"]:
        sets.append((shards / "held_out", ["held_out"], [text["held_out"]]))
    return sets


def run_precompute(
    config: RunConfig, device: torch.device, amp: torch.dtype | None, *, task: int = 0, num_tasks: int = 1
) -> bool:
    """Prepares the text, embeds this task's share and finishes the set if it is whole; True if it is."""
    started = time.monotonic()
    text = prepare(config)
    identity = teacher_identity(config.teacher, "fp32" if amp is None else "bf16")
    embedded = 0
    if any(missing(directory, len(names)) for directory, names, _ in _sets(config, text)):
        encode = build_encode(config, device, amp, text)
        embedded = encode_missing(config, text, encode, identity, task=task, num_tasks=num_tasks)
    return finish_set(config, text, identity, embedded, time.monotonic() - started)
