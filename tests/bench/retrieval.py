"""Retrieval with quantised vectors: a teacher's float32 vectors compared with a student's float32, int8 and binary vectors.

    python tests/bench/retrieval.py --teacher MODELS/mpnet-base --student runs/mine/export/hpd --whole runs/mine/export/ckd \
        --retrieval DATA/retrieval/* --text DATA/unlabelled/wiki1m_en.txt.gz --work /tmp/bench --out retrieval.json

quality   nDCG@10 of every retrieval set, the mean, its ratio to the teacher's and to that of --whole, the student before it was
          compressed, and the 95% interval of the difference of means to the teacher's, from the same resamples of queries;
          bytes per vector, and the ratio to the teacher's: of the vectors searched, and with those that rescoring looks up
          (4 x as many candidates as results)
exact     the texts of --text, --copies times, in an exact index: one query at a time, its ten nearest; the index's MB do not
          include what rescoring looks up
hnsw      the same texts once, in an HNSW graph: build, one query at a time, and the fraction of the exact ten nearest found

faiss runs on one thread. Copies only serve to measure the speed of a scan, which does not depend on the vectors' values. The
queries are those of the retrieval sets. Vectors are computed in bf16 where the processor has it, and kept under --work in
blocks: a second run, or one after a kill, continues from there.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.evaluation.index_types import IndexType, index_types, timed_search
from distill.evaluation.retrieval import COMPARED, exact_search, retrieval_scores
from distill.evaluation.score_tables import cell, table_of
from distill.evaluation.tasks import Tasks, read_tasks
from distill.metrics.bootstrap import difference
from distill.metrics.vectors import EncodedTexts, RoleText, encode_by_role, unit
from distill.run.allocator import keep_freed_memory
from distill.run.files import publish, sha256_of
from distill.run.precision import autocast_dtype
from distill.shards import fingerprint
from distill.teacher.encoder import Teacher
from distill.teacher.teacher_config import TeacherConfig

BLOCK = 5_000
NEAREST = 10
TEACHER_TYPES = index_types(["exact"], ["float32"], None)
PRECISIONS = ("float32", "int8", "binary")


class Model:
    """A model's vectors, encoded once; the model is loaded when a block is missing."""

    def __init__(self, name: str, truncate_dim: int | None, work: Path) -> None:
        self.name = name
        self.truncate_dim = truncate_dim
        self.work = work
        self.encoder: Any = None
        weights = sorted(Path(name).rglob("*.safetensors"))  # none where it is a hub name
        self.identity = {"model": [sha256_of(path) for path in weights] or name}

    def __call__(self, texts: Sequence[RoleText]) -> np.ndarray:
        """float32 [n, d], L2-normalised."""
        blocks = [texts[start : start + BLOCK] for start in range(0, len(texts), BLOCK)]
        vectors = np.concatenate([self._block(block, f"{n + 1} of {len(blocks)}") for n, block in enumerate(blocks)])
        return unit(vectors[:, : self.truncate_dim]).astype(np.float32)

    def _block(self, texts: Sequence[RoleText], which: str) -> np.ndarray:
        path = self.work / f"{fingerprint(self.identity | {'texts': list(texts)})[:24]}.npy"
        if not path.exists():
            self.encoder = self.encoder or encoder_of(self.name)
            print(f"{self.name}: encoding block {which}", flush=True)
            vectors = encode_by_role(self.encoder, texts)
            with publish(path) as file:
                np.lib.format.write_array(file, vectors, allow_pickle=False)
        return np.load(path, allow_pickle=False)


def encoder_of(name: str) -> Teacher:
    """The encoder of precompute, in bf16 where the device has it; smaller batches on a CPU, which fit its cache."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TeacherConfig(model=name) if device.type == "cuda" else TeacherConfig(model=name, tokens_per_batch=2048)
    return Teacher(config, device, autocast_dtype("auto", device))


def quality(models: dict[str, tuple[EncodedTexts, tuple[IndexType, ...]]], tasks: Tasks) -> list[dict[str, Any]]:
    """A row for each model and index type."""
    rows = []
    for model, (encoded, types) in models.items():
        results = retrieval_scores(encoded, tasks.retrieval, types=types)
        for index_type in types:
            scores = {name: results["retrieval"][name][index_type.name] for name in tasks.retrieval}
            kept = results["retrieval_resamples"]
            resamples = [kept[f"{name} {index_type.name} {COMPARED}"].values for name in tasks.retrieval]
            some = next(iter(scores.values()))
            rows.append(
                {
                    "model": model,
                    "vectors": f"{model} {index_type.name}",
                    "bytes": some["bytes_per_vector"],
                    "rescore_bytes": some.get("rescore_bytes_per_vector", 0),
                    "sets": {name: score[COMPARED] for name, score in scores.items()},
                    "mean": float(np.mean([score[COMPARED] for score in scores.values()])),
                    "resamples": np.mean(resamples, axis=0),
                }
            )
    teacher, teacher_resamples = rows[0], rows[0]["resamples"]
    whole = next((row["mean"] for row in rows if row["model"] == "whole"), None)
    for row in rows:
        row["ratio_to_whole"] = row["mean"] / whole if whole else None
        row["fewer_searched"] = teacher["bytes"] / row["bytes"]
        row["fewer_stored"] = teacher["bytes"] / (row["bytes"] + row["rescore_bytes"])
        row["ratio_to_teacher"] = row["mean"] / teacher["mean"]
        row["difference"] = row["mean"] - teacher["mean"]
        row["interval"] = difference(teacher_resamples, row.pop("resamples"))
    return rows


def speed(
    models: dict[str, tuple[np.ndarray, np.ndarray, tuple[IndexType, ...]]],
    copies: int,
    *,
    exact: dict[str, np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """A row for each model and index type of a search for the ten nearest; with `exact` rows by model, the fraction found."""
    rows = []
    for model, (queries, documents, types) in models.items():
        copied = np.tile(documents, (copies, 1))
        for index_type in types:
            print(f"{model} {index_type.name}: {len(copied):,} vectors of {documents.shape[1]}", flush=True)
            found, costs = timed_search(index_type, queries, copied, NEAREST)
            row = {"vectors": f"{model} {index_type.name}", "ms": 1000 / costs["queries_per_second"], **costs}
            if exact is not None:
                pairs = zip(found.tolist(), exact[model].tolist(), strict=True)
                row["found"] = float(np.mean([len(set(ours) & set(theirs)) / NEAREST for ours, theirs in pairs]))
            rows.append(row)
    for row in rows:
        row["mb"] = row["index_bytes"] / 1e6
        row["times_faster"] = rows[0]["ms"] / row["ms"]
        row["times_smaller"] = rows[0]["index_bytes"] / row["index_bytes"]
    return rows


def quality_row(row: dict[str, Any]) -> dict[str, str | None]:
    return {
        "nDCG@10": row["vectors"],
        "bytes/vector": cell(row["bytes"]),
        "+ rescored from": cell(row["rescore_bytes"]),
        "fewer searched": cell(row["fewer_searched"], "{:.1f}x"),
        "fewer stored": cell(row["fewer_stored"], "{:.1f}x"),
        **{name: cell(score, "{:.4f}") for name, score in row["sets"].items()},
        "mean": cell(row["mean"], "{:.4f}"),
        "of teacher": cell(row["ratio_to_teacher"], "{:.1%}"),
        "of whole": cell(row["ratio_to_whole"], "{:.1%}"),
        "difference": cell(row["difference"], "{:+.4f}"),
        "95%": cell(row["interval"], "{:+.4f}"),
    }


def speed_row(row: dict[str, Any]) -> dict[str, str | None]:
    return {
        "vectors": row["vectors"],
        "index MB": cell(row["mb"], "{:,.1f}"),
        "smaller": cell(row["times_smaller"], "{:.1f}x"),
        "build s": cell(row["build_seconds"], "{:,.1f}"),
        "ms per query": cell(row["ms"], "{:.3f}"),
        "queries/s": cell(row["queries_per_second"], "{:,.1f}"),
        "faster": cell(row["times_faster"], "{:.1f}x"),
        "of exact's 10": cell(row.get("found"), "{:.3f}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a sentence-transformers folder or hub name")
    parser.add_argument("--student", required=True, help="another")
    parser.add_argument("--whole", help="the student before it was compressed")
    parser.add_argument("--truncate-dim", type=int, help="the student's first dimensions that are kept")
    parser.add_argument("--retrieval", nargs="+", required=True, help="folders in BEIR's layout, or hub:OWNER/NAME")
    parser.add_argument("--text", type=Path, required=True, help="a .txt.gz with a text per line")
    parser.add_argument("--work", type=Path, required=True, help="folder of the vectors, kept for the next time")
    parser.add_argument("--sentences", dest="num_texts", type=int, default=100_000, help="texts taken of --text")
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--queries", type=int, default=100, help="number of queries that are timed")
    parser.add_argument("--rescore", type=int, default=4, help="candidates that are rescored for each result")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    keep_freed_memory()
    options.work.mkdir(parents=True, exist_ok=True)
    student_types = tuple(each for each in index_types(["exact"], PRECISIONS, options.rescore) if each.rescored != "float32")
    graphs = tuple(each._replace(search="hnsw") for each in student_types)
    tasks = read_tasks(retrieval=options.retrieval, precisions=PRECISIONS, rescore=options.rescore)
    with gzip.open(options.text, "rt", encoding="utf-8") as file:
        texts = [line.rstrip("\n") for line in itertools.islice(file, options.num_texts)]
    queries = [query for given in tasks.retrieval.values() for query in given.queries.values()][: options.queries]

    teacher, student = Model(options.teacher, None, options.work), Model(options.student, options.truncate_dim, options.work)
    measuring: dict[str, tuple[EncodedTexts, tuple[IndexType, ...]]] = {}
    searched: dict[str, tuple[np.ndarray, np.ndarray, tuple[IndexType, ...]]] = {}
    for role, model, types in (("teacher", teacher, TEACHER_TYPES), ("student", student, student_types)):
        encoded = EncodedTexts(tasks.texts, model(tasks.texts))
        measuring[role] = encoded, types
        searched[role] = encoded(queries, "query"), model([("document", text) for text in texts]), types
    if options.whole:
        whole = Model(options.whole, None, options.work)
        measuring["whole"] = EncodedTexts(tasks.texts, whole(tasks.texts)), TEACHER_TYPES
    rows = quality(measuring, tasks)
    exact_rows = speed(searched, options.copies)
    exact = {role: exact_search(queries, documents, NEAREST) for role, (queries, documents, _) in searched.items()}
    in_graph = {
        role: (queries, documents, graphs if role == "student" else (IndexType("hnsw"),))
        for role, (queries, documents, _) in searched.items()
    }
    hnsw_rows = speed(in_graph, 1, exact=exact)

    total = len(texts) * options.copies
    print(f"\n{table_of([quality_row(row) for row in rows])}")
    print(f"\nexact, one query at a time, {total:,} vectors: {len(texts):,} different texts, each {options.copies} times")
    print(table_of([speed_row(row) for row in exact_rows]))
    print(f"\nHNSW, one query at a time, {len(texts):,} vectors")
    print(table_of([speed_row(row) for row in hnsw_rows]))
    if options.out:
        about = {
            "teacher": {"model": options.teacher, "dim": searched["teacher"][1].shape[1]},
            "student": {"model": options.student, "dim": searched["student"][1].shape[1]},
            "vectors": {"searched": total, "different": len(texts), "copies": options.copies},
            "queries": len(queries),
            "threads": 1,
        }
        result = about | {"quality": rows, "exact": exact_rows, "hnsw": hnsw_rows}
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
