"""Number and length of a run's texts: counted in its shards or prepared text, sampled from its sources, or assumed."""

from __future__ import annotations

import gzip
import sys
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import zstandard

from distill.config import RunConfig
from distill.corpus import HELD_OUT_MODULUS, read_source
from distill.corpus.rows import COMPRESSIONS
from distill.corpus.sources import matching_files
from distill.corpus.text_config import SourceConfig
from distill.plan.devices import Assumptions
from distill.run.files import read_json
from distill.shards import ShardReader

SAMPLE_TEXTS = 2048
LONGEST = 1 << 16  # tokens
GAMMA_SHAPE = 4.0  # of the distribution of assumed lengths, whose standard deviation is then half of the mean


@dataclass(frozen=True)
class TextEstimate:
    """Texts to train on and held-out texts, which are embedded too; lengths: tokens of a sample, not truncated, int64, sorted;
    estimated_from: the source of num_texts, tokens_per_text and bytes_per_text, in words; samples_per_text: 1, and of parallel
    text the number of translations more."""

    num_texts: int
    num_held_out: int
    bytes_per_text: float
    lengths: np.ndarray
    estimated_from: dict[str, str]
    samples_per_text: float = 1.0

    @property
    def num_samples(self) -> int:
        """Training samples of an epoch."""
        return int(self.num_texts * self.samples_per_text)

    @property
    def tokens_per_text(self) -> float:
        return float(self.lengths.mean())

    def truncated(self, max_length: int) -> TextEstimate:
        """The texts as an encoder of this length reads them."""
        return replace(self, lengths=np.minimum(self.lengths, max_length))


def estimate_text(
    config: RunConfig,
    assumed: Assumptions,
    tokenizer_folder: Path | None = None,
    *,
    tokens_per_text: float | None = None,
    num_texts: int | None = None,
) -> TextEstimate:
    """Estimates a run's text. tokenizer_folder: the student's, if it is local; the last two replace what would be found.

    Raises ValueError if the number of texts can be neither counted nor estimated.
    """
    if tokens_per_text is not None and tokens_per_text < 1:
        raise ValueError(f"{tokens_per_text:g} tokens a sentence: give 1 or more")
    reader = ShardReader(config.shards_dir, verify=False) if (config.shards_dir / "manifest.json").is_file() else None
    sample = _sample(config, reader)
    bytes_per_text = float(np.mean([len(text.encode()) for text in sample])) if sample else assumed.chars
    sources = {"bytes_per_text": "a sample of the text" if sample else "assumed"}
    prepared = read_json(config.precompute_dir / "text" / "manifest.json")
    if num_texts is not None:
        sources["num_texts"] = "given"
    elif reader is not None:
        num_texts, sources["num_texts"] = len(reader), f"counted in {config.shards_dir}"
    elif prepared is not None:
        num_texts = int(prepared["counts"]["kept"])
        bytes_per_text = sum(file["bytes"] for file in prepared["chunks"]) / num_texts - 1  # without line breaks
        sources |= {"num_texts": f"counted in {config.precompute_dir / 'text'}", "bytes_per_text": "counted"}
    else:
        num_texts, sources["num_texts"] = _estimate_num_texts(config, assumed, bytes_per_text)
    tokenizer = _load_tokenizer(tokenizer_folder) if sample and tokens_per_text is None else None
    if tokenizer is not None:
        encoded = tokenizer(sample, truncation=True, max_length=LONGEST)["input_ids"]
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        sources["tokens_per_text"] = f"{len(sample):,} texts, tokenized"
    else:
        mean = tokens_per_text or assumed.tokens
        draws = np.random.default_rng(0).gamma(GAMMA_SHAPE, mean / GAMMA_SHAPE, SAMPLE_TEXTS)
        lengths = np.clip(np.rint(draws), 3, LONGEST).astype(np.int64)
        sources["tokens_per_text"] = "given" if tokens_per_text else "assumed"
    num_held_out = min(config.text.held_out, num_texts // HELD_OUT_MODULUS)
    samples_per_text = _samples_per_text(config, bytes_per_text) if reader is None else reader.num_samples / len(reader)
    return TextEstimate(num_texts, num_held_out, bytes_per_text, np.sort(lengths), sources, samples_per_text)


def _samples_per_text(config: RunConfig, bytes_per_text: float) -> float:
    """At most: as if no translation were missing."""
    columns = [len(source.columns or [""]) for source in config.text.sources]
    counts = [raw_count(source, bytes_per_text) for source in config.text.sources] if max(columns) > 1 else [1] * len(columns)
    return float(np.average(columns, weights=[count or 0 for count in counts])) if any(counts) else float(max(columns))


def _load_tokenizer(folder: Path | None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if folder else None
    except (OSError, ValueError):
        return None


def _sample(config: RunConfig, reader: ShardReader | None) -> list[str]:
    """Texts of the shards, or of the local files; none of a Hugging Face dataset."""
    if reader is not None:
        return reader.texts(np.linspace(0, len(reader) - 1, min(SAMPLE_TEXTS, len(reader))).astype(np.int64))
    found: list[str] = []
    for source in config.text.sources:
        if source.type != "huggingface" and matching_files(source):
            found += islice(read_source(source), SAMPLE_TEXTS // len(config.text.sources))
    limits = config.text
    return [text for text in map(str.strip, found) if limits.min_chars <= len(text) <= (limits.max_chars or sys.maxsize)]


def _estimate_num_texts(config: RunConfig, assumed: Assumptions, bytes_per_text: float) -> tuple[int, str]:
    """The number of texts that preparing the sources would keep, and the source of the estimate."""
    limit = config.text.max_sentences
    counts = [raw_count(source, bytes_per_text) for source in config.text.sources]
    if None not in counts:
        kept = int(sum(count or 0 for count in counts) * assumed.text_kept * (1 - 1 / HELD_OUT_MODULUS))
        if not limit or kept <= limit:
            return kept, f"limits and sizes of the sources, of which {assumed.text_kept:.0%} is assumed to be kept"
    if limit:
        return limit, "text.max_sentences"
    unknown = config.text.sources[counts.index(None)]
    raise ValueError(
        f"how many sentences {unknown.path or unknown.name or unknown.type} has is not known here: give --sentences N,"
        " text.max_sentences=N, or a limit to that source"
    )


def raw_count(source: SourceConfig, bytes_per_text: float) -> int | None:
    """About how many texts of `bytes_per_text` bytes a source has; None if that is not known without reading a dataset."""
    if source.type == "huggingface":
        return source.limit
    lines, bytes_per_row = 0.0, (bytes_per_text + 1) * len(source.columns or [""])
    for path in matching_files(source):
        if path.suffix == ".parquet":
            lines += parquet.read_metadata(path).num_rows
        else:
            lines += path.stat().st_size * _compression_ratio(path) / bytes_per_row
    return int(min(lines, source.limit or lines)) or source.limit


def _compression_ratio(path: Path, sample_bytes: int = 1 << 20) -> float:
    """Uncompressed over compressed size of a file's beginning."""
    if path.suffix not in COMPRESSIONS:
        return 1.0
    with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else zstandard.open(raw) as file:
        return len(file.read(sample_bytes)) / max(raw.tell(), 1)
