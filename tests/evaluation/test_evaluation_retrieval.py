import gzip
import json
from math import log2
from pathlib import Path

import numpy as np
import pytest

from distill.evaluation import retrieval_scores
from distill.evaluation.retrieval import exact_search, query_scores

VECTORS = {"q one": [1, 0.02], "q two": [0, 1], "a far": [0, 1], "b": [1, 0.3], "c near": [1, 0], "d": [1, 0.6]}


def encode(sentences: list[str]) -> np.ndarray:
    return np.array([VECTORS[text] for text in sentences], dtype=np.float32)


def write_folder(folder: Path, qrels: str, *, compress: bool = True) -> Path:
    documents = [("1", "a", "far"), ("2", "", "b"), ("3", "c", "near"), ("4", "d", "")]
    texts = {
        "corpus.jsonl": "".join(json.dumps({"_id": i, "title": t, "text": x}) + "\n" for i, t, x in documents),
        "queries.jsonl": "".join(
            json.dumps({"_id": i, "text": x}) + "\n" for i, x in [("1", "q one"), ("2", "q two"), ("3", "q")]
        ),
    }
    for name, text in texts.items():
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / name).write_text(text)
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return folder


@pytest.mark.parametrize("compress", [True, False])
def test_the_measures_are_those_computed_by_hand(tmp_path, compress):
    # query 1 finds 3, 2, 4, 1; query 2 finds 1 first; query 3 has nothing relevant and is left out
    folder = write_folder(tmp_path, "1\t2\t2\n1\t1\t1\n2\t1\t1\n3\t1\t0\n", compress=compress)
    ndcg = (2 / log2(3) + 1 / log2(5)) / (2 + 1 / log2(3))
    expected = {"ndcg@10": (ndcg + 1) / 2, "recall@10": 1, "recall@100": 1, "mrr@10": (1 / 2 + 1) / 2}
    assert retrieval_scores(encode, folder) == pytest.approx(expected)


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
    cosines = queries @ (documents / np.linalg.norm(documents, axis=1, keepdims=True)).T
    assert (exact_search(queries, documents, 100) == np.argsort(-cosines, axis=1)[:, :100]).all()
    assert exact_search(np.ones((1, 2)), np.ones((5, 2)), 100).tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("name", ["corpus.jsonl.gz", "queries.jsonl.gz", "qrels.tsv"])
def test_a_missing_file_is_named(tmp_path, name):
    write_folder(tmp_path, "1\t1\t1\n")
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=name):
        retrieval_scores(encode, tmp_path)


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ("9\t1\t1\n", "judges query '9'"),
        ("1\t1\n", "line 2"),
        ("1\t1\thigh\n", "line 2"),
        ("1\t1\t0\n", "no query has a relevant"),
    ],
)
def test_malformed_judgements_are_refused(tmp_path, qrels, message):
    with pytest.raises(ValueError, match=message):
        retrieval_scores(encode, write_folder(tmp_path, qrels))


def test_a_corpus_that_is_not_json_is_refused_by_line(tmp_path):
    write_folder(tmp_path, "1\t1\t1\n", compress=False)
    (tmp_path / "corpus.jsonl").write_text('{"_id": "1", "text": "b"}\n{"_id": 2, "text": "b"}\n')
    with pytest.raises(ValueError, match=r"corpus\.jsonl, line 2"):
        retrieval_scores(encode, tmp_path)
