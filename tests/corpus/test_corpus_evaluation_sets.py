import gzip
import json
from pathlib import Path

import datasets
import pytest
from retrieval_sets import DOCUMENTS, QUERIES, write_folder

from distill.corpus.evaluation_sets import read_retrieval, read_sts_dev

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


@pytest.mark.parametrize("compress", [True, False])
def test_an_id_that_occurs_twice_is_refused_by_file_id_and_count(tmp_path, compress):
    end = ".gz" if compress else ""
    documents = [*DOCUMENTS, ("2", "", "another"), ("2", "", "and another"), ("1", "a", "far")]
    with pytest.raises(ValueError, match=rf"corpus\.jsonl{end}: 2 ids occur more than once, the first is '1', 2 times"):
        read_retrieval(write_folder(tmp_path, LINES, documents=documents, compress=compress))
    with pytest.raises(ValueError, match=rf"queries\.jsonl{end}: 1 ids occur more than once, the first is '2', 3 times"):
        read_retrieval(write_folder(tmp_path, LINES, queries=[*QUERIES, *[QUERIES[1]] * 2], compress=compress))


def test_documents_that_are_judged_but_missing_are_refused_by_file_id_and_count(tmp_path):
    with pytest.raises(ValueError, match=r"qrels\.tsv judges document '7', which \S*corpus\.jsonl\.gz .* lacks 2 of"):
        read_retrieval(write_folder(tmp_path, LINES + "1\t8\t1\n2\t7\t1\n2\t8\t1\n"))
    assert read_retrieval(write_folder(tmp_path, LINES + "1\t8\t0\n")).grades == {"1": {"2": 2, "1": 1}, "2": {"1": 1}}


def test_judgements_that_contradict_each_other_are_refused_and_repeated_ones_are_not(tmp_path):
    assert read_retrieval(write_folder(tmp_path, LINES + LINES)) == read_retrieval(write_folder(tmp_path, LINES))
    with pytest.raises(ValueError, match=r"qrels\.tsv: 2 documents are judged twice .* is '2' for query '1' \(2 and 0\)"):
        read_retrieval(write_folder(tmp_path, LINES + "1\t2\t0\n2\t1\t3\n"))


@pytest.mark.parametrize("mark", ["", "\ufeff", "1\t4\t-1\n"])
def test_judgements_without_a_header_are_all_read(tmp_path, mark):
    expected = read_retrieval(write_folder(tmp_path, LINES))
    (tmp_path / "qrels.tsv").write_text(mark + LINES)
    assert read_retrieval(tmp_path) == expected
    (tmp_path / "qrels.tsv").write_text(LINES + "1\t2\n")
    with pytest.raises(ValueError, match=r"qrels\.tsv, line 5: 2 columns, not query-id, corpus-id and score"):
        read_retrieval(tmp_path)


def test_a_byte_order_mark_before_a_header_or_the_first_line_is_no_part_of_it(tmp_path):
    expected = read_retrieval(write_folder(tmp_path, LINES, compress=False))
    for path in tmp_path.iterdir():
        path.write_text("\ufeff" + path.read_text())
    assert read_retrieval(tmp_path) == expected


def test_queries_without_a_relevant_document_and_pairs_without_gold_are_counted_in_the_log(tmp_path, caplog):
    caplog.set_level("INFO", "distill")
    read_retrieval(write_folder(tmp_path, LINES))
    rows = "score\tsentence1\tsentence2\n1\ta\tb\n\tc\td\n2.5\te\tf\nnan\tg\th\n"
    (tmp_path / "stsb_dev.tsv.gz").write_bytes(gzip.compress(rows.encode()))
    read_sts_dev(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: 1 of 3 queries have no relevant document and are left out",
        f"{tmp_path}/stsb_dev.tsv.gz: 2 of 4 pairs have no gold score and are left out",
    ]


def test_the_order_of_lines_does_not_decide_that_of_documents_or_queries(tmp_path):
    given = read_retrieval(write_folder(tmp_path, LINES))
    lines = "".join(reversed(LINES.splitlines(keepends=True)))
    other = read_retrieval(write_folder(tmp_path, lines, documents=DOCUMENTS[::-1], queries=QUERIES[::-1]))
    assert [list(part) for part in given] == [list(part) for part in other]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("text", None, None),
        ("text", 5, r"corpus\), row 2, field 'text': expected a string, found int"),
        ("_id", 1.5, r"row 2, field '_id': expected a string, found float"),
        ("title", ["a"], r"row 2, field 'title': expected a string, found list"),
    ],
)
def test_values_of_a_hub_dataset_are_checked_as_those_of_files(monkeypatch, column, value, message):
    corpus, queries, qrels = hub_rows()
    corpus[1][column] = value
    parts = {"corpus": corpus, "queries": queries, "default": qrels}
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: list(parts))
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: [config])

    class Rows:
        def __init__(self, rows):
            self.rows, self.column_names = rows, list(rows[0])

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, name):
            return [row[name] for row in self.rows]

    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: Rows(parts[config]))
    if message is None:
        assert read_retrieval("hub:made/up").documents["2"] == ""
        return
    with pytest.raises(ValueError, match=message):
        read_retrieval("hub:made/up")


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
