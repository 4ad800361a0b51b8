"""Retrieval: what a query finds among documents, by cosine.

Without index types, search is exact over float32 vectors, in numpy. Other index types go through faiss (index_types.py); their
results are under their names inside those of the set: {"scifact": {"ndcg@10": .., .., "int8": {"ndcg@10": .., ..}}}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.corpus.evaluation_sets import RetrievalSet
from distill.evaluation.index_types import IndexType, timed_search
from distill.metrics.bootstrap import interval, resampled_means, sample_name
from distill.metrics.results import Resampled
from distill.metrics.vectors import RoleEncode, unit_float32

DEPTH = 100
MEASURES = ("ndcg@10", "recall@10", "recall@100", "mrr@10")
COMPARED = "ndcg@10"  # the measure whose resamples are kept


def retrieval_scores(
    encode: RoleEncode,
    sets: Mapping[str, RetrievalSet],
    *,
    types: Sequence[IndexType] = (),
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Means over each set's queries, in 0..1, of ndcg@10 (linear gains, as trec_eval), recall@10, recall@100 and mrr@10.

    With 95% percentile intervals from `bootstrap` resamples of the queries: the fields retrieval, retrieval_* of ModelResults.
    Every index type is measured on the same vectors and the same resamples. Documents with equal scores are ranked in the order
    of the set, which does not depend on that of its files. A document that is the query itself is no result, as in BEIR and
    mteb.
    """
    results: dict[str, Any] = {"retrieval": {}, "retrieval_ci": {}, "retrieval_resamples": {}}
    for name, given in sets.items():
        queries = unit_float32(encode(list(given.queries.values()), "query"))
        documents = unit_float32(encode(list(given.documents.values()), "document"))
        sample = sample_name(
            seed, {"queries": list(given.queries.items()), "grades": given.grades, "documents": len(given.documents)}
        )
        found: list[tuple[str, dict[str, np.ndarray], dict[str, Any]]] = []  # index type, measure -> [q], costs
        depth = DEPTH + bool(given.among_documents)
        found.append(("", _by_query(exact_search(queries, documents, depth), given), {}))
        for index_type in types:
            rows, costs = timed_search(index_type, queries, documents, depth)
            found.append((index_type.name, _by_query(rows, given), costs))
        drawn = iter(resampled_means([values for _, of_type, _ in found for values in of_type.values()], sample, bootstrap))
        scores: dict[str, Any] = {}
        intervals: dict[str, Any] = {}
        for index, of_type, costs in found:
            resampled = {measure: next(drawn) for measure in of_type}
            means = {measure: float(values.mean()) for measure, values in of_type.items()}
            within = {measure: interval(values) for measure, values in resampled.items() if bootstrap}
            kept = Resampled(score=means[COMPARED], sample=sample, values=resampled[COMPARED].round(5).tolist())
            results["retrieval_resamples"][" ".join(filter(None, [name, index, COMPARED]))] = kept
            scores |= {index: means | costs} if index else means
            intervals |= {index: within} if index else within
        results["retrieval"][name], results["retrieval_ci"][name] = scores, intervals
    return results


def _by_query(rows: np.ndarray, given: RetrievalSet) -> dict[str, np.ndarray]:
    """Each measure [q] of the queries, which found the documents `rows` [q, count]."""
    ids, itself = list(given.documents), given.among_documents
    scores = []
    for (query, grades), of_query in zip(given.grades.items(), rows, strict=True):
        found = [ids[row] for row in of_query if row >= 0 and not (ids[row] == query and query in itself)]
        scores.append(query_scores(found[:DEPTH], grades))
    return {measure: np.array([score[measure] for score in scores]) for measure in MEASURES}


def exact_search(queries: np.ndarray, documents: np.ndarray, count: int) -> np.ndarray:
    """Rows of the `count` documents of largest dot product with each query, largest first.

    float32 [q, d], [n, d] -> int64 [q, min(count, n)]. Equal ones are in the order of the documents. Blocks of queries keep the
    scores under 256 MB.
    """
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
