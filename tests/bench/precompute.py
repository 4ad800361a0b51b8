"""Precompute compared with sentence-transformers: the same texts, teacher and machine, in one run.

    python tests/bench/precompute.py --model MODELS/minilm-l6 --text DATA/unlabelled/wiki1m_en.txt.gz --sentences 20000

ours      two tasks with half of the threads each: text cut into chunks, embedded, written as shards with a manifest
default   SentenceTransformer(model).encode(texts) and numpy.save: float32, batches of 32
best      its fastest choice with bfloat16 weights: batch sizes 32 to 256, one process or its multi-process pool

Models are loaded before the measurement. `ours` and `best` take turns; the result is the medians. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from distill.config import RunConfig, stage_of
from distill.corpus.text import normal_form, text_hash
from distill.run.allocator import KEPT, NAME
from distill.run.files import fingerprint, read_json
from distill.run.precision import autocast_dtype
from distill.run.throughput import matmul_peak
from distill.shards import ShardReader
from distill.teacher.encode_missing import encode_missing
from distill.teacher.encoder import Teacher
from distill.teacher.precompute import PrecomputeStage

CPU = torch.device("cpu")


def read_texts(path: Path, count: int) -> list[str]:
    """The first `count` distinct texts that a run would keep. Raises ValueError if there are fewer."""
    found: dict[str, None] = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            text = normal_form(line)
            if 12 <= len(text) <= 1000:
                found[text] = None
            if len(found) == count:
                return list(found)
    raise ValueError(f"{path} has only {len(found)} texts")


def run_config(folder: Path, model: str, texts: list[str], tasks: int, tokens_per_batch: int) -> RunConfig:
    path = folder / "text.txt"
    if not path.exists():
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return RunConfig.model_validate(
        {
            "name": "bench",
            "runs_dir": str(folder),
            "text": {"sources": [{"type": "file", "path": str(path)}]},
            "teacher": {"model": model, "tokens_per_batch": tokens_per_batch},
            "shards": {"rows": -(-len(texts) // (2 * tasks if len(texts) > 10_000 else tasks))},
        }
    )


@contextmanager
def keep_freed_memory_in_children() -> Iterator[None]:
    """Processes started inside have the allocator settings of the launchers."""
    os.environ[NAME] = KEPT
    try:
        yield
    finally:
        del os.environ[NAME]


def our_task(config: RunConfig, threads: int, loaded: Any, encoded: Any, results: Any) -> None:
    torch.set_num_threads(threads)
    stage = stage_of(config, "precompute")
    assert isinstance(stage, PrecomputeStage)
    amp = autocast_dtype("auto", CPU)
    peak = matmul_peak(CPU, amp)
    source = Teacher(config.teacher, CPU, amp)
    source(["warm up"])
    source.work.shapes.clear()
    loaded.wait()
    text = stage.prepare()
    identity = stage.identify(amp)
    timing = encode_missing(
        stage.shard_sets(text),
        stage.directory / "text",
        source,
        teacher_fingerprint=fingerprint(identity),
        block_rows=config.shards.block_rows,
        peak=peak,
    )
    if encoded.wait() == 0:
        stage.finish_set(text, identity, timing)
    results.put(timing.metrics())


def ours(model: str, texts: list[str], tasks: int, threads: int, tokens_per_batch: int) -> tuple[float, Any, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(Path(folder), model, texts, tasks, tokens_per_batch)
        context = multiprocessing.get_context("spawn")
        loaded, encoded, results = context.Barrier(tasks + 1), context.Barrier(tasks), context.Queue()
        processes = [context.Process(target=our_task, args=(config, threads, loaded, encoded, results)) for _ in range(tasks)]
        with keep_freed_memory_in_children():
            for process in processes:
                process.start()
        loaded.wait()
        started = time.perf_counter()
        metrics = [results.get() for _ in processes]
        seconds = time.perf_counter() - started
        for process in processes:
            process.join()
        assert read_json(config.run_dir / "precompute/DONE.json")
        row_of = {text_hash(text): row for row, text in enumerate(texts)}
        vectors = None
        for name in ("shards", "shards/held_out"):
            reader = ShardReader(config.run_dir / name)
            rows = np.arange(len(reader))
            vectors = np.empty((len(texts), reader.dim), np.float32) if vectors is None else vectors
            vectors[[row_of[value] for value in reader.hashes(rows).tolist()]] = reader.vectors(rows)
        assert vectors is not None
        return seconds, metrics, vectors


def timed(encode: Any, texts: list[str]) -> tuple[float, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        vectors = encode(texts)
        np.save(Path(folder) / "vectors.npy", vectors)
        return time.perf_counter() - started, vectors


class Best:
    """sentence-transformers at its fastest, found on a sample."""

    def __init__(self, model: str, sample: list[str], processes: int) -> None:
        self.model = SentenceTransformer(model, device="cpu", model_kwargs={"dtype": torch.bfloat16})
        self.model.encode(sample[:64])
        threads = max(1, (os.cpu_count() or 1) // processes)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of each process of the pool; the default is all cores
        self.pool = self.model.start_multi_process_pool(["cpu"] * processes)
        self.model.encode(sample[: 64 * processes], pool=self.pool)
        self.rates: dict[str, float] = {}
        choices: dict[str, dict[str, Any]] = {}
        for batch_size in (32, 64, 128, 256):
            even = -(-len(sample) // processes)
            for how, options in (("one process", {}), ("pool", {"pool": self.pool}), ("pool, even", {"chunk_size": even})):
                name = f"{how}, batch {batch_size}"
                choices[name] = {"batch_size": batch_size, "even": "chunk_size" in options, "pooled": how != "one process"}
                seconds, _ = timed(lambda texts, name=name: self.run(texts, **choices[name]), sample)
                self.rates[name] = len(sample) / seconds
        self.name = max(self.rates, key=self.rates.__getitem__)
        self.choice = choices[self.name]
        self.processes = processes

    def run(self, texts: list[str], batch_size: int, even: bool, pooled: bool) -> np.ndarray:
        options: dict[str, Any] = {"pool": self.pool} if pooled else {}
        if even:
            options["chunk_size"] = -(-len(texts) // len(self.pool["processes"]))
        return self.model.encode(texts, batch_size=batch_size, **options)

    def __call__(self, texts: list[str]) -> np.ndarray:
        return self.run(texts, **self.choice)

    def close(self) -> None:
        self.model.stop_multi_process_pool(self.pool)


def smallest_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True, help="a .txt.gz with a text per line")
    parser.add_argument("--sentences", dest="num_texts", type=int, default=20_000, help="texts taken of --text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    torch.set_num_threads(cores)
    texts = read_texts(options.text, options.num_texts)
    threads = max(1, cores // options.tasks)

    best = Best(options.model, texts[: max(300, options.num_texts // 8)], options.tasks)
    print(f"on a sample, sentence-transformers is fastest with {best.name} of", {k: round(v, 1) for k, v in best.rates.items()})
    seconds: dict[str, list[float]] = {"ours": [], "best": []}
    metrics, vectors = None, None
    for _ in range(options.rounds):
        taken, metrics, vectors = ours(options.model, texts, options.tasks, threads, options.tokens_per_batch)
        seconds["ours"].append(taken)
        seconds["best"].append(timed(best, texts)[0])
        print({name: [round(len(texts) / value, 1) for value in values] for name, values in seconds.items()}, flush=True)
    best.close()
    model = SentenceTransformer(options.model, device="cpu")
    model.encode(texts[:64])
    default, expected = timed(model.encode, texts)
    rates = {name: len(texts) / statistics.median(values) for name, values in seconds.items()}
    rates["default"] = len(texts) / default
    assert metrics is not None and vectors is not None
    result = {
        "model": Path(options.model).name,
        "texts": len(texts),
        "texts_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "best_is": best.name,
        "ratio_to_default": round(rates["ours"] / rates["default"], 2),
        "ratio_to_best": round(rates["ours"] / rates["best"], 2),
        "smallest_cosine_to_fp32": round(smallest_cosine(vectors, expected), 5),
        "tasks": metrics,
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
