"""From raw strings to text chunks of unique texts, in constant memory for any number of texts.

    sources -> spool.part/texts                 of the right length, one a line; translations in files beside it
            -> spool.part/bucket.*              (hash, place in the spool), by the hash's leading bits
    each bucket, sorted -> spool.part/statuses  one byte a text: kept, duplicate, held out, ...
    spool + statuses -> 000000.txt ..., held_out.txt, and manifest.json last

Texts are duplicates if the 64-bit hashes of their normal forms are equal; in a billion texts, the chance that any two differ
nevertheless is 3%.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import compress, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from distill.corpus.chunks import ChunkWriter, chunk_fingerprint, verify
from distill.corpus.deduplication import HELD_OUT, KEPT, deduplicate
from distill.corpus.long_text import Limit
from distill.corpus.sources import check_source, source_fingerprints
from distill.corpus.spool import BLOCK_ROWS, Progress, Spool, fill, limit_identity
from distill.corpus.text import NORMAL_FORM
from distill.corpus.text_config import TextConfig
from distill.run.files import DigestCache, fingerprint, read_json, sweep, write_json

logger = logging.getLogger(__name__)
HELD_OUT_SOURCES = "held_out.sources.npy"
HISTOGRAM_BINS = 40


def prepare_text(
    config: TextConfig,
    out: Path,
    *,
    rows_per_chunk: int,
    keep_row_numbers: bool = False,
    digests: DigestCache | None = None,
    limit: Limit | None = None,
    num_buckets: int = 256,
) -> dict[str, Any]:
    """Writes the text chunks, the held-out texts and manifest.json into the folder `out`; returns the manifest.

    After a kill, the same call continues from its last journal entry, or writes the chunks again. It starts from the beginning,
    with a warning, if the sources' content has changed or a working file is damaged. `digests`: a cache of the files' sha256.
    `limit`: what becomes of long texts, where `config.long` is chunk or drop; its parts of a text are texts of their own.

    000000.txt ...: `rows_per_chunk` texts each but the last, in the order of the sources. held_out.txt: of the texts with
    hash mod 50 = 0, the `config.held_out` ones of smallest unsigned hash, in that order; no chunk contains any of them.
    NAME.sources.npy (uint16) beside each NAME.txt: the number of each text's source. With keep_row_numbers, NAME.rows.npy
    (int64): the number of each text among the raw ones of all sources, from 0. NAME.translation01.txt ...: of parallel text,
    translations in the lines of their texts; lengths, hashes and duplicates are those of the texts alone. `num_buckets`
    (1..256) changes memory, not results: 64 bytes x texts / num_buckets.

    Memory beyond that: a block of texts, and `config.held_out` texts. Disk: the text once more, and 25 bytes per text.
    Raises ValueError for a source that cannot be read (before any work, where possible), or if no text is left.
    """
    for source in config.sources:
        check_source(source)
    out.mkdir(parents=True, exist_ok=True)
    sweep(out, older_than=0)  # of a killed call; nobody else writes here
    spool = Spool(out / "spool.part", num_buckets, keep_row_numbers, config.num_translations)
    digests = digests or DigestCache(spool.folder / "input_digests.json")
    made_from = text_identity(config, rows_per_chunk, keep_row_numbers, digests, limit)
    try:
        progress = fill(config, spool, digests, limit)
    except BaseException:
        if not can_resume(out):
            shutil.rmtree(spool.folder, ignore_errors=True)
        raise
    counts = Counter(progress.counts)
    status_counts, held_out_places = deduplicate(spool, progress.num_spooled, config.held_out, config.max_sentences)
    counts.update(status_counts)
    if not counts["kept"]:
        shutil.rmtree(spool.folder)
        raise ValueError(_nothing_left(config, counts))
    chunks, held_out, lengths = _write_chunks(spool, progress, held_out_places, out, rows_per_chunk)
    manifest: dict[str, Any] = {
        "version": 1,
        "made_from": made_from,
        "normal_form": NORMAL_FORM,
        "chunks": chunks,
        "held_out": held_out,
        "counts": dict(counts),
        "lengths": _describe_lengths(lengths),
        "sources": _describe_sources(config, progress),
        "fingerprint": hashlib.sha256("".join(map(chunk_fingerprint, [*chunks, held_out])).encode()).hexdigest(),
    }
    write_json(out / "manifest.json", manifest)
    shutil.rmtree(spool.folder, ignore_errors=True)
    logger.info("text: %s", _describe_counts(config, counts))
    for line in _describe_untranslated(manifest["sources"]):
        logger.info("text: %s", line)
    return manifest


def text_identity(
    config: TextConfig, rows_per_chunk: int, keep_row_numbers: bool, digests: DigestCache, limit: Limit | None = None
) -> str:
    """A fingerprint of all that decides what `prepare_text` writes; its manifest has it as "made_from"."""
    form = {"rows_per_chunk": rows_per_chunk, "keep_row_numbers": keep_row_numbers, "normal_form": NORMAL_FORM}
    made_from = {"text": config.identity(), "sources": source_fingerprints(config, digests)}
    return fingerprint(form | made_from | limit_identity(limit))


def held_out_sources(folder: Path) -> list[str] | None:
    """The name of each held-out text's source, in a folder that `prepare_text` wrote; None if the sources are not recorded.

    Raises ValueError if the record is not as it was written.
    """
    manifest, path = read_json(folder / "manifest.json"), folder / HELD_OUT_SOURCES
    if manifest is None or not path.exists():
        return None
    if "sources_sha256" in manifest["held_out"]:  # earlier versions did not record it
        verify(path, manifest["held_out"]["sources_sha256"])
    names = source_names(manifest["sources"])
    return [names[number] for number in np.load(path, allow_pickle=False)]


def source_names(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each source, given as its config's keys, all different: its file or dataset, and its field."""
    names = [
        " ".join(filter(None, (Path(s["path"]).name if s["path"] else s["name"] or s["type"], s["subset"], s["field"])))
        for s in sources
    ]
    return names if len(set(names)) == len(names) else [f"{number} {name}" for number, name in enumerate(names, start=1)]


def can_resume(out: Path) -> bool:
    """Whether an interrupted `prepare_text` left a journal in `out` to continue from."""
    return Spool(out / "spool.part", 1, False).journal.exists()


def _write_chunks(
    spool: Spool, progress: Progress, held_out_places: np.ndarray, out: Path, rows_per_chunk: int
) -> tuple[list[dict[str, Any]], dict[str, Any], Counter[int]]:
    """Pass 2: writes the files of `out`; returns the manifest entries of the chunks and of held_out.txt, and text lengths."""
    lengths: Counter[int] = Counter()
    num_texts, ends = progress.num_spooled, np.cumsum(progress.spooled_of)

    def sources_of(places: np.ndarray) -> np.ndarray:
        return np.searchsorted(ends, places, side="right")

    held_out: dict[int, tuple[bytes, ...]] = {}  # texts with their translations
    held_out_rows: dict[int, int] = {}
    num_translations = spool.num_translations
    with (
        ExitStack() as stack,
        ChunkWriter(out, rows_per_chunk, spool.has_rows, num_translations=num_translations) as chunks,
        tqdm(total=num_texts, desc="writing text chunks", unit=" texts", unit_scale=True, disable=None) as bar,
    ):
        files = [stack.enter_context(path.open("rb")) for path in (spool.texts, *spool.translations)]
        for place in range(0, num_texts, BLOCK_ROWS):
            lines, *translations = (list(islice(file, BLOCK_ROWS)) for file in files)
            statuses = spool.read_statuses(place, len(lines))
            rows = spool.read_row_numbers(place, len(lines))
            kept, *kept_translations = (list(compress(each, statuses == KEPT)) for each in (lines, *translations))
            lengths.update(len(line.decode()) - 1 for line in kept)
            kept_places = place + np.flatnonzero(statuses == KEPT)
            kept_rows = rows[statuses == KEPT]
            chunks.write(kept, rows=kept_rows, sources=sources_of(kept_places), translations=kept_translations)
            for offset in np.flatnonzero(statuses == HELD_OUT).tolist():
                held_out[place + offset] = tuple(each[offset] for each in (lines, *translations))
                held_out_rows[place + offset] = int(rows[offset])
            bar.update(len(lines))
    places = held_out_places.tolist()
    lines, *translations = ([held_out[place][column] for place in places] for column in range(num_translations + 1))
    with ChunkWriter(out, max(1, len(places)), spool.has_rows, "held_out", num_translations) as writer:
        numbers = np.array([held_out_rows[place] for place in places], np.int64)
        writer.write(lines, rows=numbers, sources=sources_of(held_out_places), translations=translations)
    return chunks.entries, writer.entries[0], lengths


def _describe_sources(config: TextConfig, progress: Progress) -> list[dict[str, Any]]:
    """The config's keys of each source, the number of raw texts, and of parallel text that of untranslated ones by column."""
    described = []
    progress_of = zip(progress.read_of, progress.untranslated_of or [[]] * len(config.sources), strict=True)
    for source, (count, untranslated) in zip(config.sources, progress_of, strict=True):
        missing = {"untranslated": dict(zip((source.columns or [])[1:], untranslated, strict=True))} if source.columns else {}
        described.append(source.identity() | {"count": count} | missing)
    return described


def _describe_untranslated(sources: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each source of parallel text."""
    for name, source in zip(source_names(sources), sources, strict=True):
        if missing := source.get("untranslated"):
            counts = ", ".join(f"{column} {count:,}" for column, count in missing.items())
            yield f"{name}: texts of {source['columns'][0]} without a translation: {counts}"


def _describe_lengths(lengths: Counter[int]) -> dict[str, Any]:
    """In characters. histogram: counts[i] texts are at most upto[i] and more than upto[i - 1] characters long."""
    chars = np.array(sorted(lengths))
    counts = np.array([lengths[size] for size in chars.tolist()])
    cumulative = np.cumsum(counts)
    p50, p95 = (int(chars[np.searchsorted(cumulative, fraction * cumulative[-1])]) for fraction in (0.5, 0.95))
    mean = round(float((chars * counts).sum() / cumulative[-1]), 2)
    edges = np.unique(np.linspace(chars[0] - 1, chars[-1], HISTOGRAM_BINS + 1).round().astype(int))
    binned = np.histogram(chars, bins=edges + 1, weights=counts)[0]
    histogram = {"from": int(edges[0]) + 1, "upto": edges[1:].tolist(), "counts": binned.astype(int).tolist()}
    return {"mean_chars": mean, "p50": p50, "p95": p95, "max": int(chars[-1]), "histogram": histogram}


def _nothing_left(config: TextConfig, counts: Counter[str]) -> str:
    sources = ", ".join(source.path or source.name or source.type for source in config.sources)
    return f"no text is left to train on: {_describe_counts(config, counts)}; check these keys and the sources ({sources})"


def _describe_counts(config: TextConfig, counts: Counter[str]) -> str:
    """What became of the texts, and the config key that changes it."""
    reasons = {
        "too_short": f"shorter than text.min_chars = {config.min_chars}",
        "too_long": f"longer than text.max_chars = {config.max_chars}",
        "dropped_long": f"of more tokens than the teacher reads (text.long = {config.long})",
        "short_parts": f"parts shorter than text.min_chars = {config.min_chars}",
        "duplicates": "duplicates",
        "not_sampled": f"not in the sample of text.max_sentences = {config.max_sentences}",
        "held_out_unused": f"held out beyond text.held_out = {config.held_out}",
    }
    dropped = ", ".join(f"{counts[name]:,} {reason}" for name, reason in reasons.items() if counts[name])
    read, cut, parts, kept, held_out = (f"{counts[name]:,}" for name in ("read", "cut", "parts", "kept", "held_out"))
    cuts = f"{cut} of them cut into {parts} (text.long = {config.long}), " if counts["cut"] else ""
    return f"{read} texts read, {cuts}{kept} kept, {held_out} held out for evaluation; dropped: {dropped or 'none'}"
