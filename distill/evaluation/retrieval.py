"""Retrieval on a folder in BEIR's layout, by exact search.

    corpus.jsonl(.gz)   {"_id", "title", "text"} a line; a document is "title text"
    queries.jsonl(.gz)  {"_id", "text"} a line
    qrels.tsv           a header line, then query id, document id, grade; above 0 is relevant

Queries without a relevant document are left out. The ids of queries and documents are separate names, so a document that
happens to have the query's id is a document like any other (BEIR's own code would drop it).
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill.evaluation.encode import Encode, unit

Grades = dict[str, dict[str, int]]  # query id -> document id -> grade above 0


class RetrievalFiles(NamedTuple):
    corpus: Path
    queries: Path
    qrels: Path


def retrieval_files(folder: str | Path) -> RetrievalFiles:
    """Where the three files of a BEIR folder are. Raises ValueError that names the one that is not there."""
    names = (
        ("corpus.jsonl", "corpus.jsonl.gz"),
        ("queries.jsonl", "queries.jsonl.gz"),
        ("qrels.tsv", "qrels/test.tsv"),
    )
    found = [next((path for name in either if (path := Path(folder) / name).is_file()), None) for either in names]
    if not Path(folder).is_dir():
        raise ValueError(f"no retrieval set at {folder}: no such folder")
    missing = [" or ".join(either) for either, path in zip(names, found, strict=True) if path is None]
    if missing:
        raise ValueError(f"no retrieval set at {folder}: it has no {', no '.join(missing)}")
    return RetrievalFiles(*(path for path in found if path is not None))


def retrieval_scores(encode: Encode, folder: str | Path) -> dict[str, float]:
    """Means over the queries, each in 0..1, of ndcg@10 (linear gains, as trec_eval), recall@10, recall@100 and mrr@10."""
    files = retrieval_files(folder)
    documents = {row["_id"]: f"{row.get('title') or ''} {row['text']}".strip() for row in _read_jsonl(files.corpus)}
    queries = {row["_id"]: row["text"] for row in _read_jsonl(files.queries)}
    grades = _read_qrels(files.qrels)
    unknown = grades.keys() - queries.keys()
    if unknown:
        raise ValueError(f"{files.qrels} judges query {min(unknown)!r}, which {files.queries} does not have")
    if not grades or not documents:
        raise ValueError(
            f"no retrieval set at {folder}: {'the corpus is empty' if grades else 'no query has a relevant document'}"
        )
    document_ids = list(documents)
    nearest = exact_search(encode([queries[query] for query in grades]), encode(list(documents.values())), 100)
    scores = [query_scores([document_ids[row] for row in rows], of) for rows, of in zip(nearest, grades.values(), strict=True)]
    return {measure: float(np.mean([score[measure] for score in scores])) for measure in scores[0]}


def exact_search(queries: np.ndarray, documents: np.ndarray, count: int) -> np.ndarray:
    """Rows of the `count` documents of largest cosine to each query, nearest first: [q, d], [n, d] -> int64 [q, min(count, n)].

    Equal cosines are in the order of the documents. Blocks of queries keep the scores under 256 MB.
    """
    queries, documents = (unit(vectors).astype(np.float32) for vectors in (queries, documents))
    count = min(count, len(documents))
    block = max(1, 2**26 // len(documents))
    nearest = []
    for start in range(0, len(queries), block):
        scores = queries[start : start + block] @ documents.T
        rows = np.sort(np.argpartition(scores, -count, axis=1)[:, -count:], axis=1)
        order = np.argsort(-np.take_along_axis(scores, rows, axis=1), axis=1, kind="stable")
        nearest.append(np.take_along_axis(rows, order, axis=1))
    return np.concatenate(nearest)


def query_scores(found: list[str], grades: dict[str, int]) -> dict[str, float]:
    """The four measures of one query: `found` nearest first, `grades` of its relevant documents, at least one."""
    gains = [grades.get(document, 0) for document in found]
    first = next((rank for rank, gain in enumerate(gains[:10], start=1) if gain), None)
    return {
        "ndcg@10": _dcg(gains[:10]) / _dcg(sorted(grades.values(), reverse=True)[:10]),
        "recall@10": sum(gain > 0 for gain in gains[:10]) / len(grades),
        "recall@100": sum(gain > 0 for gain in gains[:100]) / len(grades),
        "mrr@10": 1 / first if first else 0.0,
    }


def _dcg(gains: list[int]) -> float:
    return float(np.sum(np.array(gains) / np.log2(np.arange(2, len(gains) + 2))))


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if not (isinstance(row, dict) and isinstance(row.get("_id"), str) and isinstance(row.get("text"), str)):
            raise ValueError(f"{path}, line {number} has no `_id` and `text` that are strings")
        rows.append(row)
    return rows


def _read_qrels(path: Path) -> Grades:
    grades: Grades = {}
    for number, line in enumerate(_read_lines(path)[1:], start=2):
        if not line.strip():
            continue
        try:
            query, document, grade = line.split("\t")
            if int(grade) > 0:
                grades.setdefault(query, {})[document] = int(grade)
        except ValueError:
            raise ValueError(f"{path}, line {number} is not query id, document id and a whole grade between tabs") from None
    return grades


def _read_lines(path: Path) -> list[str]:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8").replace("\r\n", "\n").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
