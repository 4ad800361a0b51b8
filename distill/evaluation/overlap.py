"""How many texts of the evaluation sets a run was trained on, by the hash of their normal form (corpus/text.py).

Texts that differ in a letter's case or a full stop are different texts. Counted are the teacher's texts of the shards, not
their translations, nor triplets that a stage was fine-tuned on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from distill.corpus.text import text_hashes
from distill.evaluation.tasks import Tasks
from distill.metrics.results import Overlap
from distill.shards import ShardReader

BLOCK_ROWS = 1 << 20


def training_overlap(tasks: Tasks, reader: ShardReader) -> dict[str, dict[str, Overlap]]:
    """Set -> "texts", or "queries" and "documents" -> how many of its distinct texts are among those of the shards.

    Reads the hashes of all shards, a block at a time.
    """
    parts = {(name, kind): np.unique(text_hashes(list(texts))) for name, kind, texts in _parts(tasks)}
    wanted = np.unique(np.concatenate([np.empty(0, np.int64), *parts.values()]))
    found = np.zeros(len(wanted), dtype=bool)
    for start in range(0, len(reader) if len(wanted) else 0, BLOCK_ROWS):
        hashes = reader.hashes(np.arange(start, min(start + BLOCK_ROWS, len(reader))))
        positions = np.searchsorted(wanted, hashes).clip(max=len(wanted) - 1)
        found[positions[wanted[positions] == hashes]] = True
    overlap: dict[str, dict[str, Overlap]] = {}
    for (name, kind), hashes in parts.items():
        count = int(found[np.searchsorted(wanted, hashes)].sum())
        overlap.setdefault(name, {})[kind] = Overlap(found=count, texts=len(hashes))
    return overlap


def _parts(tasks: Tasks) -> Iterator[tuple[str, str, Iterable[str]]]:
    for name, pairs in tasks.sts.items():
        yield name, "texts", pairs.texts
    for name, retrieval in tasks.retrieval.items():
        yield name, "queries", retrieval.queries.values()
        yield name, "documents", retrieval.documents.values()
    for name, labelled in tasks.transfer.items():
        yield name, "texts", labelled.texts
