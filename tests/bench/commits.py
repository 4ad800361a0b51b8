"""Two commits compared: what each bench measures of this product alone, in runs that alternate, on the same machine.

    git worktree add OLD COMMIT
    python tests/bench/commits.py OLD --model MODELS/minilm-l6 --text DATA/unlabelled/wiki1m_en.txt.gz --work /tmp/bench

precompute   texts per second: two tasks, from the first chunk to the finished set
train        texts per second in the steps of a CKD stage on two ranks, without the first two
ckd_run      texts per second of the same stage as a whole: the ranks' start, inputs checked, training, the finished student
checkpoint   checkpoints per second, until they are complete, of 22M parameters on two ranks under ZeRO 2
shards       texts per second read with their vectors, in shuffled order, after every shard was verified
verify       bytes per second at which a set of shards is opened and verified

Each measurement is a process of its own with PYTHONPATH at its tree. Prints every round and the median of the ratios new / old.
Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TASKS = RANKS = 2
Options = argparse.Namespace


def measure_precompute(options: Options) -> dict[str, float]:
    bench: Any = importlib.import_module("precompute")
    texts = bench.read_texts(options.text, options.num_texts)
    seconds, _, _ = bench.ours(options.model, texts, TASKS, max(1, (os.cpu_count() or 1) // TASKS), 1024)
    return {"precompute": len(texts) / seconds}


def measure_training(options: Options) -> dict[str, float]:
    ckd_run, train = importlib.import_module("ckd_run"), importlib.import_module("train")
    ckd = {"global_batch": 1024, "micro_batch": 512, "queue": 16_384}
    config = ckd_run.embedded_run(options.work, options.model, options.text, options.num_texts, layers=[0, 2, 5], ckd=ckd)
    ckd_run.delete_training(config)
    started = time.perf_counter()
    ranks = ckd_run.on_ranks(train.our_rank, RANKS, max(1, (os.cpu_count() or 1) // RANKS), config)
    seconds = time.perf_counter() - started
    return {"train": 1024 / ranks[0]["seconds_per_step"], "ckd_run": options.num_texts / seconds}


def measure_checkpoint(options: Options) -> dict[str, float]:
    bench, ckd_run = importlib.import_module("checkpoint"), importlib.import_module("ckd_run")
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        ranks = ckd_run.on_ranks(bench.measure_rank, RANKS, bench.MINILM, Path(folder), 7)
    complete = zip(*(rank["seconds"]["ours"]["complete"] for rank in ranks), strict=True)
    return {"checkpoint": 1 / statistics.median(max(each) for each in complete)}


def measure_shards(options: Options) -> dict[str, float]:
    bench, shards = importlib.import_module("shards"), importlib.import_module("distill.shards")
    folder = options.work / "read" / "ours"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        texts = importlib.import_module("precompute").read_texts(options.text, 200_000)
        vectors = np.random.default_rng(0).normal(size=(len(texts), 384))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
        bench.make(folder.parent, texts, vectors)
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    started = time.perf_counter()
    reader = shards.ShardReader(folder)
    reader.vectors(np.arange(0, len(reader), 97))
    verified = time.perf_counter() - started
    batches = (min(len(reader.texts(rows)), len(reader.vectors(rows))) for rows in bench.shuffled(len(reader)))
    return {"shards": bench.rate(batches, 5.0), "verify": size / verified}


MEASURE: dict[str, Callable[[Options], dict[str, float]]] = {
    "precompute": measure_precompute,
    "training": measure_training,
    "checkpoint": measure_checkpoint,
    "shards": measure_shards,
}


def measure_in(tree: Path, name: str, options: Options) -> dict[str, float]:
    """One measurement by the benches and the product of `tree`, in a process of its own."""
    work = options.work / tree.name
    work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", __file__, str(tree), "--measure", name, "--work", str(work), "--model", options.model]
    command += ["--text", str(options.text), "--sentences", str(options.num_texts)]
    environment = os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests/bench'}"}
    done = subprocess.run(command, env=environment, cwd=tree, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a worktree of the older commit")
    parser.add_argument("--model", required=True, help="a sentence-transformers folder: the teacher")
    parser.add_argument("--text", type=Path, required=True, help="a .txt.gz with a text per line")
    parser.add_argument("--work", type=Path, required=True, help="folder of the embedded text of both")
    parser.add_argument("--sentences", dest="num_texts", type=int, default=12_288, help="texts taken of --text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--benches", nargs="+", choices=MEASURE, default=list(MEASURE))
    parser.add_argument("--measure", choices=MEASURE, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(MEASURE[options.measure](options)))
        return
    trees = {"old": options.old.resolve(), "new": Path(__file__).resolve().parents[2]}
    options.model, options.work = str(Path(options.model).resolve()), options.work.resolve()
    found: dict[str, dict[str, list[float]]] = {}
    for name in options.benches:
        for number in range(options.rounds):
            for label in sorted(trees, reverse=number % 2 == 1):
                for what, value in measure_in(trees[label], name, options).items():
                    found.setdefault(what, {}).setdefault(label, []).append(value)
        for what, values in found.items():
            print(what, {label: [float(f"{value:.4g}") for value in each] for label, each in values.items()}, flush=True)
    ratios = {
        what: round(statistics.median(new / old for new, old in zip(values["new"], values["old"], strict=True)), 3)
        for what, values in found.items()
    }
    print(json.dumps({"rounds": options.rounds, "new_over_old": ratios}, indent=1))


if __name__ == "__main__":
    main()
