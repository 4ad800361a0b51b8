"""Evaluation sets by what a user names: a folder, or hub:OWNER/NAME.

    STS        sts12_test.tsv.gz, ..., stsb_dev.tsv.gz with the columns score, sentence1, sentence2; or hub: the sets of HUB
    retrieval  corpus.jsonl(.gz)    {"_id", "title", "text"} a line, title optional; a document is "title text"
               queries.jsonl(.gz)   {"_id", "text"} a line
               qrels.tsv            query-id, corpus-id, score, with or without this header; above 0 is relevant (or
                                    qrels/test.tsv)
               on the hub           configurations corpus and queries with the same columns, and qrels in the configuration
                                    default or qrels, as MTEB has them, else in the dataset OWNER/NAME-qrels, as BEIR has them
    transfer   train.tsv(.gz), test.tsv(.gz), dev.tsv(.gz) with the columns label and text, the last two optional
               on the hub           splits train, test and validation with the same columns

What cannot be read is a ValueError that names the file and line or the dataset. Documents and queries are in the order of a
hash of their ids: no result depends on the order of the lines of files, not even where scores are equal. A hub that does not
answer is a TemporaryError.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from distill.corpus.hub_rows import PREFIX, hub_configs, hub_rows, hub_splits, only_split
from distill.corpus.rows import read_numbered_rows, tsv_records
from distill.corpus.text import text_hash
from distill.metrics.sts import PAIRS, SICKR_MTEB, Pairs
from distill.run.files import DigestCache, fingerprint, sha256_of
from distill.run.hub import dataset_commit

logger = logging.getLogger(__name__)
STS_DEV = "stsb_dev.tsv.gz"
MIN_TRAIN = 20  # rows of a classification set
HUB = {name: f"mteb/{name.lower()}-sts" for name in ("STS12", "STS13", "STS14", "STS15", "STS16")} | {
    "STSB": "mteb/stsbenchmark-sts",
    SICKR_MTEB: "mteb/sickr-sts",
}
"""STS sets on the Hugging Face hub, each with the columns sentence1, sentence2 and score."""

RETRIEVAL_FILES = (("corpus.jsonl", "corpus.jsonl.gz"), ("queries.jsonl", "queries.jsonl.gz"), ("qrels.tsv", "qrels/test.tsv"))
HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}  # of a classification set

Grades = dict[str, dict[str, int]]  # query id -> document id -> grade above 0
Value = TypeVar("Value")


class RetrievalSet(NamedTuple):
    """Texts by id. `queries` are those that have a relevant document, in the order of `grades`.

    Ids of queries and documents are separate: a document with the id of a query is a document like any other, but for one that
    is the query itself.
    """

    documents: dict[str, str]
    queries: dict[str, str]
    grades: Grades

    @property
    def among_documents(self) -> set[str]:
        """Ids of queries that are documents too, with the same id and text, as in ArguAna."""
        wanted = {query: text.strip() for query, text in self.queries.items() if query in self.documents}
        return {query for query, text in wanted.items() if text and self.documents[query].strip().endswith(text)}


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
    paths = _sts_paths(where)
    found = {name: read_pairs(path) for name, path in paths.items() if path.is_file()}
    if not found:
        what = "it has none of" if Path(where).is_dir() else "there is no such folder; it should hold"
        raise ValueError(f"no STS sets in {where}: {what} {', '.join(path.name for path in paths.values())}")
    return found


def read_sts_dev(where: str | Path) -> Pairs | None:
    """STS-B's dev set; None if `where` is a folder without stsb_dev.tsv.gz."""
    if str(where) == "hub":
        return _hub_pairs("STSB", "validation")
    path = Path(where) / STS_DEV
    return read_pairs(path) if path.is_file() else None


def sts_dev_fingerprint(where: str | Path) -> str:
    """The content of STS-B's dev set; '' if there is none, or the hub cannot be reached."""
    if str(where) == "hub":
        return dataset_commit(HUB["STSB"])
    path = Path(where) / STS_DEV
    return sha256_of(path) if path.is_file() else ""


def set_fingerprints(
    sts: str | None, retrieval: Sequence[str], transfer: Sequence[str], digests: DigestCache, recorded: Mapping[str, str]
) -> dict[str, str]:
    """Kind and name of each set -> the content of its files, '' if there are none; on the hub the commits of its datasets.

    What is `recorded` under the same keys stands where the hub cannot be reached.
    """
    files: dict[str, tuple[Path, Iterable[Path | None]]] = {}
    datasets: dict[str, Sequence[str]] = {}
    if sts == "hub":
        datasets["sts hub"] = list(HUB.values())
    elif sts is not None:
        files[f"sts {sts}"] = Path(sts), _sts_paths(sts).values()
    for where in retrieval:
        if where.startswith(PREFIX):
            name = where.removeprefix(PREFIX)
            datasets[f"retrieval {where}"] = [name, f"{name}-qrels"]
        else:
            files[f"retrieval {where}"] = Path(where), _retrieval_paths(Path(where))
    for where in transfer:
        if where.startswith(PREFIX):
            datasets[f"transfer {where}"] = [where.removeprefix(PREFIX)]
        else:
            files[f"transfer {where}"] = Path(where), [_part(Path(where), split) for split in HUB_SPLITS]

    def of_files(folder: Path, paths: Iterable[Path | None]) -> str:
        found = {str(path.relative_to(folder)): digests.sha256(path) for path in paths if path is not None and path.is_file()}
        return fingerprint(found) if found else ""

    found = {key: of_files(*given) for key, given in files.items()}
    for key, names in datasets.items():
        folders = [Path(name) for name in names]
        contents = [of_files(at, sorted(at.rglob("*"))) if at.is_dir() else dataset_commit(str(at)) for at in folders]
        found[key] = fingerprint({"datasets": contents}) if contents[0] else recorded.get(key, "")
    return found


def read_pairs(path: Path) -> Pairs:
    """The pairs with gold of a .tsv(.gz) with the columns score, sentence1 and sentence2."""
    rows = read_numbered_rows(str(path), ("score", "sentence1", "sentence2"))
    return _pairs(((f"{path}, line {number}", score, first, second) for number, (score, first, second) in rows), path)


def read_retrieval(where: str | Path) -> RetrievalSet:
    """The retrieval set of a folder in BEIR's layout, or of hub:OWNER/NAME.

    Raises ValueError for ids that occur twice, judgements that contradict each other, and relevant documents and judged queries
    that are not there. Queries without a relevant document are left out and counted in the log.
    """
    if str(where).startswith(PREFIX):
        places: Sequence[object] = [f"{where} ({part})" for part in ("corpus", "queries", "qrels")]
        documents, queries, judgements = _hub_retrieval(str(where).removeprefix(PREFIX))
    else:
        places = retrieval_files(Path(where))
        corpus, queries_file, qrels = map(str, places)
        documents = (row for _, row in read_numbered_rows(corpus, ("_id", "title", "text"), optional=("title",)))
        queries = (row for _, row in read_numbered_rows(queries_file, ("_id", "text")))
        judgements = _qrels(Path(qrels))
    texts = _by_id(((name, f"{title} {text}".strip()) for name, title, text in documents), places[0])
    asked = _by_id(queries, places[1])
    grades = _grades(judgements, places[2])
    _check_known("query", grades, asked, places[2], places[1])
    _check_known("document", chain.from_iterable(grades.values()), texts, places[2], places[0])
    if not grades or not texts:
        raise ValueError(
            f"no retrieval set at {where}: {'the corpus is empty' if grades else 'no query has a relevant document'}"
        )
    if left_out := len(asked) - len(grades):
        logger.info("%s: %d of %d queries have no relevant document and are left out", where, left_out, len(asked))
    return RetrievalSet(texts, {query: asked[query] for query in grades}, grades)


def _in_hash_order(by_id: Mapping[str, Value]) -> dict[str, Value]:
    return dict(sorted(by_id.items(), key=lambda item: (text_hash(item[0]), item[0])))


def _by_id(rows: Iterable[tuple[str, str]], where: object) -> dict[str, str]:
    """The texts of (id, text). Raises ValueError for an id that occurs twice."""
    found = list(rows)
    repeated = {name: count for name, count in Counter(name for name, _ in found).items() if count > 1}
    if repeated:
        name, count = next(iter(repeated.items()))
        raise ValueError(
            f"{where}: {len(repeated):,} ids occur more than once, the first is {name!r}, {count} times: each row needs its own"
        )
    return _in_hash_order(dict(found))


def _grades(judgements: Iterable[tuple[str, str, int]], where: object) -> Grades:
    """The relevant documents of each query that has any. Raises ValueError for a document with two grades."""
    judged: dict[tuple[str, str], int] = {}
    contradicted: dict[tuple[str, str], int] = {}
    for query, document, grade in judgements:
        if judged.setdefault((query, document), grade) != grade:
            contradicted[query, document] = grade
    if contradicted:
        (query, document), grade = next(iter(contradicted.items()))
        raise ValueError(
            f"{where}: {len(contradicted):,} documents are judged twice with different scores, the first is {document!r} for"
            f" query {query!r} ({judged[query, document]} and {grade}): keep one"
        )
    grades: Grades = {}
    for (query, document), grade in judged.items():
        if grade > 0:
            grades.setdefault(query, {})[document] = grade
    return _in_hash_order(grades)


def _check_known(what: str, judged: Iterable[str], known: Mapping[str, str], qrels: object, where: object) -> None:
    """Raises ValueError if judged ids are not among the `known` ones."""
    if missing := sorted(set(judged) - known.keys()):
        raise ValueError(
            f"{qrels} judges {what} {missing[0]!r}, which {where} does not have (it lacks {len(missing):,} of the judged ids):"
            " add the rows or remove their judgements"
        )


def read_transfer(where: str | Path) -> TransferSet:
    """The classification set of a folder, or of hub:OWNER/NAME."""
    if str(where).startswith(PREFIX):
        splits = hub_splits(str(where).removeprefix(PREFIX))
        parts = [_hub_labelled(str(where), split) if split in splits else None for split in HUB_SPLITS.values()]
    elif Path(where).is_dir():
        parts = [_read_labelled(Path(where), split) for split in HUB_SPLITS]
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


def part_name(where: str, split: str) -> str:
    """Where a classification set has its train, dev or test part: a file, or a split on the hub."""
    if where.startswith(PREFIX):
        return f"{where} (split {HUB_SPLITS[split]})"
    return str(_part(Path(where), split) or Path(where) / f"{split}.tsv")


def _sts_paths(where: str | Path) -> dict[str, Path]:
    return {name: Path(where) / f"{name.lower()}_test.tsv.gz" for name in PAIRS}


def _pairs(rows: Iterable[tuple[str, Any, str, str]], where: object) -> Pairs:
    """From (where the row is, score, sentence, sentence); pairs without a finite score are left out and counted in the log."""
    found = [(first, second, _gold(score, row)) for row, score, first, second in rows]
    scored = [row for row in found if math.isfinite(row[2])]
    if len(scored) < 2:
        raise ValueError(f"{where} has {len(scored)} pairs with a gold score; a correlation needs 2 or more")
    if left_out := len(found) - len(scored):
        logger.info("%s: %d of %d pairs have no gold score and are left out", where, left_out, len(found))
    first, second, gold = zip(*scored, strict=True)
    return Pairs(list(first), list(second), np.array(gold))


def _gold(score: Any, where: str) -> float:
    """NaN for a null or an empty field."""
    try:
        return math.nan if score is None or (isinstance(score, str) and not score.strip()) else float(score)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: the score {score!r} is not a number") from None


def _grade(score: Any, where: str) -> int:
    try:
        grade = int(score)
    except (TypeError, ValueError):
        grade = None
    if grade is None or (isinstance(score, float) and score != grade):
        raise ValueError(f"{where}: the score {score!r} is not an integer")
    return grade


def _hub_pairs(name: str, split: str) -> Pairs:
    where = f"the Hugging Face dataset {HUB[name]} (split {split})"
    rows = hub_rows(HUB[name], ("score", "sentence1", "sentence2"), split)
    return _pairs(((where, score, first, second) for score, first, second in rows), where)


def _retrieval_paths(folder: Path) -> list[Path | None]:
    """The corpus, the queries and the judgements of a folder, each None where it has none."""
    return [next((folder / name for name in either if (folder / name).is_file()), None) for either in RETRIEVAL_FILES]


def retrieval_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"no retrieval set at {folder}: no such folder")
    paths = _retrieval_paths(folder)
    if missing := [" or ".join(either) for either, path in zip(RETRIEVAL_FILES, paths, strict=True) if path is None]:
        raise ValueError(f"no retrieval set at {folder}: it has no {', no '.join(missing)}")
    return [path for path in paths if path is not None]


def _qrels(path: Path) -> Iterator[tuple[str, str, int]]:
    """Rows of a file with a header, or without one: then the last field of its first line is a whole number."""
    records = tsv_records(path)
    first = next(records, (0, [""]))
    if not first[1][-1].strip().lstrip("-").isdigit():
        for number, (query, document, grade) in read_numbered_rows(str(path), ("query-id", "corpus-id", "score")):
            yield query, document, _grade(grade, f"{path}, line {number}")
        return
    for number, record in chain([first], records):
        if len(record) != 3:
            raise ValueError(f"{path}, line {number}: {len(record)} columns, not query-id, corpus-id and score; fix this line")
        yield record[0], record[1], _grade(record[2], f"{path}, line {number}")


def _part(folder: Path, split: str) -> Path | None:
    """The file of a split of a classification set."""
    return next((path for end in ("tsv", "tsv.gz") if (path := folder / f"{split}.{end}").is_file()), None)


def _read_labelled(folder: Path, split: str) -> Labelled | None:
    path = _part(folder, split)
    if path is None:
        return None
    return _labelled((row for _, row in read_numbered_rows(str(path), ("label", "text"))), path)


def _hub_labelled(where: str, split: str) -> Labelled:
    return _labelled(hub_rows(where.removeprefix(PREFIX), ("label", "text"), split), f"{where} (split {split})")


def _labelled(rows: Iterable[tuple[Any, ...]], where: object) -> Labelled:
    labels, texts = [], []
    for label, text in rows:
        labels.append(label)
        texts.append(text)
    if not texts:
        raise ValueError(f"{where} has no rows")
    return Labelled(texts, labels)


def _hub_retrieval(name: str) -> tuple[Iterable[Any], Iterable[Any], Iterable[tuple[str, str, int]]]:
    """Rows (id, title, text), (id, text) and (query id, document id, grade)."""
    configs = hub_configs(name)
    if not {"corpus", "queries"} <= set(configs):
        raise ValueError(f"no retrieval set at {PREFIX}{name}: its configurations are {configs}, not corpus and queries")
    judged = next((config for config in ("default", "qrels") if config in configs), None)
    judged_by = name if judged else f"{name}-qrels"
    judgements = only_split(judged_by, judged, ("query-id", "corpus-id", "score"), {"score": 1})
    return (
        only_split(name, "corpus", ("_id", "title", "text"), {"title": ""}),
        only_split(name, "queries", ("_id", "text")),
        ((query, document, _grade(score, f"{PREFIX}{judged_by}")) for query, document, score in judgements),
    )
