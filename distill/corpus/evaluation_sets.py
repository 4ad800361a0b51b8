"""Evaluation sets by what a user names: a folder, or hub:OWNER/NAME.

    STS        sts12_test.tsv.gz, ..., stsb_dev.tsv.gz with the columns score, sentence1, sentence2; or hub: the sets of HUB
    retrieval  corpus.jsonl(.gz)    {"_id", "title", "text"} a line, title optional; a document is "title text"
               queries.jsonl(.gz)   {"_id", "text"} a line
               qrels.tsv            query-id, corpus-id, score; above 0 is relevant (or qrels/test.tsv)
               on the hub           configurations corpus and queries with the same columns, and qrels in the configuration
                                    default or qrels, as MTEB has them, else in the dataset OWNER/NAME-qrels, as BEIR has them
    transfer   train.tsv(.gz), test.tsv(.gz), dev.tsv(.gz) with the columns label and text, the last two optional
               on the hub           splits train, test and validation with the same columns

What cannot be read is a ValueError that names the file and line or the dataset; a hub that does not answer, a TemporaryError.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill.corpus.rows import read_numbered_rows
from distill.metrics.sts import PAIRS, SICKR_MTEB, Pairs
from distill.run.temporary import hub_error

PREFIX = "hub:"
MIN_TRAIN = 20  # rows of a classification set
HUB = {name: f"mteb/{name.lower()}-sts" for name in ("STS12", "STS13", "STS14", "STS15", "STS16")} | {
    "STSB": "mteb/stsbenchmark-sts",
    SICKR_MTEB: "mteb/sickr-sts",
}
"""STS sets on the Hugging Face hub, each with the columns sentence1, sentence2 and score."""

Grades = dict[str, dict[str, int]]  # query id -> document id -> grade above 0


class RetrievalSet(NamedTuple):
    """Texts by id. `queries` are those that have a relevant document, in the order of `grades`.

    Ids of queries and documents are separate: a document with the id of a query is a document like any other.
    """

    documents: dict[str, str]
    queries: dict[str, str]
    grades: Grades


class Labelled(NamedTuple):
    texts: list[str]
    labels: list[str]


class TransferSet(NamedTuple):
    train: Labelled
    dev: Labelled | None
    test: Labelled | None

    @property
    def texts(self) -> list[str]:
        return [text for part in self if part is not None for text in part.texts]


def set_name(where: str) -> str:
    """The name of a set in results.json: the last part of its folder's or hub name."""
    return where.rsplit("/", 1)[-1].removeprefix(PREFIX) if where.startswith(PREFIX) else Path(where).resolve().name


def read_sts(where: str | Path) -> dict[str, Pairs]:
    """The STS sets of a folder, or of the hub for "hub", in the usual order, without pairs that have no gold."""
    if str(where) == "hub":
        return {name: _hub_pairs(name, "test") for name in HUB}
    paths = {name: Path(where) / f"{name.lower()}_test.tsv.gz" for name in PAIRS}
    found = {name: read_pairs(path) for name, path in paths.items() if path.is_file()}
    if not found:
        what = "it has none of" if Path(where).is_dir() else "there is no such folder; it should hold"
        raise ValueError(f"no STS sets in {where}: {what} {', '.join(path.name for path in paths.values())}")
    return found


def read_sts_dev(where: str | Path) -> Pairs | None:
    """STS-B's dev set; None if `where` is a folder without stsb_dev.tsv.gz."""
    if str(where) == "hub":
        return _hub_pairs("STSB", "validation")
    path = Path(where) / "stsb_dev.tsv.gz"
    return read_pairs(path) if path.is_file() else None


def read_pairs(path: Path) -> Pairs:
    """The pairs with gold of a .tsv(.gz) with the columns score, sentence1 and sentence2."""
    rows = []
    for number, (score, first, second) in read_numbered_rows(str(path), ("score", "sentence1", "sentence2")):
        try:
            rows.append((first, second, float(score) if score.strip() else math.nan))
        except ValueError:
            raise ValueError(f"{path}, line {number}: the score {score!r} is not a number") from None
    return _pairs(rows, path)


def read_retrieval(where: str | Path) -> RetrievalSet:
    """The retrieval set of a folder in BEIR's layout, or of hub:OWNER/NAME."""
    if str(where).startswith(PREFIX):
        documents, queries, judgements = _hub_retrieval(str(where).removeprefix(PREFIX))
    else:
        corpus, queries_file, qrels = _retrieval_files(Path(where))
        documents = [row for _, row in read_numbered_rows(str(corpus), ("_id", "title", "text"), optional=("title",))]
        queries = [row for _, row in read_numbered_rows(str(queries_file), ("_id", "text"))]
        judgements = list(_qrels(qrels))
    grades: Grades = {}
    for query, document, grade in judgements:
        if grade > 0:
            grades.setdefault(str(query), {})[str(document)] = int(grade)
    texts = {str(name): f"{title or ''} {text}".strip() for name, title, text in documents}
    asked = {str(name): text for name, text in queries}
    if unknown := grades.keys() - asked.keys():
        raise ValueError(f"the retrieval set {where} judges query {min(unknown)!r}, which its queries do not have")
    if not grades or not texts:
        raise ValueError(
            f"no retrieval set at {where}: {'the corpus is empty' if grades else 'no query has a relevant document'}"
        )
    return RetrievalSet(texts, {query: asked[query] for query in grades}, grades)


def read_transfer(where: str | Path) -> TransferSet:
    """The classification set of a folder, or of hub:OWNER/NAME."""
    if str(where).startswith(PREFIX):
        splits = hub_splits(str(where).removeprefix(PREFIX))
        parts = [_hub_labelled(str(where), split) if split in splits else None for split in ("train", "validation", "test")]
    elif Path(where).is_dir():
        parts = [_read_labelled(Path(where), split) for split in ("train", "dev", "test")]
    else:
        raise ValueError(f"no classification set at {where}: no such folder")
    train, dev, test = parts
    if train is None:
        raise ValueError(f"no classification set at {where}: it has no train.tsv or train.tsv.gz (on the hub: split train)")
    if len(train.labels) < MIN_TRAIN or len(set(train.labels)) < 2:
        raise ValueError(
            f"{where} has {len(train.labels)} rows of {len(set(train.labels))} labels to train on;"
            f" it takes {MIN_TRAIN} rows and 2 labels or more"
        )
    return TransferSet(train, dev, test)


def _pairs(rows: Iterable[tuple[str, str, float | None]], where: object) -> Pairs:
    scored = [row for row in rows if row[2] is not None and math.isfinite(row[2])]
    if len(scored) < 2:
        raise ValueError(f"{where} has {len(scored)} pairs with a gold score; a correlation needs 2 or more")
    first, second, gold = zip(*scored, strict=True)
    return Pairs(list(first), list(second), np.array(gold))


def _hub_pairs(name: str, split: str) -> Pairs:
    rows = hub_rows(HUB[name], ("sentence1", "sentence2", "score"), split)
    return _pairs(rows, f"the Hugging Face dataset {HUB[name]} (split {split})")


def _retrieval_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"no retrieval set at {folder}: no such folder")
    names = (
        ("corpus.jsonl", "corpus.jsonl.gz"),
        ("queries.jsonl", "queries.jsonl.gz"),
        ("qrels.tsv", "qrels/test.tsv"),
    )
    found = [[folder / name for name in either if (folder / name).is_file()] for either in names]
    if missing := [" or ".join(either) for either, paths in zip(names, found, strict=True) if not paths]:
        raise ValueError(f"no retrieval set at {folder}: it has no {', no '.join(missing)}")
    return [paths[0] for paths in found]


def _qrels(path: Path) -> Iterator[tuple[str, str, int]]:
    for number, (query, document, grade) in read_numbered_rows(str(path), ("query-id", "corpus-id", "score")):
        try:
            yield query, document, int(grade)
        except ValueError:
            raise ValueError(f"{path}, line {number}: the score {grade!r} is not an integer") from None


def _read_labelled(folder: Path, split: str) -> Labelled | None:
    path = next((path for end in ("tsv", "tsv.gz") if (path := folder / f"{split}.{end}").is_file()), None)
    if path is None:
        return None
    return _labelled((row for _, row in read_numbered_rows(str(path), ("label", "text"))), path)


def _hub_labelled(where: str, split: str) -> Labelled:
    return _labelled(hub_rows(where.removeprefix(PREFIX), ("label", "text"), split), f"{where} (split {split})")


def _labelled(rows: Iterable[tuple[Any, ...]], where: object) -> Labelled:
    labels, texts = [], []
    for label, text in rows:
        labels.append(str(label))
        texts.append(text)
    if not texts:
        raise ValueError(f"{where} has no rows")
    return Labelled(texts, labels)


def _hub_retrieval(name: str) -> tuple[Iterable[Any], Iterable[Any], Iterable[Any]]:
    """Rows (id, title, text), (id, text) and (query id, document id, grade)."""
    configs = _hub_configs(name)
    if not {"corpus", "queries"} <= set(configs):
        raise ValueError(f"no retrieval set at {PREFIX}{name}: its configurations are {configs}, not corpus and queries")
    judged = next((config for config in ("default", "qrels") if config in configs), None)
    return (
        _only_split(name, "corpus", ("_id", "title", "text"), {"title": ""}),
        _only_split(name, "queries", ("_id", "text")),
        _only_split(name if judged else f"{name}-qrels", judged, ("query-id", "corpus-id", "score"), {"score": 1}),
    )


def _only_split(
    name: str, config: str | None, columns: tuple[str, ...], defaults: Mapping[str, Any] | None = None
) -> Iterable[tuple[Any, ...]]:
    splits = hub_splits(name, config)
    if "test" not in splits and len(splits) != 1:
        raise ValueError(f"{PREFIX}{name} has {splits} as splits of {config or 'its qrels'}: neither test nor a single one")
    return hub_rows(name, columns, "test" if "test" in splits else splits[0], config, defaults)


def hub_rows(
    name: str,
    columns: tuple[str, ...],
    split: str,
    config: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Iterable[tuple[Any, ...]]:
    """The values of `columns` in one split of a hub dataset, downloaded once; an absent column is its default in every row."""
    import datasets

    with _hub_errors(f"the Hugging Face dataset {name} ({f'{config}, ' if config else ''}split {split})"):
        rows = datasets.load_dataset(name, config, split=split)
        absent = {
            column: [default] * len(rows) for column, default in (defaults or {}).items() if column not in rows.column_names
        }
        return zip(*(absent.get(column) or rows[column] for column in columns), strict=True)


def hub_splits(name: str, config: str | None = None) -> list[str]:
    import datasets

    with _hub_errors(f"the Hugging Face dataset {name}"):
        return datasets.get_dataset_split_names(name, config)


def _hub_configs(name: str) -> list[str]:
    import datasets

    with _hub_errors(f"the Hugging Face dataset {name}"):
        return datasets.get_dataset_config_names(name)


@contextmanager
def _hub_errors(where: str) -> Iterator[None]:
    import datasets

    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise hub_error(f"cannot read {where}: {error}; without a connection, name a folder of files instead", error) from error
