"""Retrieval sets of a few documents, and an encoder of their words."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

VECTORS = {"q one": [1, 0.02], "q two": [0, 1], "a far": [0, 1], "b": [1, 0.3], "c near": [1, 0], "d": [1, 0.6]}
DOCUMENTS = [("1", "a", "far"), ("2", "", "b"), ("3", "c", "near"), ("4", "d", "")]
QUERIES = [("1", "q one"), ("2", "q two"), ("3", "q")]


def encode(sentences: list[str], role: str | None = None) -> np.ndarray:
    return np.array([VECTORS[text] for text in sentences], dtype=np.float32)


def write_folder(
    folder: Path,
    qrels: str,
    *,
    documents: Sequence[tuple[str, str, str]] = DOCUMENTS,
    queries: Sequence[tuple[str, str]] = QUERIES,
    compress: bool = True,
) -> Path:
    """corpus.jsonl, queries.jsonl and qrels.tsv in BEIR's layout; qrels without the header line."""
    folder.mkdir(exist_ok=True)
    rows: Mapping[str, list[dict[str, str]]] = {
        "corpus.jsonl": [{"_id": name, "title": title, "text": text} for name, title, text in documents],
        "queries.jsonl": [{"_id": name, "text": text} for name, text in queries],
    }
    for name, values in rows.items():
        text = "".join(json.dumps(value) + "\n" for value in values)
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / name).write_text(text)
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return folder
