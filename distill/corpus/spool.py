"""Working files of text preparation: every text of the right length, in order, and its hash in one of the buckets.

Reading may take hours, and a compressed file or a hub's stream has no random access: a journal lets a call that was killed
continue from its last entry, skipping the raw strings that were read before it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, compress, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from distill.corpus.chunks import as_line
from distill.corpus.long_text import Limit, blocks
from distill.corpus.sources import read_translated, source_fingerprints
from distill.corpus.text import NORMAL_FORM, hash_of_form, normal_form, stored
from distill.corpus.text_config import SourceConfig, TextConfig
from distill.run.files import DigestCache, naming, read_json, sha256_of, write_json

logger = logging.getLogger(__name__)
BLOCK_ROWS = 16_384
BLOCK_CHARS = 1 << 26  # long texts come in smaller blocks
JOURNAL_EVERY = 64  # blocks, about a million texts
RECORD = np.dtype([("hash", "<u8"), ("place", "<i8")])


@dataclass(frozen=True)
class Spool:
    """The working files of one `prepare_text`: texts by their place, and records by their hash."""

    folder: Path
    num_buckets: int
    has_rows: bool
    num_translations: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_buckets <= 256:
            raise ValueError(f"num_buckets {self.num_buckets} must be from 1 to 256")

    @property
    def texts(self) -> Path:
        return self.folder / "texts"

    @property
    def translations(self) -> list[Path]:
        """A file for each column, with a line for each text, empty where there is no translation."""
        return [self.folder / f"translation.{column:02d}" for column in range(1, self.num_translations + 1)]

    @property
    def rows(self) -> Path:
        return self.folder / "rows"

    @property
    def statuses(self) -> Path:
        return self.folder / "statuses"

    @property
    def journal(self) -> Path:
        return self.folder / "journal.json"

    @property
    def buckets(self) -> list[Path]:
        return [self.folder / f"bucket.{number:03d}" for number in range(self.num_buckets)]

    def by_bucket(self, records: np.ndarray) -> list[np.ndarray]:
        """Splits records, keeping their order, over the buckets; a lower bucket holds only lower hashes."""
        buckets = ((records["hash"] >> np.uint64(56)) * np.uint64(self.num_buckets)) >> np.uint64(8)
        order = np.argsort(buckets, kind="stable")
        cuts = np.searchsorted(buckets[order], np.arange(1, self.num_buckets, dtype=np.uint64))
        return np.split(records[order], cuts)

    def read_statuses(self, place: int, count: int) -> np.ndarray:
        """uint8 [count], the statuses of the texts from `place` on."""
        return np.fromfile(self.statuses, np.uint8, count, offset=place)

    def read_row_numbers(self, place: int, count: int) -> np.ndarray:
        """int64 [count], the raw row numbers of the texts from `place` on; zeros if they are not recorded."""
        if not self.has_rows:
            return np.zeros(count, np.int64)
        return np.fromfile(self.rows, np.int64, count, offset=place * 8)


@dataclass
class Progress:
    """What has been read: the raw strings of each source, those of them that were spooled, and the counts of all sources.

    untranslated_of: of each source, the number of spooled texts without a translation, by column from 1.
    """

    read_of: list[int]
    spooled_of: list[int]
    counts: Counter[str]
    complete: bool = False
    untranslated_of: list[list[int]] = field(default_factory=list)

    @property
    def num_spooled(self) -> int:
        return sum(self.spooled_of)


def fill(config: TextConfig, spool: Spool, digests: DigestCache, limit: Limit | None = None) -> Progress:
    """Writes texts, records and row numbers, continuing an interrupted call that had the same config, sources and limit."""
    made_from = {
        "journal": 7,
        "normal_form": NORMAL_FORM,
        "num_buckets": spool.num_buckets,
        "has_rows": spool.has_rows,
        "text": config.identity(),
        "sources": source_fingerprints(config, digests),
        **limit_identity(limit),
    }
    progress = _resume(spool, made_from, config.sources)
    if progress.complete:
        return progress
    with ExitStack() as stack:
        files = {path: stack.enter_context(_Appended(path)) for path in _files(spool)}
        buckets = [files[path] for path in spool.buckets]
        total = progress.counts["read"]
        bar = stack.enter_context(tqdm(desc="reading text", unit=" texts", unit_scale=True, disable=None, initial=total))
        num_blocks = 0  # of this call
        for number, source in enumerate(config.sources):
            raw = islice(read_translated(source), progress.read_of[number], None)
            for rows_read in blocks(raw, BLOCK_ROWS, BLOCK_CHARS, lambda row: sum(map(len, row))):
                block = [row[0] for row in rows_read]
                forms = [normal_form(text) for text in block]
                lengths = np.fromiter(map(len, forms), np.int64, len(forms))
                is_long = lengths > (config.max_chars or np.iinfo(np.int64).max)
                fits = (lengths >= config.min_chars) & ~is_long
                texts = [stored(text) for text in compress(block, fits)]
                forms = list(compress(forms, fits))
                fitting = np.flatnonzero(fits)
                if limit is not None:
                    texts, owners = _limited(texts, limit(texts, number), config.min_chars, progress.counts)
                    forms, fitting = [normal_form(text) for text in texts], fitting[owners]
                files[spool.texts].write("".join(map(as_line, texts)).encode())
                for column, path in enumerate(spool.translations, start=1):
                    beside = [row[column] if column < len(row) else "" for row in map(rows_read.__getitem__, fitting.tolist())]
                    translated = [text if normal_form(text) else "" for text in beside]
                    files[path].write("".join(as_line(stored(text)) for text in translated).encode())
                    if source.columns is not None and column < len(source.columns):
                        progress.untranslated_of[number][column - 1] += translated.count("")
                if spool.has_rows:
                    files[spool.rows].write((progress.counts["read"] + fitting).astype(np.int64).tobytes())
                records = np.empty(len(forms), RECORD)
                records["hash"] = np.fromiter(map(hash_of_form, forms), np.int64, len(forms)).view(np.uint64)
                records["place"] = np.arange(progress.num_spooled, progress.num_spooled + len(forms))
                for bucket, part in zip(buckets, spool.by_bucket(records), strict=True):
                    bucket.write(part.tobytes())
                progress.counts["too_short"] += int(np.count_nonzero(lengths < config.min_chars))
                progress.counts["too_long"] += int(np.count_nonzero(is_long))
                progress.counts["read"] += len(block)
                progress.read_of[number] += len(block)
                progress.spooled_of[number] += len(forms)
                bar.update(len(block))
                num_blocks += 1
                if num_blocks % JOURNAL_EVERY == 0:
                    _write_journal(spool, made_from, progress, files)
        progress.complete = True
        if num_blocks >= JOURNAL_EVERY:  # reading less than that again is faster than flushing it
            _write_journal(spool, made_from, progress, files)
    return progress


def _limited(texts: list[str], parts: list[list[str]], min_chars: int, counts: Counter[str]) -> tuple[list[str], np.ndarray]:
    """What takes the place of texts, and the number of each one's text, int64; adds to `counts` what became of long texts.

    Parts of fewer than min_chars visible characters are left out.
    """
    is_cut = [len(found) > 0 and found != [text] for text, found in zip(texts, parts, strict=True)]
    counts["dropped_long"] += sum(not found for found in parts)
    counts["cut"] += sum(is_cut)
    counts["parts"] += sum(len(found) for found in compress(parts, is_cut))
    owners = np.repeat(np.arange(len(parts)), np.array([len(found) for found in parts], np.int64))
    flat = list(chain.from_iterable(parts))
    fits = np.array([len(normal_form(text)) >= min_chars for text in flat], bool)
    counts["short_parts"] += int(np.count_nonzero(~fits))
    return list(compress(flat, fits)), owners[fits]


def limit_identity(limit: Limit | None) -> dict[str, Any]:
    """The part of an identity that says what became of long texts; {} where nothing did."""
    return {} if limit is None else {"limit": dict(limit.identity)}


def _resume(spool: Spool, made_from: dict[str, Any], sources: Sequence[SourceConfig]) -> Progress:
    """The journal's progress, with all files truncated to their sizes at that time; or no progress and an empty spool."""
    journal = read_json(spool.journal)
    problem = None if journal is None else _problem(spool, journal, made_from)
    if journal is not None and problem is None:
        counts, untranslated_of = Counter(journal["counts"]), journal.get("untranslated_of", [])
        return Progress(journal["read_of"], journal["spooled_of"], counts, journal["complete"], untranslated_of)
    if problem is not None:
        logger.warning("text: %s; the sources are read again from the start", problem)
    shutil.rmtree(spool.folder, ignore_errors=True)
    spool.folder.mkdir(parents=True)
    zeros, untranslated_of = [0] * len(sources), [[0] * len((source.columns or [])[1:]) for source in sources]
    counts = Counter(read=0, too_short=0, too_long=0)
    return Progress(list(zeros), list(zeros), counts, untranslated_of=untranslated_of)


def _problem(spool: Spool, journal: dict[str, Any], made_from: dict[str, Any]) -> str | None:
    """Truncates the working files to what the journal records; returns why they cannot be continued, in words, or None."""
    if journal.get("of") != made_from:
        return "the working files are of other sources, or of another config or version"
    for path in _files(spool):
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) < journal["sizes"][path.name]:
            return f"{path} has {size} of the {journal['sizes'][path.name]} bytes that its journal records"
        os.truncate(path, journal["sizes"][path.name])
        if sha256_of(path) != journal["sha256"][path.name]:
            return f"{path} does not match its checksum"
    return None


class _Appended:
    """A working file that is appended to, with the sha256 of all its bytes."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, path.open("ab")
        with path.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256")

    def __enter__(self) -> _Appended:
        return self

    def __exit__(self, *_: object) -> None:
        with naming(self.path):
            self.file.close()

    def write(self, data: bytes) -> None:
        with naming(self.path):
            self.file.write(data)
        self.sha256.update(data)

    def flush(self) -> None:
        """Returns once all is on the disk."""
        with naming(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())


def _write_journal(spool: Spool, made_from: dict[str, Any], progress: Progress, files: Mapping[Path, _Appended]) -> None:
    for appended in files.values():
        appended.flush()
    sizes = {path.name: appended.file.tell() for path, appended in files.items()}
    digests = {path.name: appended.sha256.hexdigest() for path, appended in files.items()}
    state = {name: getattr(progress, name) for name in ("read_of", "spooled_of", "counts", "complete", "untranslated_of")}
    write_json(spool.journal, {"of": made_from, "sizes": sizes, "sha256": digests, **state})


def _files(spool: Spool) -> list[Path]:
    return [spool.texts, *spool.translations, *([spool.rows] if spool.has_rows else []), *spool.buckets]
