"""Retrieval sets in BEIR's layout, in a folder or on the hub.

    corpus.jsonl(.gz)   {"_id", "title", "text"} a line; a document is "title text"
    queries.jsonl(.gz)  {"_id", "text"} a line
    qrels.tsv           a header line, then query id, document id, grade; above 0 is relevant (or qrels/test.tsv)

    hub:OWNER/NAME      configurations corpus and queries with the same columns, and judgements (split test, or the only one)
                        with the columns query-id, corpus-id and score (1 where there is none): the configuration default or
                        qrels, as MTEB has it, else the dataset OWNER/NAME-qrels, as BEIR has it

Queries without a relevant document are left out. The ids of queries and documents are separate names, so a document that
happens to have the query's id is a document like any other (BEIR's own code would drop it).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from distill.evaluation.hub import PREFIX, configs_of, is_on_hub, read_rows, splits_of

Grades = dict[str, dict[str, int]]  # query id -> document id -> grade above 0


class RetrievalSet(NamedTuple):
    """Ids and texts. `queries` are those that have a relevant document, in the order of `grades`."""

    documents: dict[str, str]
    queries: dict[str, str]
    grades: Grades


def read_retrieval(where: str | Path) -> RetrievalSet:
    """Of a folder, or of hub:OWNER/NAME. Raises ValueError that says what is missing or malformed, and where."""
    if is_on_hub(where):
        return _judged(where, *_from_hub(str(where).removeprefix(PREFIX)))
    corpus, queries, qrels = _files(Path(where))
    return _judged(
        where,
        {row["_id"]: _document(row.get("title"), row["text"]) for row in _read_jsonl(corpus)},
        {row["_id"]: row["text"] for row in _read_jsonl(queries)},
        _read_qrels(qrels),
    )


def _judged(where: str | Path, documents: dict[str, str], queries: dict[str, str], grades: Grades) -> RetrievalSet:
    unknown = grades.keys() - queries.keys()
    if unknown:
        raise ValueError(f"the retrieval set {where} judges query {min(unknown)!r}, which its queries do not have")
    if not grades or not documents:
        raise ValueError(
            f"no retrieval set at {where}: {'the corpus is empty' if grades else 'no query has a relevant document'}"
        )
    return RetrievalSet(documents, {query: queries[query] for query in grades}, grades)


def _document(title: str | None, text: str) -> str:
    return f"{title or ''} {text}".strip()


def _files(folder: Path) -> list[Path]:
    names = (
        ("corpus.jsonl", "corpus.jsonl.gz"),
        ("queries.jsonl", "queries.jsonl.gz"),
        ("qrels.tsv", "qrels/test.tsv"),
    )
    found = [next((path for name in either if (path := folder / name).is_file()), None) for either in names]
    if not folder.is_dir():
        raise ValueError(f"no retrieval set at {folder}: no such folder")
    missing = [" or ".join(either) for either, path in zip(names, found, strict=True) if path is None]
    if missing:
        raise ValueError(f"no retrieval set at {folder}: it has no {', no '.join(missing)}")
    return [path for path in found if path is not None]


def _from_hub(name: str) -> tuple[dict[str, str], dict[str, str], Grades]:
    configs = configs_of(name)
    if not {"corpus", "queries"} <= set(configs):
        raise ValueError(f"no retrieval set at {PREFIX}{name}: its configurations are {configs}, not corpus and queries")
    judged = next((config for config in ("default", "qrels") if config in configs), None)
    judgements = _hub_rows(name if judged else f"{name}-qrels", judged, ("query-id", "corpus-id", "score"), score=1)
    documents = _hub_rows(name, "corpus", ("_id", "title", "text"), title="")
    queries = _hub_rows(name, "queries", ("_id", "text"))
    grades: Grades = {}
    for query, document, grade in judgements:
        if grade > 0:
            grades.setdefault(str(query), {})[str(document)] = int(grade)
    texts = {str(row): _document(title, text) for row, title, text in documents}
    return texts, {str(row): text for row, text in queries}, grades


def _hub_rows(name: str, config: str | None, columns: tuple[str, ...], **defaults: Any) -> Iterable[tuple[Any, ...]]:
    splits = splits_of(name, config)
    if "test" not in splits and len(splits) != 1:
        raise ValueError(
            f"{PREFIX}{name} has {splits} as splits of {config or 'its judgements'}: neither test nor a single one"
        )
    split = "test" if "test" in splits else splits[0]
    return read_rows(name, columns, split=split, config=config, defaults=defaults)


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
