"""Weighted sources of training texts: `text.sources[].weight` and a shard set -> the sources of a GlobalOrder."""

from __future__ import annotations

from functools import partial

import numpy as np

from distill.corpus.prepare import source_names
from distill.corpus.text_config import TextConfig
from distill.run.sampling import SampleSource
from distill.shards import Manifest, ShardError, ShardReader


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
    """The sources with their weights; [] where each text is seen once an epoch. Raises ValueError as `check_mixture` does, and
    for a source without a training text."""
    check_mixture(text, reader.manifest)
    if not text.weights:
        return []
    shard_starts = np.concatenate([[0], np.cumsum(reader.shard_rows)])
    starts = reader.source_starts
    sources = []
    for number, (source, weight) in enumerate(zip(reader.manifest.sources, text.weights, strict=True)):
        first, end = starts[number : number + 2].tolist()
        if first == end:
            raise ValueError(f"text.sources[{number}].weight: source {source.name} has no training text: leave the source out")
        inside = np.clip(shard_starts, first, end)  # where each shard's rows of the source begin
        rows = partial(_rows_of, reader, number, inside)
        sources.append(SampleSource(source.name, weight, np.diff(inside), rows))
    return sources


def _rows_of(reader: ShardReader, number: int, starts: np.ndarray, shard: int) -> np.ndarray:
    rows = np.arange(starts[shard], starts[shard + 1])
    if np.any(reader.sources(rows) != number):
        raise ShardError(
            f"{reader.directory}: shard {shard} has texts in another order than that of their sources, so that they cannot be"
            " weighted: leave text.sources[].weight out"
        )
    return rows
