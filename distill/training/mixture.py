"""Weighted sources and languages: a shard set and `text.sources[].weight` -> the sources of a GlobalOrder."""

from __future__ import annotations

from functools import partial

import numpy as np

from distill.corpus.prepare import source_names
from distill.corpus.text_config import TextConfig
from distill.run.sampling import SampleSource
from distill.shards import Manifest, ShardError, ShardReader
from distill.training.samples import Samples


def check_mixture(text: TextConfig, manifest: Manifest) -> None:
    """Raises ValueError if the sources have weights and the shards do not say of which of them a text is."""
    if not text.weights:
        return
    if not manifest.sources:
        raise ValueError(
            "text.sources[].weight: these shards were made by an earlier version, which did not record the source of each text:"
            " leave the weights out, or use another name= to make the shards again"
        )
    stored, named = [source.name for source in manifest.sources], source_names(text.identity()["sources"])
    if stored != named:
        raise ValueError(
            f"text.sources[].weight: the shards are of the sources {', '.join(stored)}, the config has {', '.join(named)}: name"
            " the same ones in the same order, or use another name= to make the shards again"
        )


def mixture_of(reader: ShardReader, text: TextConfig) -> list[SampleSource]:
    """The sources of the samples with their shares; [] where each text is a sample once an epoch, in one language.

    Each column of parallel text is a source, with an equal part of the weight of its own, or without weights of its number of
    samples. Raises ValueError as `check_mixture` does, and for a source without a training text.
    """
    check_mixture(text, reader.manifest)
    if not text.weights and reader.num_columns == 1:
        return []
    names, counts, sources = Samples(reader).names, _count_samples(reader), []
    for number, source in enumerate(reader.manifest.sources):
        columns = [column for of_source, column in counts if of_source == number]
        if not columns and text.weights:
            raise ValueError(f"text.sources[{number}].weight: source {source.name} has no training text: leave the source out")
        num_samples = sum(int(counts[number, column].sum()) for column in columns)
        weight = text.weights[number] if text.weights else num_samples / reader.num_samples
        for column in columns:
            samples = partial(_samples_of, reader, number, column)
            sources.append(SampleSource(names[number][column], weight / len(columns), counts[number, column], samples))
    return sources


def _edges(reader: ShardReader, number: int) -> np.ndarray:
    """Where each shard's rows of a source begin, and where the last end, int64 [num_shards + 1]."""
    shard_starts = np.concatenate([[0], np.cumsum(reader.shard_rows)])
    return np.clip(shard_starts, *reader.source_starts[number : number + 2])


def _count_samples(reader: ShardReader) -> dict[tuple[int, int], np.ndarray]:
    """(number of a source, column) -> its samples in each shard, int64 [num_shards]."""
    num_shards, sources = len(reader.shard_rows), reader.manifest.sources
    counts = {(number, 0): np.diff(_edges(reader, number)) for number in range(len(sources))}
    for shard, entry in enumerate(reader.manifest.shards):
        for number, column, count in entry.translations:
            counts.setdefault((number, column), np.zeros(num_shards, np.int64))[shard] = count
    return {pair: shard_rows for pair, shard_rows in sorted(counts.items()) if shard_rows.any()}


def _samples_of(reader: ShardReader, number: int, column: int, shard: int) -> np.ndarray:
    """The numbers of a shard's samples of a source's column."""
    edges = _edges(reader, number)
    rows = np.arange(edges[shard], edges[shard + 1])
    if np.any(reader.sources(rows) != number):
        raise ShardError(
            f"{reader.directory}: shard {shard} has texts in another order than that of their sources, so that these cannot be"
            " mixed: leave text.sources[].weight out, or use another name= to make the shards again"
        )
    if column:
        rows = rows[reader.lengths(rows, np.full(len(rows), column)) > 0]
    return rows + column * len(reader)
