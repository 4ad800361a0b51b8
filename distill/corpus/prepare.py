"""From raw strings to numbered pieces of unique sentences, in constant memory for a text of any size.

    sources -> spool.part/sentences          normalised, of the right length, one a line
            -> spool.part/bucket.*           (hash, place in the spool), by the hash's leading bits
    each bucket, sorted -> spool.part/fates  one byte a sentence: kept, duplicate, held out, ...
    spool + fates -> 000000.txt ..., held_out.txt, and manifest.json last

Two sentences are the same if their 64-bit hashes are; among a billion, the chance that any two differ nevertheless is 3%.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from itertools import compress, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from distill.config import TextConfig
from distill.corpus.fates import HELD_OUT, KEPT, decide_fates
from distill.corpus.pieces import PieceWriter
from distill.corpus.sources import check_source
from distill.corpus.spool import BLOCK_ROWS, Spool, fill
from distill.files import publish, sweep, write_json

HELD_OUT_SOURCES = "held_out.sources.npy"

HISTOGRAM_BINS = 40


def prepare_text(
    config: TextConfig,
    out: Path,
    *,
    rows_per_piece: int,
    keep_row_numbers: bool = False,
    show_progress: bool = True,
    num_buckets: int = 256,
) -> dict[str, Any]:
    """Writes the text's pieces, held-out sentences and manifest.json into the folder `out`; returns the manifest.

    If it was killed, the same call goes on from its last journal entry, or writes the pieces again.

    000000.txt ...: `rows_per_piece` sentences each but the last, in the order of the sources. held_out.txt: of the
    sentences with hash mod 50 = 0, the `config.held_out` ones of smallest unsigned hash, in that order; none of them is in a
    piece. held_out.sources.npy (int64) beside it: the number of each one's source. With keep_row_numbers, NAME.rows.npy (int64)
    beside each NAME.txt: the number of each sentence among the raw ones of all sources, from 0. `num_buckets` (1..256) changes
    memory, not results: 64 bytes x sentences / num_buckets.

    Memory beyond that: a block of sentences, and `config.held_out` sentences. Disk: the text once more, and 25 bytes a
    sentence. Raises ValueError for a source that cannot be read (before any work, where that can be seen), or no sentence left.
    """
    for source in config.sources:
        check_source(source)
    out.mkdir(parents=True, exist_ok=True)
    sweep(out, older_than=0)  # of a killed call; nobody else writes here
    spool = Spool(out / "spool.part", num_buckets, keep_row_numbers)
    disable = None if show_progress else True  # tqdm's; None shows bars on a terminal only
    try:
        progress = fill(config, spool, disable)
    except BaseException:
        if not can_resume(out):
            shutil.rmtree(spool.folder, ignore_errors=True)
        raise
    counts = Counter(progress.counts)
    fate_counts, held_out_places = decide_fates(spool, progress.num_spooled, config.held_out, config.max_sentences, disable)
    counts.update(fate_counts)
    if not counts["kept"]:
        shutil.rmtree(spool.folder)
        raise ValueError(_nothing_left(config, counts))
    pieces, held_out, lengths = _write_pieces(spool, progress.num_spooled, held_out_places, out, rows_per_piece, disable)
    with publish(out / HELD_OUT_SOURCES) as file:
        np.save(file, np.searchsorted(np.cumsum(progress.spooled_of), held_out_places, side="right"))
    manifest = {
        "version": 1,
        "pieces": pieces,
        "held_out": held_out,
        "counts": dict(counts),
        "lengths": _describe_lengths(lengths),
        "sources": [
            {**source.model_dump(mode="json"), "count": count}
            for source, count in zip(config.sources, progress.read_of, strict=True)
        ],
        "fingerprint": hashlib.sha256("".join(file["sha256"] for file in [*pieces, held_out]).encode()).hexdigest(),
    }
    write_json(out / "manifest.json", manifest)
    shutil.rmtree(spool.folder, ignore_errors=True)
    return manifest


def held_out_sources(folder: Path) -> list[str] | None:
    """A name for the source of each held-out sentence of a text that `prepare_text` wrote; None if it was not kept."""
    manifest, path = folder / "manifest.json", folder / HELD_OUT_SOURCES
    if not manifest.exists() or not path.exists():
        return None
    names = [_name(source) for source in json.loads(manifest.read_text(encoding="utf-8"))["sources"]]
    if len(set(names)) < len(names):
        names = [f"{number} {name}" for number, name in enumerate(names, start=1)]
    return [names[number] for number in np.load(path, allow_pickle=False)]


def _name(source: dict[str, Any]) -> str:
    what = Path(source["path"]).name if source["path"] else source["name"] or source["type"]
    return " ".join(filter(None, (what, source["subset"], source["field"])))


def can_resume(out: Path) -> bool:
    """Whether a `prepare_text` that was cut off in `out` has come so far that it is worth going on from there."""
    return Spool(out / "spool.part", 1, False).journal.exists()


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


def _describe_lengths(lengths: Counter[int]) -> dict[str, Any]:
    """In characters; histogram: how many sentences are of each length up to `upto`, and above the one before it."""
    chars = np.array(sorted(lengths))
    counts = np.array([lengths[size] for size in chars.tolist()])
    cumulative = np.cumsum(counts)
    p50, p95 = (int(chars[np.searchsorted(cumulative, share * cumulative[-1])]) for share in (0.5, 0.95))
    mean = round(float((chars * counts).sum() / cumulative[-1]), 2)
    edges = np.unique(np.linspace(chars[0] - 1, chars[-1], HISTOGRAM_BINS + 1).round().astype(int))
    binned = np.histogram(chars, bins=edges + 1, weights=counts)[0]
    histogram = {"from": int(edges[0]) + 1, "upto": edges[1:].tolist(), "counts": binned.astype(int).tolist()}
    return {"mean_chars": mean, "p50": p50, "p95": p95, "max": int(chars[-1]), "histogram": histogram}


def _nothing_left(config: TextConfig, counts: Counter[str]) -> str:
    sources = ", ".join(source.path or source.name or source.type for source in config.sources)
    dropped = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if name != "kept")
    return (
        f"no sentence is left to train on: {dropped}; check the sources ({sources}),"
        f" min_chars {config.min_chars} and max_chars {config.max_chars}"
    )
