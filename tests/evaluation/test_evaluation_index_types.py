import sys
from itertools import product

import numpy as np
import pytest
from retrieval_sets import encode, write_folder

from distill.corpus.evaluation_sets import read_retrieval
from distill.evaluation.index_types import IndexType, VectorIndex, index_types, timed_search
from distill.evaluation.retrieval import MEASURES, exact_search, retrieval_scores
from distill.metrics.quantise import Int8, sign_bits, signs

TYPES = index_types(["exact", "hnsw"], ["float32", "float16", "int8", "binary"], 4)
INDEX_NAMES = [each.name for each in TYPES]


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clustered(dim: int = 36) -> tuple[np.ndarray, np.ndarray]:
    """3,000 documents around 60 centres, and a query near each centre; dim is no multiple of 8."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((60, dim))
    documents = np.repeat(centres, 50, axis=0) + 0.6 * rng.standard_normal((3000, dim))
    return unit(centres + 0.3 * rng.standard_normal((60, dim))), unit(documents)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([len(set(x) & set(y)) / len(x) for x, y in zip(a.tolist(), b.tolist(), strict=True)]))


def test_every_combination_has_a_name_of_its_own_and_only_quantised_vectors_are_rescored():
    names = [each.name for each in TYPES]
    assert len(set(names)) == len(names) == 2 * (4 + 3)
    assert {"float32", "int8+float32", "binary+int8", "hnsw-binary+float32"} < set(names)
    assert index_types([], [], None) == ()
    assert [each.name for each in index_types(["hnsw"], [], None)] == ["hnsw-float32"]
    with pytest.raises(ValueError, match="only int8 and binary"):
        index_types(["exact"], ["float16"], 4)


def test_without_faiss_the_message_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"bash launcher/install\.sh quickstart,retrieval"):
        VectorIndex(IndexType(), np.eye(4, dtype=np.float32))


class TestWithFaiss:
    @pytest.fixture(autouse=True)
    def faiss(self):
        return pytest.importorskip("faiss", reason="faiss is not installed: bash launcher/install.sh quickstart,retrieval")

    def test_exact_float32_is_the_search_in_numpy(self):
        queries, documents = clustered()
        assert (VectorIndex(IndexType(), documents).search(queries, 20) == exact_search(queries, documents, 20)).all()

    def test_int8_finds_what_numpy_finds_among_decoded_vectors(self):
        queries, documents = clustered()
        int8 = Int8.of_range(documents)
        decoded = exact_search(queries, int8.decode(int8.encode(documents)), 20)
        # levels lie elsewhere within their steps than faiss's, so near ties change places
        assert overlap(VectorIndex(IndexType("exact", "int8"), documents).search(queries, 20), decoded) > 0.97

    def test_binary_is_ordered_by_differing_bits(self):
        queries, documents = clustered()
        rows = VectorIndex(IndexType("exact", "binary"), documents).search(queries, 20)
        agreement = signs(sign_bits(queries), 36) @ signs(sign_bits(documents), 36).T
        found = np.take_along_axis(agreement, rows, axis=1)
        assert (found == -np.sort(-agreement, axis=1)[:, :20]).all()

    @pytest.mark.parametrize(("precision", "larger"), [("int8", "float32"), ("binary", "int8"), ("binary", "float32")])
    def test_rescoring_all_documents_is_exact_search_of_the_larger_vectors(self, precision, larger):
        queries, documents = clustered()
        rows = VectorIndex(IndexType("exact", precision, larger, oversample=3000), documents).search(queries, 20)
        int8 = Int8.of_range(documents)
        rescored_from = documents if larger == "float32" else int8.decode(int8.encode(documents))
        assert overlap(rows, exact_search(queries, rescored_from, 20)) > 0.999

    def test_rescoring_finds_what_bits_alone_do_not(self):
        queries, documents = clustered()
        exact = exact_search(queries, documents, 10)
        alone, rescored = (
            overlap(VectorIndex(index_type, documents).search(queries, 10), exact)
            for index_type in (IndexType("exact", "binary"), IndexType("exact", "binary", "int8", 4))
        )
        assert rescored > alone + 0.1

    @pytest.mark.parametrize("index_type", TYPES, ids=lambda index_type: index_type.name)
    def test_every_index_type_has_the_size_it_reports_and_finds_most_of_what_is_near(self, faiss, index_type):
        queries, documents = clustered()
        rows, costs = timed_search(index_type, queries, documents, 10)
        nearest = exact_search(queries, documents, 50)
        found = np.mean([len(set(some) & set(near)) / 10 for some, near in zip(rows.tolist(), nearest.tolist(), strict=True)])
        assert found > (0.6 if index_type.precision == "binary" else 0.9)
        graph = 2 * 32 * 4 if index_type.search == "hnsw" else 0  # at least its lowest layer: 2 M neighbours of 4 bytes
        stored = len(documents) * (costs["bytes_per_vector"] + graph)
        assert stored <= costs["index_bytes"] < 1.1 * stored + 2000 + (len(documents) * 40 if graph else 0)
        serialise = faiss.serialize_index_binary if index_type.precision == "binary" else faiss.serialize_index
        assert costs["index_bytes"] == serialise(VectorIndex(index_type, documents)._index).nbytes
        assert costs["queries_per_second"] > 0 and costs["queries_per_second_batched"] > 0

    def test_fewer_documents_than_requested_are_all_found_once(self):
        queries, documents = clustered()
        for search, precision in product(["exact", "hnsw"], ["float32", "binary"]):
            rows = VectorIndex(IndexType(search, precision, "float32" if precision == "binary" else None, 4), documents[:7])
            assert (np.sort(rows.search(queries, 100), axis=1) == np.arange(7)).all()

    @pytest.mark.parametrize("dim", [16, 32])
    def test_the_order_of_the_corpus_changes_no_measure_of_any_index_type(self, tmp_path, dim):
        """Signs of 16 dimensions have many equal cosines and equal codes, normal values of 32 equal codes alone."""
        documents = [(str(number), "", f"document {number}") for number in range(800)]
        queries = [(str(number), f"query {number}") for number in range(20)]
        qrels = "".join(f"{number}\t{document}\t1\n" for number in range(20) for document in range(number, 800, 20))

        def draw(texts: list[str], side: str) -> np.ndarray:
            drawn = np.array([np.random.default_rng(list(text.encode())).standard_normal(dim) for text in texts])
            return (np.sign(drawn) if dim == 16 else drawn).astype(np.float32)

        found = []
        for order in (documents, documents[::-1], documents[300:] + documents[:300]):
            given = read_retrieval(write_folder(tmp_path, qrels, documents=order, queries=queries))
            results = retrieval_scores(draw, {"made": given}, types=TYPES, bootstrap=5)
            found.append(results["retrieval_resamples"])
            scores = results["retrieval"]["made"]
            found[-1] |= {(name, measure): scores[name][measure] for name in INDEX_NAMES for measure in MEASURES}
            found[-1] |= {measure: scores[measure] for measure in MEASURES}
        assert found[0] == found[1] == found[2]

    @pytest.mark.parametrize("line", [0, 1, 25, 49])
    def test_a_collapsed_model_gains_nothing_from_the_line_of_the_relevant_document(self, tmp_path, line):
        documents = [(f"document {number}", "", f"text {number}") for number in range(50)]
        documents.insert(line, documents.pop(0))  # the relevant one
        given = read_retrieval(write_folder(tmp_path, "1\tdocument 0\t1\n", documents=documents))
        results = retrieval_scores(lambda texts, side: np.ones((len(texts), 8), np.float32), {"made": given}, types=TYPES)
        scores = results["retrieval"]["made"]
        assert all(found["ndcg@10"] < 0.5 for found in (scores, *(scores[name] for name in INDEX_NAMES)))

    def test_other_index_types_are_under_their_names_and_the_default_keeps_its_keys(self, tmp_path):
        made = {"made": read_retrieval(write_folder(tmp_path, "1\t2\t2\n1\t1\t1\n2\t1\t1\n"))}
        plain = retrieval_scores(encode, made)
        results = retrieval_scores(encode, made, types=index_types([], ["float32", "int8", "binary"], 2))
        scores = results["retrieval"]["made"]
        assert {key: value for key, value in scores.items() if not isinstance(value, dict)} == plain["retrieval"]["made"]
        names = ["float32", "int8", "int8+float32", "binary", "binary+int8", "binary+float32"]
        assert [key for key, value in scores.items() if isinstance(value, dict)] == names
        for measure, value in plain["retrieval"]["made"].items():
            assert scores["float32"][measure] == pytest.approx(value)
        assert results["retrieval_resamples"]["made float32 ndcg@10"] == plain["retrieval_resamples"]["made ndcg@10"]
        assert scores["binary+int8"]["bytes_per_vector"] == 1 and scores["binary+int8"]["rescore_bytes_per_vector"] == 2
