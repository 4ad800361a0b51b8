"""Retrieval: what a query finds among documents, by cosine.

The default is exact search over float32 vectors, in numpy. Other forms, small vectors and indices, go through faiss (index.py)
and are kept under their names inside of the set's results:

    {"retrieval": {"scifact": {"ndcg@10": .., "recall@10": .., "recall@100": .., "mrr@10": ..,
                               "int8": {"ndcg@10": .., .., "bytes_per_vector": .., "index_bytes": ..}, "binary+int8": {..}}}
     "retrieval_ci":        the same keys, measures alone: [low, high]
     "retrieval_resamples": {"scifact": {"of": .., "ndcg@10": [1000 floats], "int8": {"ndcg@10": [..]}, ..}}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.evaluation.beir import RetrievalSet
from distill.evaluation.bootstrap import draws, identity, interval, means
from distill.evaluation.encode import Encode
from distill.evaluation.index import Form, measured

DEPTH = 100
MEASURES = ("ndcg@10", "recall@10", "recall@100", "mrr@10")
COMPARED = "ndcg@10"  # whose resamples are kept


def retrieval_scores(
    encode: Encode,
    sets: Mapping[str, RetrievalSet],
    *,
    forms: Sequence[Form] = (),
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Means over each set's queries, in 0..1, of ndcg@10 (linear gains, as trec_eval), recall@10, recall@100 and mrr@10.

    With 95% percentile intervals from `bootstrap` resamples of the queries, and the resampled ndcg@10. Every form is measured
    on the same vectors and the same resamples. The keys are those above.
    """
    results: dict[str, Any] = {"retrieval": {}, "retrieval_ci": {}, "retrieval_resamples": {}}
    for name, given in sets.items():
        queries = _unit(encode(list(given.queries.values())))
        documents = _unit(encode(list(given.documents.values())))
        of = identity(seed, {"queries": given.queries, "grades": given.grades, "documents": len(given.documents)})
        drawn = draws(of, len(queries), bootstrap)
        ids = list(given.documents)
        scores, intervals, resampled = _summary(exact_search(queries, documents, DEPTH), ids, given, drawn)
        resampled["of"] = of
        for form in forms:
            rows, costs = measured(form, queries, documents, DEPTH)
            means_of_form, intervals[form.name], resampled[form.name] = _summary(rows, ids, given, drawn)
            scores[form.name] = means_of_form | costs
        for key, value in zip(results, (scores, intervals, resampled), strict=True):
            results[key][name] = value
    return results


def _summary(
    rows: np.ndarray, ids: list[str], given: RetrievalSet, drawn: np.ndarray
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The means, their intervals and the resamples of one search that found `rows` [q, count] for the set's queries."""
    found = ([ids[row] for row in of_query if row >= 0] for of_query in rows)
    by_query = [query_scores(documents, grades) for documents, grades in zip(found, given.grades.values(), strict=True)]
    scores = {measure: np.array([score[measure] for score in by_query]) for measure in MEASURES}
    resampled = {measure: means(values, drawn) for measure, values in scores.items()}
    return (
        {measure: float(values.mean()) for measure, values in scores.items()},
        {measure: interval(values) for measure, values in resampled.items() if len(values)},
        {COMPARED: resampled[COMPARED].round(5).tolist()},
    )


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


def _unit(vectors: np.ndarray) -> np.ndarray:
    """float32 [n, d], L2-normalised; a row of zeros stays one. No copy in float64: a corpus may be large."""
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    return np.ascontiguousarray(vectors / np.where(norms > 0, norms, 1)[:, None].astype(np.float32), dtype=np.float32)
