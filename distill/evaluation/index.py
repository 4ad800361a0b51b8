"""Search over float32, float16, int8 and binary vectors through faiss: what each keeps, what it weighs, how fast it is.

    exact   every document is compared: IndexFlatIP, IndexScalarQuantizer (fp16, 8bit), IndexBinaryFlat
    hnsw    a graph of M = 32 neighbours, built with efConstruction = 200, searched with efSearch = 128 (or as many as are
            wanted): IndexHNSWFlat, IndexHNSWSQ, IndexBinaryHNSW

Rescoring searches the small vectors for `oversample` times as many candidates, and orders these by the float32 query's dot
product with their int8 or float32 vectors. Those are looked up by row, a few for each query, so they need not be in memory.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from distill.evaluation.quantise import Int8, Precision, bytes_per_vector, sign_bits

Kind = Literal["exact", "hnsw"]
NEIGHBOURS, EF_CONSTRUCTION, EF_SEARCH = 32, 200, 128
TIMED_QUERIES = 200
RESCORED_FROM: dict[Precision, tuple[Precision, ...]] = {"int8": ("float32",), "binary": ("int8", "float32")}


class Form(NamedTuple):
    """How documents are searched: vectors of `precision` in an index of `kind`, and what `oversample` x are rescored from."""

    kind: Kind = "exact"
    precision: Precision = "float32"
    rescored: Precision | None = None
    oversample: int = 1

    @property
    def name(self) -> str:
        """float32, int8, binary, binary+int8, hnsw-float32, hnsw-binary+int8, ..."""
        vectors = f"{self.precision}+{self.rescored}" if self.rescored else self.precision
        return vectors if self.kind == "exact" else f"{self.kind}-{vectors}"


def forms_of(kinds: Sequence[Kind], precisions: Sequence[Precision], oversample: int | None) -> tuple[Form, ...]:
    """All combinations; with `oversample`, int8 also rescored from float32, and binary from int8 and from float32.

    None at all if neither kinds nor precisions are named. Raises ValueError if there is nothing to rescore.
    """
    if oversample is not None and not any(precision in RESCORED_FROM for precision in precisions):
        raise ValueError("rescoring is of int8 or binary vectors; name one of these precisions too")
    forms = []
    for kind in kinds or (["exact"] if precisions else []):
        for precision in precisions or ["float32"]:
            forms.append(Form(kind, precision))
            if oversample is not None:
                forms += [Form(kind, precision, larger, oversample) for larger in RESCORED_FROM.get(precision, ())]
    return tuple(dict.fromkeys(forms))


def import_faiss() -> Any:
    """Raises ValueError that says what to install where faiss is missing."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ValueError(
            f"indices and small vectors need faiss ({error}): bash launcher/install.sh quickstart,retrieval"
        ) from None


class Index:
    """An index over documents [n, d], float32 and L2-normalised, which int8 ranges are taken from too."""

    def __init__(self, form: Form, documents: np.ndarray) -> None:
        self.form = form
        self._index = _empty_index(form, documents.shape[1])
        if not self._index.is_trained:
            self._index.train(documents)
        self._index.add(sign_bits(documents) if form.precision == "binary" else documents)
        self._documents = documents if form.rescored == "float32" else None
        if form.rescored == "int8":
            self._int8 = Int8.of_range(documents)
            self._codes = self._int8.encode(documents)

    def search(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Rows of the `count` nearest documents to each query, nearest first: float32 [q, d] -> int64 [q, min(count, n)].

        Queries are L2-normalised. A graph may find fewer, and fills up with -1.
        """
        count = min(count, self._index.ntotal)
        wanted = min(count * self.form.oversample, self._index.ntotal)
        if self.form.kind == "hnsw":
            self._index.hnsw.efSearch = max(EF_SEARCH, wanted)
        _, rows = self._index.search(sign_bits(queries) if self.form.precision == "binary" else queries, wanted)
        if self.form.rescored is None:
            return rows
        return np.stack([self._rescored(query, found)[:count] for query, found in zip(queries, rows, strict=True)])

    def _rescored(self, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """All of `rows` [c], largest dot product with the query [d] first; -1 stays at the end."""
        rows, nowhere = rows[rows >= 0], rows[rows < 0]
        scores = self._documents[rows] @ query if self._documents is not None else self._int8.scores(query, self._codes[rows])
        return np.concatenate([rows[np.argsort(-scores, kind="stable")], nowhere])

    @property
    def num_bytes(self) -> int:
        """Of the index as faiss serialises it, graph and all; without the vectors that are rescored from."""
        faiss = import_faiss()
        sizes: list[int] = []

        def count(data: bytes) -> int:  # rather than serialize_index, which would hold the index twice more
            sizes.append(len(data))
            return len(data)

        write = faiss.write_index_binary if self.form.precision == "binary" else faiss.write_index
        write(self._index, faiss.PyCallbackIOWriter(count))
        return sum(sizes)


def _empty_index(form: Form, dim: int) -> Any:
    faiss = import_faiss()
    if form.precision == "binary":
        bits = 8 * bytes_per_vector("binary", dim)
        index = faiss.IndexBinaryFlat(bits) if form.kind == "exact" else faiss.IndexBinaryHNSW(bits, NEIGHBOURS)
    elif form.precision == "float32":
        dot = faiss.METRIC_INNER_PRODUCT
        index = faiss.IndexFlatIP(dim) if form.kind == "exact" else faiss.IndexHNSWFlat(dim, NEIGHBOURS, dot)
    else:
        quantiser = faiss.ScalarQuantizer
        kept = {"float16": quantiser.QT_fp16, "int8": quantiser.QT_8bit}[form.precision]
        dot = faiss.METRIC_INNER_PRODUCT
        if form.kind == "exact":
            index = faiss.IndexScalarQuantizer(dim, kept, dot)
        else:
            index = faiss.IndexHNSWSQ(dim, kept, NEIGHBOURS, dot)
    if form.kind == "hnsw":
        index.hnsw.efConstruction = EF_CONSTRUCTION
    return index


def measured(form: Form, queries: np.ndarray, documents: np.ndarray, count: int) -> tuple[np.ndarray, dict[str, Any]]:
    """What a search of this form finds, as Index.search gives it, and what it costs, on one thread:

    bytes_per_vector            of what is searched; rescore_bytes_per_vector: of what is looked up beside it
    index_bytes                 of the whole index
    build_seconds               from float32 documents to the index
    queries_per_second          one at a time, over the first 200, each for `count` documents
    queries_per_second_batched  all in one call
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    dim = documents.shape[1]
    with threadpool_limits(1):
        start = time.perf_counter()
        index = Index(form, documents)
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
        "bytes_per_vector": bytes_per_vector(form.precision, dim),
        "index_bytes": index.num_bytes,
        "build_seconds": round(built - start, 3),
        "queries_per_second": round(len(one_by_one) / (ended - begun), 3),
        "queries_per_second_batched": round(len(queries) / batched, 3),
    }
    if form.rescored:
        costs |= {"rescore_bytes_per_vector": bytes_per_vector(form.rescored, dim), "oversample": form.oversample}
    if form.kind == "hnsw":
        costs |= {"M": NEIGHBOURS, "efSearch": max(EF_SEARCH, min(count * form.oversample, len(documents)))}
    return rows, costs
