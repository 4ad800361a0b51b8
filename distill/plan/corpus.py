"""How many sentences a run has and how long they are: counted, read off the text, or assumed, and which of these."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import zstandard

from distill.config import RunConfig, SourceConfig
from distill.corpus import HELD_OUT_MODULUS, read_source
from distill.corpus.rows import COMPRESSIONS
from distill.corpus.sources import matching_files
from distill.plan.devices import Assumed
from distill.shards import Manifest, ShardReader
from distill.stages import read_json

SAMPLE = 2048  # sentences that are tokenized to see how long they are
SPREAD = 4.0  # shape of the gamma distribution that assumed lengths have: deviation half of the mean
BLOCK_OVERHEAD = 4 * 1024  # of a WebDataset sample: tar headers and padding
ROW_OVERHEAD = 8 + 4 + 1  # its hash, where its text starts, its line break


@dataclass(frozen=True)
class Corpus:
    """sentences: those trained on; held_out: embedded too. text_bytes: mean bytes a sentence. lengths: tokens of a sample of
    them for the student, int64, sorted. how: where each figure comes from, in words."""

    sentences: int
    held_out: int
    text_bytes: float
    lengths: np.ndarray
    how: dict[str, str]

    @property
    def tokens(self) -> float:
        """Mean tokens a sentence."""
        return float(self.lengths.mean())

    def shard_bytes(self, dim: int, rows: int, block_rows: int) -> dict[str, float]:
        """{shards, text, vectors, total}: shards of `rows` sentences; per sentence its text, 2 dim of its vector, 13 more; and
        tar headers a block."""
        blocks = -(-self.sentences // block_rows)
        text, vectors = self.sentences * self.text_bytes, self.sentences * 2.0 * dim
        extra = self.sentences * ROW_OVERHEAD + blocks * BLOCK_OVERHEAD
        return {"shards": -(-self.sentences // rows), "text": text, "vectors": vectors, "total": text + vectors + extra}


def look_at_corpus(
    config: RunConfig, assumed: Assumed, tokenizer: Any = None, *, tokens: float | None = None, count: int | None = None
) -> Corpus:
    """The corpus of a run. tokenizer: the student's, where it is at hand; tokens, count: what the user says instead.

    Raises ValueError if the number of sentences can neither be counted nor estimated.
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"{tokens:g} tokens a sentence: give 1 or more")
    sample = _sample(config)
    how: dict[str, str] = {}
    sentences, held_out, text_bytes = _count(config, assumed, sample, count, how)
    longest = config.student.max_length
    if tokens is None and sample and tokenizer is not None:
        encoded = tokenizer(sample, truncation=True, max_length=longest)["input_ids"]
        lengths = np.sort(np.array([len(ids) for ids in encoded], dtype=np.int64))
        how["tokens"] = f"{len(sample):,} sentences of the text, tokenized"
    else:
        mean = min(tokens or assumed.tokens, longest)
        how["tokens"] = "given" if tokens else "assumed"
        draws = np.random.default_rng(0).gamma(SPREAD, mean / SPREAD, SAMPLE)
        lengths = np.sort(np.clip(np.rint(draws), 3, longest).astype(np.int64))
    return Corpus(sentences, held_out, text_bytes, lengths, how)


def _sample(config: RunConfig) -> list[str]:
    """Sentences of the shards, or of the text that can be read here at once; none of the hub's."""
    if (config.shards_dir / "manifest.json").is_file():
        reader = ShardReader(config.shards_dir, verify=False)
        return reader.texts(np.linspace(0, len(reader) - 1, min(SAMPLE, len(reader))).astype(np.int64))
    found: list[str] = []
    for source in config.text.sources:
        if source.type == "file" and matching_files(source):
            found += islice(read_source(source), SAMPLE // len(config.text.sources))
    limits = config.text
    return [text for text in map(str.strip, found) if limits.min_chars <= len(text) <= limits.max_chars]


def _count(
    config: RunConfig, assumed: Assumed, sample: list[str], given: int | None, how: dict[str, str]
) -> tuple[int, int, float]:
    text_bytes = float(np.mean([len(text.encode()) for text in sample])) if sample else assumed.chars
    how["text"] = "a sample of the text" if sample else "assumed"
    if given is not None:
        how["sentences"] = "given"
        return given, min(config.text.held_out, given // HELD_OUT_MODULUS), text_bytes
    if (config.shards_dir / "manifest.json").is_file():
        how["sentences"] = f"counted in {config.shards_dir}"
        return Manifest.load(config.shards_dir).count, config.text.held_out, text_bytes
    text = read_json(config.precompute_dir / "text" / "manifest.json")
    if text is not None:
        how["sentences"], how["text"] = f"counted in {config.precompute_dir / 'text'}", "counted"
        kept = text["counts"]["kept"]
        return kept, text["held_out"]["rows"], sum(piece["bytes"] for piece in text["pieces"]) / kept - 1  # without line breaks
    raw = [raw_count(source, text_bytes) for source in config.text.sources]
    known = [number for number in raw if number is not None]
    if len(known) == len(raw):
        kept = int(sum(known) * assumed.text_kept * (1 - 1 / HELD_OUT_MODULUS))
        how["sentences"] = f"the sources' limits and sizes, of which {assumed.text_kept:.0%} are assumed to be kept"
        if config.text.max_sentences and config.text.max_sentences < kept:
            kept, how["sentences"] = config.text.max_sentences, "text.max_sentences"
    elif config.text.max_sentences:
        kept, how["sentences"] = config.text.max_sentences, "text.max_sentences"
    else:
        unknown = next(s for s, number in zip(config.text.sources, raw, strict=True) if number is None)
        raise ValueError(
            f"how many sentences {unknown.path or unknown.name or unknown.type} has is not known here: give"
            " --sentences N, text.max_sentences=N, or a limit to that source"
        )
    return kept, min(config.text.held_out, kept // HELD_OUT_MODULUS), text_bytes


def raw_count(source: SourceConfig, text_bytes: float) -> int | None:
    """About how many sentences a source has, of so many bytes each; None if that cannot be told from here."""
    if source.type != "file":
        return source.limit
    lines = sum(_lines_in(path, text_bytes) for path in matching_files(source))
    return int(min(lines, source.limit or lines)) or source.limit


def _lines_in(path: Path, text_bytes: float) -> float:
    if path.suffix == ".parquet":
        return parquet.read_metadata(path).num_rows
    return path.stat().st_size * _expansion(path) / (text_bytes + 1)


def _expansion(path: Path, part: int = 1 << 20) -> float:
    """How many times as long a compressed file is once unpacked, by its beginning."""
    if path.suffix not in COMPRESSIONS:
        return 1.0
    with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else zstandard.open(raw) as file:
        return len(file.read(part)) / max(raw.tell(), 1)
