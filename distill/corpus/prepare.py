"""From raw strings to numbered pieces of unique sentences, in constant memory for a text of any size.

    sources -> spool.part/sentences          normalised, of the right length, one a line
            -> spool.part/bucket.*           (hash, place in the spool), by the hash's leading bits
    each bucket, sorted -> spool.part/fates  one byte a sentence: kept, duplicate, held out, ...
    spool + fates -> 000000.txt ..., held_out.txt, and manifest.json last

Two sentences are the same if their 64-bit hashes are; among a billion, the chance that any two differ nevertheless is 3%.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import compress, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from distill.config import TextConfig
from distill.corpus.fates import HELD_OUT, KEPT, RECORD, Spool, decide_fates
from distill.corpus.pieces import PieceWriter
from distill.corpus.sources import check_source, read_source
from distill.corpus.text import normalise, text_hash
from distill.files import write_json

BLOCK_ROWS = 16_384
T = TypeVar("T")


def prepare_text(
    config: TextConfig,
    out: Path,
    *,
    rows_per_piece: int,
    keep_row_numbers: bool = False,
    show_progress: bool = True,
    num_buckets: int = 256,
) -> dict[str, Any]:
    """Writes the text's pieces, held-out sentences and manifest.json into the fresh folder `out`; returns the manifest.

    000000.txt ...: `rows_per_piece` sentences each but the last, in the order of the sources. held_out.txt: of the
    sentences with hash mod 50 = 0, the `config.held_out` ones of smallest unsigned hash, in that order; none of them is in a
    piece. With keep_row_numbers, NAME.rows.npy (int64) beside each NAME.txt: the number of each sentence among the raw ones
    of all sources, from 0. `num_buckets` (1..256) changes memory, not results: 64 bytes x sentences / num_buckets.

    Memory beyond that: a block of sentences, and `config.held_out` sentences. Disk: the text once more, and 25 bytes a
    sentence. Raises ValueError for a source that cannot be read (before any work, where that can be seen), or no sentence left.
    """
    for source in config.sources:
        check_source(source)
    out.mkdir(parents=True, exist_ok=True)
    spool = Spool(out / "spool.part", num_buckets, keep_row_numbers)
    shutil.rmtree(spool.folder, ignore_errors=True)
    spool.folder.mkdir()
    progress = None if show_progress else True  # tqdm's `disable`; None shows bars on a terminal only
    try:
        counts, source_counts = _fill_spool(config, spool, progress)
        num_sentences = counts["read"] - counts["too_short"] - counts["too_long"]
        fate_counts, held_out_places = decide_fates(spool, num_sentences, config.held_out, config.max_sentences, progress)
        counts.update(fate_counts)
        if not counts["kept"]:
            raise ValueError(_nothing_left(config, counts))
        pieces, held_out, lengths = _write_pieces(spool, num_sentences, held_out_places, out, rows_per_piece, progress)
    finally:
        shutil.rmtree(spool.folder, ignore_errors=True)
    manifest = {
        "version": 1,
        "pieces": pieces,
        "held_out": held_out,
        "counts": dict(counts),
        "lengths": _describe_lengths(lengths),
        "sources": [
            {**source.model_dump(mode="json"), "count": count}
            for source, count in zip(config.sources, source_counts, strict=True)
        ],
        "fingerprint": hashlib.sha256("".join(file["sha256"] for file in [*pieces, held_out]).encode()).hexdigest(),
    }
    write_json(out / "manifest.json", manifest)
    return manifest


def _fill_spool(config: TextConfig, spool: Spool, progress: bool | None) -> tuple[Counter[str], list[int]]:
    """Pass 1: writes sentences, records and row numbers; returns the counts and the raw strings of each source."""
    counts = Counter(read=0, too_short=0, too_long=0)
    source_counts = []
    num_spooled = 0
    with ExitStack() as stack:
        sentences = stack.enter_context(spool.sentences.open("wb"))
        rows = stack.enter_context(spool.rows.open("wb")) if spool.has_rows else None
        buckets = [stack.enter_context(path.open("wb")) for path in spool.buckets]
        bar = stack.enter_context(tqdm(desc="reading text", unit=" sentences", unit_scale=True, disable=progress))
        for source in config.sources:
            before = counts["read"]
            for block in _blocks(read_source(source), BLOCK_ROWS):
                texts = [normalise(text) for text in block]
                lengths = np.fromiter(map(len, texts), np.int64, len(texts))
                fits = (lengths >= config.min_chars) & (lengths <= config.max_chars)
                texts = list(compress(texts, fits))
                sentences.write("".join(f"{text}\n" for text in texts).encode())
                if rows:
                    rows.write((counts["read"] + np.flatnonzero(fits)).astype(np.int64).tobytes())
                records = np.empty(len(texts), RECORD)
                records["hash"] = np.fromiter(map(text_hash, texts), np.int64, len(texts)).view(np.uint64)
                records["place"] = np.arange(num_spooled, num_spooled + len(texts))
                for bucket, part in zip(buckets, spool.by_bucket(records), strict=True):
                    bucket.write(part.tobytes())
                counts["too_short"] += int(np.count_nonzero(lengths < config.min_chars))
                counts["too_long"] += int(np.count_nonzero(lengths > config.max_chars))
                counts["read"] += len(block)
                num_spooled += len(texts)
                bar.update(len(block))
            source_counts.append(counts["read"] - before)
    return counts, source_counts


def _write_pieces(
    spool: Spool, num_sentences: int, held_out_places: np.ndarray, out: Path, rows_per_piece: int, progress: bool | None
) -> tuple[list[dict[str, Any]], dict[str, Any], Counter[int]]:
    """Pass 2: writes the files of `out`; returns manifest entries of the pieces and held-out, and the histogram of lengths."""
    lengths: Counter[int] = Counter()
    held_out: dict[int, tuple[bytes, int]] = {}
    with (
        spool.sentences.open("rb") as sentences,
        PieceWriter(out, rows_per_piece, spool.has_rows) as pieces,
        tqdm(total=num_sentences, desc="writing pieces", unit=" sentences", unit_scale=True, disable=progress) as bar,
    ):
        for place in range(0, num_sentences, BLOCK_ROWS):
            lines = list(islice(sentences, BLOCK_ROWS))
            fates = spool.read_fates(place, len(lines))
            rows = spool.read_row_numbers(place, len(lines))
            kept = list(compress(lines, fates == KEPT))
            lengths.update(len(line.decode()) - 1 for line in kept)
            pieces.write(kept, rows[fates == KEPT])
            for offset in np.flatnonzero(fates == HELD_OUT).tolist():
                held_out[place + offset] = lines[offset], int(rows[offset])
            bar.update(len(lines))
    chosen = [held_out[place] for place in held_out_places.tolist()]
    with PieceWriter(out, max(1, len(chosen)), spool.has_rows, name="held_out") as writer:
        writer.write([line for line, _ in chosen], np.array([row for _, row in chosen], np.int64))
    return pieces.entries, writer.entries[0], lengths


def _blocks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while block := list(islice(iterator, size)):
        yield block


def _describe_lengths(lengths: Counter[int]) -> dict[str, float | int]:
    chars = np.array(sorted(lengths))
    counts = np.array([lengths[size] for size in chars.tolist()])
    cumulative = np.cumsum(counts)
    p50, p95 = (int(chars[np.searchsorted(cumulative, share * cumulative[-1])]) for share in (0.5, 0.95))
    mean = round(float((chars * counts).sum() / cumulative[-1]), 2)
    return {"mean_chars": mean, "p50": p50, "p95": p95, "max": int(chars[-1])}


def _nothing_left(config: TextConfig, counts: Counter[str]) -> str:
    sources = ", ".join(source.path or source.name or source.type for source in config.sources)
    dropped = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if name != "kept")
    return (
        f"no sentence is left to train on: {dropped}; check the sources ({sources}),"
        f" min_chars {config.min_chars} and max_chars {config.max_chars}"
    )
