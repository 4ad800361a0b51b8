import json
from pathlib import Path

import datasets
import pytest
from retrieval_sets import DOCUMENTS, QUERIES, write_folder

from distill.corpus.evaluation_sets import read_retrieval

QRELS = [("1", "2", 2), ("1", "1", 1), ("2", "1", 1), ("3", "1", 0)]
LINES = "".join(f"{query}\t{document}\t{grade}\n" for query, document, grade in QRELS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` takes two local folders of one name and card for the same dataset."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_hub(folder: Path, configs: dict[str, tuple[str, list[dict[str, object]]]]) -> str:
    """A dataset as the hub would have it: each configuration with one split of JSON lines."""
    folder.mkdir()
    card = ["---", "configs:"]
    for config, (split, rows) in configs.items():
        (folder / f"{config}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        card += [f"- config_name: {config}", f"  data_files: [{{split: {split}, path: {config}.jsonl}}]"]
    (folder / "README.md").write_text("\n".join([*card, "---"]))
    return f"hub:{folder}"


def hub_rows() -> tuple[list[dict[str, object]], list[dict[str, object]], list[dict[str, object]]]:
    return (
        [{"_id": name, "title": title, "text": text} for name, title, text in DOCUMENTS],
        [{"_id": name, "text": text} for name, text in QUERIES],
        [{"query-id": query, "corpus-id": document, "score": grade} for query, document, grade in QRELS],
    )


def test_a_document_is_its_title_and_text_and_a_query_without_a_relevant_one_is_left_out(tmp_path):
    given = read_retrieval(write_folder(tmp_path, LINES))
    assert given.documents == {"1": "a far", "2": "b", "3": "c near", "4": "d"}
    assert given.queries == {"1": "q one", "2": "q two"}
    assert given.grades == {"1": {"2": 2, "1": 1}, "2": {"1": 1}}


@pytest.mark.parametrize("judged", ["default", "qrels", "a dataset of its own"])
def test_a_hub_set_is_what_the_same_folder_is(tmp_path, judged):
    corpus, queries, qrels = hub_rows()
    configs = {"corpus": ("corpus", corpus), "queries": ("queries", queries)}
    if judged in ("default", "qrels"):
        configs[judged] = ("test", qrels)
    else:
        write_hub(tmp_path / "made-qrels", {"default": ("test", qrels)})
    assert read_retrieval(write_hub(tmp_path / "made", configs)) == read_retrieval(write_folder(tmp_path / "folder", LINES))


def test_on_the_hub_titles_and_scores_may_be_missing_and_ids_may_be_numbers(tmp_path):
    corpus = [{"_id": int(name), "text": f"{title} {text}".strip()} for name, title, text in DOCUMENTS]
    judged = [{"query-id": int(query), "corpus-id": int(document)} for query, document, grade in QRELS if grade]
    queries = hub_rows()[1]
    configs = {"corpus": ("corpus", corpus), "queries": ("queries", queries), "default": ("test", judged)}
    given = read_retrieval(write_hub(tmp_path / "made", configs))
    assert given.documents == {"1": "a far", "2": "b", "3": "c near", "4": "d"}
    assert given.grades == {"1": {"2": 1, "1": 1}, "2": {"1": 1}}


def test_a_hub_set_that_cannot_be_reached_or_is_none_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/nothing.*without a connection, name a folder"):
        read_retrieval("hub:nowhere/nothing")
    corpus, _, qrels = hub_rows()
    with pytest.raises(ValueError, match=r"made: its configurations are \['corpus', 'default'\]"):
        read_retrieval(write_hub(tmp_path / "made", {"corpus": ("corpus", corpus), "default": ("test", qrels)}))


@pytest.mark.parametrize("name", ["corpus.jsonl.gz", "queries.jsonl.gz", "qrels.tsv"])
def test_a_missing_file_is_named(tmp_path, name):
    write_folder(tmp_path, "1\t1\t1\n")
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=name):
        read_retrieval(tmp_path)


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
        read_retrieval(write_folder(tmp_path, qrels))


def test_a_corpus_that_is_not_json_is_refused_by_line(tmp_path):
    write_folder(tmp_path, "1\t1\t1\n", compress=False)
    (tmp_path / "corpus.jsonl").write_text('{"_id": "1", "text": "b"}\n{"_id": 2, "text": "b"}\n')
    with pytest.raises(ValueError, match=r"corpus\.jsonl, line 2"):
        read_retrieval(tmp_path)
