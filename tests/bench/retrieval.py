"""What small vectors keep and what they save: a teacher's float32 vectors against a student's float32, int8 and binary ones.

    python tests/bench/retrieval.py --teacher MODELS/mpnet-base --student runs/mine/export/hpd --whole runs/mine/export/ckd \
        --retrieval DATA/retrieval/* --text DATA/unlabelled/wiki1m_en.txt.gz --work /tmp/bench --out retrieval.json

quality   nDCG@10 on every retrieval set, the mean, its share of the teacher's and of that of --whole, the student before it was
          compressed, and the 95% interval of the difference of means to the teacher's from the resamples of queries that all
          share; bytes a vector, and how many times fewer than the teacher's: of what is searched, and with what rescoring
          looks up (of 4 x as many candidates as are wanted)
million   the sentences of --text, put into an exact index --copies times over: one query at a time, its ten nearest; an index's
          MB are without what rescoring looks up
graph     the same sentences once, in an HNSW: build, one query at a time, and the share of the exact ten nearest it finds

faiss on one thread throughout. Copies stand in for size, never for quality: a scan takes as long whatever the vectors hold, so
only its speed is measured on them. Queries are those of the retrieval sets. Vectors are computed in bf16 where the processor
has it, and kept under --work block by block: a second run, or one after a kill, goes on from there.
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

from distill.config import TeacherConfig
from distill.evaluation import Encoded, read_tasks, retrieval_scores
from distill.evaluation.bootstrap import difference
from distill.evaluation.encode import unit
from distill.evaluation.index import Form, forms_of, measured
from distill.evaluation.report import between, figure, table
from distill.evaluation.retrieval import COMPARED, exact_search
from distill.evaluation.tasks import Tasks
from distill.files import publish, sha256_of
from distill.memory import keep_freed_memory
from distill.precision import autocast_dtype
from distill.shards import fingerprint
from distill.teacher.encoder import Teacher

BLOCK = 5_000
NEAREST = 10
TEACHER_FORMS = forms_of(["exact"], ["float32"], None)
SMALL = ("float32", "int8", "binary")


class Model:
    """A model's vectors, encoded once, and loaded no sooner than a block is missing."""

    def __init__(self, name: str, truncate_dim: int | None, work: Path) -> None:
        self.name = name
        self.truncate_dim = truncate_dim
        self.work = work
        self.encoder: Any = None
        weights = sorted(Path(name).rglob("*.safetensors"))  # none where it is a hub name
        self.of = {"model": [sha256_of(path) for path in weights] or name}

    def __call__(self, sentences: Sequence[str]) -> np.ndarray:
        """float32 [n, d], L2-normalised."""
        blocks = [sentences[start : start + BLOCK] for start in range(0, len(sentences), BLOCK)]
        vectors = np.concatenate([self._block(block, f"{n + 1} of {len(blocks)}") for n, block in enumerate(blocks)])
        return unit(vectors[:, : self.truncate_dim]).astype(np.float32)

    def _block(self, sentences: Sequence[str], which: str) -> np.ndarray:
        path = self.work / f"{fingerprint(self.of | {'sentences': list(sentences)})[:24]}.npy"
        if not path.exists():
            self.encoder = self.encoder or encoder_of(self.name)
            print(f"{self.name}: encoding block {which}", flush=True)
            vectors = self.encoder(sentences)
            with publish(path) as file:
                np.lib.format.write_array(file, vectors, allow_pickle=False)
        return np.load(path, allow_pickle=False)


def encoder_of(name: str) -> Teacher:
    """As precompute encodes: in bf16 where there is such, in batches of like length: on a CPU, as much as its cache holds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TeacherConfig(model=name) if device.type == "cuda" else TeacherConfig(model=name, tokens_per_batch=2048)
    return Teacher(config, device, autocast_dtype("auto", device))


def quality(models: dict[str, tuple[Encoded, tuple[Form, ...]]], tasks: Tasks) -> list[dict[str, Any]]:
    """A row for each model and form."""
    rows = []
    for model, (encoded, forms) in models.items():
        results = retrieval_scores(encoded, tasks.retrieval, forms=forms)
        for form in forms:
            scores = {name: results["retrieval"][name][form.name] for name in tasks.retrieval}
            resamples = [results["retrieval_resamples"][name][form.name][COMPARED] for name in tasks.retrieval]
            some = next(iter(scores.values()))
            rows.append(
                {
                    "model": model,
                    "vectors": f"{model} {form.name}",
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
        row["share_of_whole"] = row["mean"] / whole if whole else None
        row["fewer_searched"] = teacher["bytes"] / row["bytes"]
        row["fewer_stored"] = teacher["bytes"] / (row["bytes"] + row["rescore_bytes"])
        row["share"] = row["mean"] / teacher["mean"]
        row["difference"] = row["mean"] - teacher["mean"]
        row["interval"] = difference(teacher_resamples, row.pop("resamples"))
    return rows


def speed(
    models: dict[str, tuple[np.ndarray, np.ndarray, tuple[Form, ...]]],
    copies: int,
    *,
    exact: dict[str, np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """A row for each model and form of a search for the ten nearest; with `exact` rows by model, the share of these found."""
    rows = []
    for model, (queries, documents, forms) in models.items():
        copied = np.tile(documents, (copies, 1))
        for form in forms:
            print(f"{model} {form.name}: {len(copied):,} vectors of {documents.shape[1]}", flush=True)
            found, costs = measured(form, queries, copied, NEAREST)
            row = {"vectors": f"{model} {form.name}", "ms": 1000 / costs["queries_per_second"], **costs}
            if exact is not None:
                pairs = zip(found.tolist(), exact[model].tolist(), strict=True)
                row["found"] = float(np.mean([len(set(ours) & set(theirs)) / NEAREST for ours, theirs in pairs]))
            rows.append(row)
    for row in rows:
        row["mb"] = row["index_bytes"] / 1e6
        row["times_faster"] = rows[0]["ms"] / row["ms"]
        row["times_smaller"] = rows[0]["index_bytes"] / row["index_bytes"]
    return rows


QUALITY_COLUMNS = {
    "bytes/vector": figure("bytes"),
    "+ rescored from": figure("rescore_bytes"),
    "fewer searched": figure("fewer_searched", form="{:.1f}x"),
    "fewer stored": figure("fewer_stored", form="{:.1f}x"),
}
SPEED_COLUMNS = {
    "vectors": figure("vectors"),
    "index MB": figure("mb", form="{:,.1f}"),
    "smaller": figure("times_smaller", form="{:.1f}x"),
    "build s": figure("build_seconds", form="{:,.1f}"),
    "ms a query": figure("ms", form="{:.3f}"),
    "queries/s": figure("queries_per_second", form="{:,.1f}"),
    "faster": figure("times_faster", form="{:.1f}x"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a sentence-transformers folder or hub name")
    parser.add_argument("--student", required=True, help="another")
    parser.add_argument("--whole", help="the student before it was compressed")
    parser.add_argument("--truncate-dim", type=int, help="the student's first so many dimensions")
    parser.add_argument("--retrieval", nargs="+", required=True, help="folders in BEIR's layout, or hub:OWNER/NAME")
    parser.add_argument("--text", type=Path, required=True, help="a .txt.gz, a sentence a line")
    parser.add_argument("--work", type=Path, required=True, help="where vectors are kept for the next time")
    parser.add_argument("--sentences", type=int, default=100_000)
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--queries", type=int, default=100, help="that are timed")
    parser.add_argument("--rescore", type=int, default=4, help="times as many candidates as are wanted")
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    options = parser.parse_args()
    keep_freed_memory()
    options.work.mkdir(parents=True, exist_ok=True)
    student_forms = tuple(form for form in forms_of(["exact"], SMALL, options.rescore) if form.rescored != "float32")
    graphs = tuple(form._replace(kind="hnsw") for form in student_forms)
    tasks = read_tasks(retrieval=options.retrieval, forms=student_forms)
    with gzip.open(options.text, "rt", encoding="utf-8") as file:
        texts = [line.rstrip("\n") for line in itertools.islice(file, options.sentences)]
    asked = [query for given in tasks.retrieval.values() for query in given.queries.values()][: options.queries]

    teacher, student = Model(options.teacher, None, options.work), Model(options.student, options.truncate_dim, options.work)
    measuring: dict[str, tuple[Encoded, tuple[Form, ...]]] = {}
    searched: dict[str, tuple[np.ndarray, np.ndarray, tuple[Form, ...]]] = {}
    for role, model, forms in (("teacher", teacher, TEACHER_FORMS), ("student", student, student_forms)):
        sentences = tasks.sentences
        encoded = Encoded(sentences, model(sentences))
        measuring[role] = encoded, forms
        searched[role] = encoded(asked), model(texts), forms
    if options.whole:
        whole = Model(options.whole, None, options.work)
        measuring["whole"] = Encoded(tasks.sentences, whole(tasks.sentences)), TEACHER_FORMS
    rows = quality(measuring, tasks)
    million = speed(searched, options.copies)
    exact = {role: exact_search(queries, documents, NEAREST) for role, (queries, documents, _) in searched.items()}
    in_graph = {
        role: (queries, documents, graphs if role == "student" else (Form("hnsw"),))
        for role, (queries, documents, _) in searched.items()
    }
    graph = speed(in_graph, 1, exact=exact)

    by_set = {name: figure("sets", name, form="{:.4f}") for name in tasks.retrieval}
    quality_columns = {
        "nDCG@10": figure("vectors"),
        **QUALITY_COLUMNS,
        **by_set,
        "mean": figure("mean", form="{:.4f}"),
        "of teacher": figure("share", form="{:.1%}"),
        "of whole": figure("share_of_whole", form="{:.1%}"),
        "difference": figure("difference", form="{:+.4f}"),
        "95%": between("interval", "{:+.4f}"),
    }
    total = len(texts) * options.copies
    print(f"\n{table(rows, quality_columns)}")
    print(f"\nexact, one query at a time, {total:,} vectors: {len(texts):,} real ones, each {options.copies} times")
    print(table(million, SPEED_COLUMNS))
    print(f"\nHNSW, one query at a time, {len(texts):,} real vectors")
    print(table(graph, {**SPEED_COLUMNS, "of exact's 10": figure("found", form="{:.3f}")}))
    if options.out:
        about = {
            "teacher": {"model": options.teacher, "dim": searched["teacher"][1].shape[1]},
            "student": {"model": options.student, "dim": searched["student"][1].shape[1]},
            "vectors": {"searched": total, "real": len(texts), "copies": options.copies},
            "queries": len(asked),
            "threads": 1,
        }
        result = about | {"quality": rows, "exact": million, "hnsw": graph}
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
