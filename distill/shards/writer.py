"""Writes shards, each complete or absent, and the manifest once all are there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.run.files import publish, sha256_of, sweep
from distill.shards.blocks import block_vectors, count_translations, encode_block, inspect, open_map, scan, tar_end
from distill.shards.format import (
    HELD_OUT,
    MAX_SHARDS,
    MOMENTS,
    VERSION,
    Manifest,
    ShardEntry,
    ShardError,
    SourceEntry,
    moments_name,
    repair_hint,
    tar_name,
)
from distill.shards.moments import Moments
from distill.shards.verify import check_origin

NORM_TOLERANCE = 2e-3
MAX_SHOWN = 80  # characters of a text in a message
README = "README.md"
README_TEXT = """\
---
configs:
- config_name: default
  data_files:
{files}---

Texts and the vectors that a teacher gave them, written by distill. `datasets.load_dataset` of this folder gives a row
per block, `distill.shards.ShardReader` a row per text.
"""
Float16 = NDArray[np.float16]


def missing(directory: Path, num_shards: int) -> list[int]:
    """The indices below `num_shards` whose tar is not in `directory`."""
    present = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    return [index for index in range(num_shards) if tar_name(index) not in present]


def write_shard(
    directory: Path,
    index: int,
    texts: Sequence[str],
    hashes: NDArray[np.int64],
    vectors: Float16,
    sources: NDArray[np.uint16] | None = None,
    *,
    block_rows: int,
    teacher_fingerprint: str,
    text_fingerprint: str,
    translations: Sequence[Sequence[str]] = (),
) -> None:
    """Publishes the moments' sidecar and then the tar of shard `index`, replacing any that are there.

    hashes [n] int64, vectors [n, d] float16, L2-normalised, sources [n] uint16 or None; translations: [n] for each column, ''
    for a text without one. The same input gives the same bytes.
    Raises ValueError for invalid input, OSError if it cannot be written; neither leaves a tar behind.
    """
    _demand_fit(index, texts, hashes, vectors, block_rows)
    if bad := [len(translated) for translated in translations if len(translated) != len(texts)]:
        raise ValueError(f"a column of translations has {bad[0]} entries for {len(texts)} texts")
    starts = range(0, len(texts), block_rows)
    digest, size = hashlib.sha256(), 0
    with publish(directory / tar_name(index)) as file:
        for number, start in enumerate(starts):
            rows = slice(start, start + block_rows)
            data = encode_block(
                index,
                number,
                texts[rows],
                hashes[rows],
                vectors[rows],
                None if sources is None else sources[rows],
                [translated[rows] for translated in translations],
                teacher_fingerprint=teacher_fingerprint,
                text_fingerprint=text_fingerprint,
            )
            size += file.write(data)
            digest.update(data)
        end = tar_end(size)
        file.write(end)
        digest.update(end)
        moments = Moments.of(*(vectors[start : start + block_rows] for start in starts), source=digest.hexdigest())
        moments.save(directory / moments_name(index))


def finish(
    directory: Path,
    *,
    teacher: dict[str, Any],
    teacher_fingerprint: str,
    text_fingerprint: str,
    text_fingerprints: Sequence[str],
    rows: int,
    block_rows: int,
    sources: Sequence[dict[str, Any]] = (),
) -> Manifest:
    """Checks that every shard is there, valid, and of this teacher and text; then merges the moments and writes the manifest.

    text_fingerprints[i]: of the text chunk that shard i was made from; their number is the number of shards. sources: the
    manifest's, if the shards number them.
    Raises ShardError naming the first shard that is missing, damaged or foreign.
    """
    num_shards = len(text_fingerprints)
    if not 0 < num_shards <= MAX_SHARDS:
        raise ValueError(f"a shard set has 1 to {MAX_SHARDS} shards, not {num_shards}: is the text empty?")
    if absent := missing(directory, num_shards):
        raise ShardError(
            f"{directory} lacks {len(absent)} of {num_shards} shards, the first is {tar_name(absent[0])}: run precompute"
        )
    entries: list[ShardEntry] = []

    def checked_moments(index: int) -> Moments:
        entry, moments = _check_finished(
            directory, index, teacher_fingerprint, text_fingerprints[index], rows=rows, block_rows=block_rows
        )
        entries.append(entry)
        return moments

    moments = Moments.merge(map(checked_moments, range(num_shards)))
    moments.save(directory / MOMENTS)
    manifest = Manifest(
        version=VERSION,
        count=moments.count,
        dim=moments.dim,
        dtype="float16",
        rows=rows,
        block_rows=block_rows,
        teacher=teacher,
        teacher_fingerprint=teacher_fingerprint,
        text_fingerprint=text_fingerprint,
        moments_sha256=sha256_of(directory / MOMENTS),
        sources=tuple(SourceEntry(**source) for source in sources),
        shards=tuple(entries),
    )
    manifest.save(directory)
    _write_readme(directory)
    sweep(directory)
    return manifest


def _write_readme(directory: Path) -> None:
    """README.md, which tells datasets.load_dataset the splits: without it, the held-out texts are rows of train."""
    splits = {"test": "*.tar"} if directory.name == HELD_OUT else {"train": "*.tar"}
    if (directory / HELD_OUT).is_dir():
        splits["test"] = f"{HELD_OUT}/*.tar"
    files = "".join(f"  - split: {split}\n    path: '{path}'\n" for split, path in splits.items())
    with publish(directory / README) as file:
        file.write(README_TEXT.format(files=files).encode())


def _check_finished(
    directory: Path, index: int, teacher_fingerprint: str, text_fingerprint: str, *, rows: int, block_rows: int
) -> tuple[ShardEntry, Moments]:
    path, sidecar = directory / tar_name(index), directory / moments_name(index)
    try:
        data = open_map(path)
        shard = scan(data, index)
        check_origin(shard, index, teacher_fingerprint, text_fingerprint)
        if shard.rows > rows or shard.block_rows != min(block_rows, shard.rows):
            raise ShardError(
                f"{path.name}: {shard.rows} rows in blocks of {shard.block_rows}; the set has {rows} in blocks of {block_rows}"
            )
        sha256 = sha256_of(path)
        moments = _sidecar(sidecar, sha256)
        if moments is None:
            inspect(data, index)
            Moments.of(*block_vectors(data, shard), source=sha256).save(sidecar)
            moments = Moments.load(sidecar)
    except ShardError as error:
        raise ShardError(f"{directory}: {error}; delete {path.name} and run precompute, or {repair_hint(directory)}") from None
    if (moments.count, moments.dim) != (shard.rows, shard.dim):
        raise ShardError(
            f"{sidecar}: moments of {moments.count} rows of {moments.dim}, not {shard.rows} of {shard.dim}; delete it"
        )
    entry = ShardEntry(
        name=path.name,
        rows=shard.rows,
        bytes=len(data),
        sha256=sha256,
        text_fingerprint=text_fingerprint,
        moments_sha256=sha256_of(sidecar),
        translations=[[*pair, count] for pair, count in sorted(count_translations(data, shard).items())],
    )
    return entry, moments


def _sidecar(path: Path, sha256: str) -> Moments | None:
    try:
        moments = Moments.load(path)
    except (FileNotFoundError, ValueError):
        return None
    return moments if moments.source == sha256 else None


def _demand_fit(index: int, texts: Sequence[str], hashes: NDArray[Any], vectors: NDArray[Any], block_rows: int) -> None:
    if not 0 <= index < MAX_SHARDS or block_rows < 1 or not len(texts):
        raise ValueError(f"shard {index} with {len(texts)} texts in blocks of {block_rows} cannot be written")
    if hashes.dtype != np.int64 or hashes.shape != (len(texts),):
        raise ValueError(f"hashes are {hashes.dtype} {hashes.shape}, not int64 ({len(texts)},)")
    if vectors.dtype != np.float16 or vectors.ndim != 2 or len(vectors) != len(texts) or not vectors.shape[1]:
        raise ValueError(f"vectors are {vectors.dtype} {vectors.shape}, not float16 ({len(texts)}, d)")
    for start in range(0, len(vectors), 4096):
        norms = np.linalg.norm(vectors[start : start + 4096].astype(np.float32), axis=1)
        bad = np.flatnonzero(~(np.abs(norms - 1) <= NORM_TOLERANCE))
        if len(bad):
            row = start + bad[0]
            raise ValueError(
                f"the vector of text {row} has norm {norms[bad[0]]}, not 1: store finite, L2-normalised vectors. The text, line"
                f" {row + 1} of chunk {index:06d} (of held_out.txt, if it is held out), is {_shorten(texts[row])}; if the"
                " teacher has no token for it, remove it from the sources"
            )


def _shorten(text: str) -> str:
    """As an ASCII literal, so that invisible characters are seen."""
    return ascii(text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}...")
