from collections.abc import Sequence
from math import log2

import numpy as np
import pytest
from retrieval_sets import encode, write_folder

from distill.corpus.evaluation_sets import RetrievalSet, read_retrieval
from distill.evaluation.index_types import index_types
from distill.evaluation.retrieval import exact_search, query_scores, retrieval_scores


@pytest.mark.parametrize("compress", [True, False])
def test_the_measures_are_those_computed_by_hand(tmp_path, compress):
    # query 1 finds 3, 2, 4, 1; query 2 finds 1 first; query 3 has nothing relevant and is left out
    folder = write_folder(tmp_path, "1\t2\t2\n1\t1\t1\n2\t1\t1\n3\t1\t0\n", compress=compress)
    ndcg = (2 / log2(3) + 1 / log2(5)) / (2 + 1 / log2(3))
    expected = {"ndcg@10": (ndcg + 1) / 2, "recall@10": 1, "recall@100": 1, "mrr@10": (1 / 2 + 1) / 2}
    results = retrieval_scores(encode, {"made": read_retrieval(folder)})
    assert results["retrieval"]["made"] == pytest.approx(expected)


def test_what_is_found_beyond_ten_counts_for_recall_at_100_alone():
    found = [str(i) for i in range(100)]
    assert query_scores(found, {"10": 1}) == {"ndcg@10": 0, "recall@10": 0, "recall@100": 1, "mrr@10": 0}
    assert query_scores(found, {"4": 1, "gone": 1})["recall@100"] == 0.5


def test_the_ideal_of_ndcg_has_ten_documents_at_most():
    found = [str(i) for i in range(100)]
    assert query_scores(found, {str(i): 1 for i in range(20)})["ndcg@10"] == pytest.approx(1)


def test_exact_search_is_a_full_sort_with_ties_in_order():
    rng = np.random.default_rng(0)
    documents = rng.standard_normal((500, 8)).astype(np.float32)
    queries = rng.standard_normal((20, 8)).astype(np.float32)
    assert (exact_search(queries, documents, 100) == np.argsort(-queries @ documents.T, axis=1)[:, :100]).all()
    assert exact_search(np.ones((1, 2)), np.ones((5, 2)), 100).tolist() == [[0, 1, 2, 3, 4]]


def test_a_vectors_length_changes_nothing(tmp_path):
    made = {"made": read_retrieval(write_folder(tmp_path, "1\t2\t2\n2\t1\t1\n"))}
    scale = np.random.default_rng(0).uniform(0.1, 9, size=100)
    scaled = retrieval_scores(lambda texts, side: encode(texts) * scale[: len(texts), None].astype(np.float32), made)
    assert scaled["retrieval"]["made"] == pytest.approx(retrieval_scores(encode, made)["retrieval"]["made"])


def test_an_interval_holds_its_mean_and_depends_on_the_queries_and_the_seed_alone(tmp_path):
    made = read_retrieval(write_folder(tmp_path, "1\t2\t2\n1\t1\t1\n2\t1\t1\n"))

    def interval(name: str, **options: int) -> tuple[float, float]:
        return retrieval_scores(encode, {name: made}, **options)["retrieval_ci"][name]["mrr@10"]

    # two queries with 1/2 and 1: resamples have the means 1/2, 3/4 and 1
    assert interval("a") == (0.5, 1.0) == interval("another name")
    one, other = (retrieval_scores(encode, {"a": made}, seed=seed)["retrieval_resamples"]["a ndcg@10"] for seed in (0, 1))
    assert one.sample != other.sample and one.values != other.values
    assert retrieval_scores(encode, {"a": made}, bootstrap=0)["retrieval_ci"]["a"] == {}


def test_a_query_that_is_a_document_too_does_not_find_itself():
    texts = {str(number): f"text {number}" for number in range(200)}
    queries = {"7": "text 7", "9": "another text"}  # of the first, the document is the query, with a title before it
    documents = texts | {"7": "Title text 7"}
    given = RetrievalSet(documents, queries, {"7": {"8": 1, "100": 1}, "9": {"9": 1}})
    assert given.among_documents == {"7"}
    places = {text: number for number, text in enumerate(documents.values())} | {"text 7": 7, "another text": 9}

    def encode_places(some: Sequence[str], side: str) -> np.ndarray:
        angles = np.sqrt([places[text] for text in some]) / 20  # nearest to 7 are 7, 8, 6, and 100 is the 101st; to 9 it is 9
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    for types in ((), index_types(["exact"], ["float32"], None)):
        measured = retrieval_scores(encode_places, {"set": given}, types=types)["retrieval"]["set"]
        for found in (measured, *(measured[each.name] for each in types)):
            assert found["mrr@10"] == 1 and found["recall@100"] == 1


def test_only_the_text_makes_a_document_the_query_itself():
    given = RetrievalSet({"1": "a text", "2": "b", "3": "c"}, {"1": " a text\n", "2": "", "3": "another"}, {})
    assert given.among_documents == {"1"}
