"""Search over float32, float16, int8 and binary vectors through faiss: what it finds, its size and its speed.

    exact   every document is compared: IndexFlatIP, IndexScalarQuantizer (fp16, 8bit), IndexBinaryFlat
    hnsw    a graph of M = 32 neighbours, built with efConstruction = 200, searched with efSearch = 128 or the number of results
            wanted, if that is larger: IndexHNSWFlat, IndexHNSWSQ, IndexBinaryHNSW

Rescoring searches the quantised vectors for `oversample` times as many candidates, and orders these by the float32 query's dot
product with their int8 or float32 vectors. Those are looked up by row, a few for each query, so they need not be in memory.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from distill.metrics.quantise import Int8, Precision, bytes_per_vector, sign_bits

Search = Literal["exact", "hnsw"]
NEIGHBOURS, EF_CONSTRUCTION, EF_SEARCH = 32, 200, 128
TIMED_QUERIES = 200
FACTORY_NAMES: dict[Precision, str] = {"float32": "Flat", "float16": "SQfp16", "int8": "SQ8"}  # of faiss.index_factory
RESCORED_FROM: dict[Precision, tuple[Precision, ...]] = {"int8": ("float32",), "binary": ("int8", "float32")}


class IndexType(NamedTuple):
    """Vectors of `precision` in an index, and the precision of the vectors that `oversample` x as many are rescored from."""

    search: Search = "exact"
    precision: Precision = "float32"
    rescored: Precision | None = None
    oversample: int = 1

    @property
    def name(self) -> str:
        """float32, int8, binary, binary+int8, hnsw-float32, hnsw-binary+int8, ..."""
        vectors = f"{self.precision}+{self.rescored}" if self.rescored else self.precision
        return vectors if self.search == "exact" else f"{self.search}-{vectors}"


def index_types(searches: Sequence[Search], precisions: Sequence[Precision], oversample: int | None) -> tuple[IndexType, ...]:
    """All combinations; with `oversample`, int8 also rescored from float32, and binary from int8 and from float32.

    Empty if neither searches nor precisions are named. Raises ValueError if there is nothing to rescore.
    """
    if oversample is not None and not any(precision in RESCORED_FROM for precision in precisions):
        raise ValueError("only int8 and binary vectors are rescored; name one of these precisions too")
    found = []
    for search in searches or (["exact"] if precisions else []):
        for precision in precisions or ["float32"]:
            found.append(IndexType(search, precision))
            if oversample is not None:
                found += [IndexType(search, precision, larger, oversample) for larger in RESCORED_FROM.get(precision, ())]
    return tuple(dict.fromkeys(found))


def import_faiss() -> Any:
    """Raises ValueError that says what to install where faiss is missing."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ValueError(
            f"indices and quantised retrieval need faiss ({error}): bash launcher/install.sh quickstart,retrieval"
        ) from None


class VectorIndex:
    """An index over documents [n, d], float32 and L2-normalised, which int8 ranges are taken from too."""

    def __init__(self, index_type: IndexType, documents: np.ndarray) -> None:
        self.type = index_type
        self._index = _empty_index(index_type, documents.shape[1])
        if not self._index.is_trained:
            self._index.train(documents)
        self._index.add(sign_bits(documents) if index_type.precision == "binary" else documents)
        self._documents = documents if index_type.rescored == "float32" else None
        if index_type.rescored == "int8":
            self._int8 = Int8.of_range(documents)
            self._codes = self._int8.encode(documents)

    def search(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Rows of the `count` nearest documents to each query, nearest first: float32 [q, d] -> int64 [q, min(count, n)].

        Queries are L2-normalised. A graph may find fewer; the rest of the row is -1.
        """
        count = min(count, self._index.ntotal)
        wanted = min(count * self.type.oversample, self._index.ntotal)
        if self.type.search == "hnsw":
            self._index.hnsw.efSearch = max(EF_SEARCH, wanted)
        _, rows = self._index.search(sign_bits(queries) if self.type.precision == "binary" else queries, wanted)
        if self.type.rescored is None:
            return rows
        return np.stack([self._rescored(query, found)[:count] for query, found in zip(queries, rows, strict=True)])

    def _rescored(self, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """All of `rows` [c], largest dot product with the query [d] first; -1 stays at the end."""
        rows, missing = rows[rows >= 0], rows[rows < 0]
        scores = self._documents[rows] @ query if self._documents is not None else self._int8.scores(query, self._codes[rows])
        return np.concatenate([rows[np.argsort(-scores, kind="stable")], missing])

    @property
    def num_bytes(self) -> int:
        """Size as faiss serialises it, graph included, without the vectors that are rescored from."""
        faiss = import_faiss()
        sizes: list[int] = []

        def count(data: bytes) -> int:  # rather than serialize_index, which would hold the index twice more
            sizes.append(len(data))
            return len(data)

        write = faiss.write_index_binary if self.type.precision == "binary" else faiss.write_index
        write(self._index, faiss.PyCallbackIOWriter(count))
        return sum(sizes)


def _empty_index(index_type: IndexType, dim: int) -> Any:
    faiss = import_faiss()
    is_graph = index_type.search == "hnsw"
    if index_type.precision == "binary":
        index = faiss.index_binary_factory(8 * bytes_per_vector("binary", dim), f"BHNSW{NEIGHBOURS}" if is_graph else "BFlat")
    else:
        stored = FACTORY_NAMES[index_type.precision]
        name = f"HNSW{NEIGHBOURS}_{stored}" if is_graph else stored
        index = faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT)
    if is_graph:
        index.hnsw.efConstruction = EF_CONSTRUCTION
    return index


def timed_search(
    index_type: IndexType, queries: np.ndarray, documents: np.ndarray, count: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """The rows that VectorIndex.search finds, and the costs of the index on one thread:

    bytes_per_vector            that are searched; rescore_bytes_per_vector: that are looked up besides
    index_bytes                 of the whole index
    build_seconds               from float32 documents to the index
    queries_per_second          one at a time, over the first 200, each for `count` documents
    queries_per_second_batched  all in one call
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    dim = documents.shape[1]
    with threadpool_limits(1):
        start = time.perf_counter()
        index = VectorIndex(index_type, documents)
        built = time.perf_counter()
        index.search(queries[:1], count)  # the first call allocates
        one_by_one = queries[:TIMED_QUERIES]
        begun = time.perf_counter()
        for row in range(len(one_by_one)):
            index.search(one_by_one[row : row + 1], count)
        ended = time.perf_counter()
        rows = index.search(queries, count)
        batched = time.perf_counter() - ended
    costs: dict[str, Any] = {
        "bytes_per_vector": bytes_per_vector(index_type.precision, dim),
        "index_bytes": index.num_bytes,
        "build_seconds": round(built - start, 3),
        "queries_per_second": round(len(one_by_one) / (ended - begun), 3),
        "queries_per_second_batched": round(len(queries) / batched, 3),
    }
    if index_type.rescored:
        rescored = bytes_per_vector(index_type.rescored, dim)
        costs |= {"rescore_bytes_per_vector": rescored, "oversample": index_type.oversample}
    if index_type.search == "hnsw":
        costs |= {"M": NEIGHBOURS, "efSearch": max(EF_SEARCH, min(count * index_type.oversample, len(documents)))}
    return rows, costs
