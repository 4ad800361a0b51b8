"""The poolings of DistilFACE: unsupervised SimCSE of one encoder with each, measured on STS12 to STS15 and STS-B.

    python tests/bench/distilface.py --model MODELS/minilm-l6 --text DATA/unlabelled/wiki1m_en.txt.gz --sts DATA/sts --work DIR

configs/distilface.yaml with this encoder and text, --steps for each pooling. `trained` is the student that scored best on
STS-B's dev set, `untrained` the encoder with the same pooling. The paper's column: DistilBERT, 20,000 steps (arXiv 2401.12472).
Poolings in DIR/results.jsonl are not trained again, and one that was killed continues from its checkpoint: repeat the command.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any, get_args

import torch
from objectives import ROOT, launch, read_results, write_config

from distill.config import RunConfig, load_config
from distill.corpus.evaluation_sets import read_sts
from distill.metrics.sts import sts_scores
from distill.run.formatting import format_table
from distill.student import Student
from distill.student.initial import build_student
from distill.student.student_config import Pooling

PAPER = {
    "cls": 69.87,
    "mean": 70.97,
    "first_last_mean": 70.29,
    "last2_mean": 69.26,
    "last4_mean": 72.17,
    "all_mean": 67.77,
    "concat_last4_mean": 71.38,
}
SETS = ("STS12", "STS13", "STS14", "STS15", "STSB")


def config_of(pooling: str, options: argparse.Namespace) -> RunConfig:
    every = max(1, options.steps // 4)
    overrides = [
        f"name=simcse-{pooling}",
        "shards_from=text",
        f"runs_dir={options.work}",
        f"text.sources=[{{type: file, path: {options.text}, limit: {options.steps * 160}}}]",
        f"text.max_sentences={options.steps * 130}",
        f"teacher.model={options.model}",
        "teacher.tokens_per_batch=1024",
        "teacher.pooling=null",
        "teacher.tasks=2",
        f"student.init={options.model}",
        f"student.pooling={pooling}",
        f"simcse.max_steps={options.steps}",
        f"simcse.dev_every={every}",
        f"simcse.save_every={every}",
        f"evaluate.sts={options.sts}",
        f"engine.num_ranks={options.ranks}",
        "stages=[precompute, simcse]",
    ]
    return load_config(ROOT / "configs/distilface.yaml", overrides)


def mean_of_sets(student: Student, options: argparse.Namespace) -> float:
    student.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    sets = read_sts(options.sts)
    scores = sts_scores(student.encode, {name: sets[name] for name in SETS}, bootstrap=0)["sts"]
    return sum(scores[name] for name in SETS) / len(SETS)


def run(pooling: str, options: argparse.Namespace) -> dict[str, Any]:
    config = config_of(pooling, options)
    before = mean_of_sets(build_student(config.student, config.teacher.model, config.seed), options)
    launch(ROOT / "launcher/pipeline.py", "--config", write_config(config.model_dump(mode="json"), options.work))
    stage = config.run_dir / "simcse"
    after = mean_of_sets(Student.load(stage / "student"), options)
    shutil.rmtree(stage / "checkpoints")
    best = json.loads((stage / "DONE.json").read_text(encoding="utf-8"))["results"]["best_step"]
    return {"pooling": pooling, "steps": options.steps, "untrained": before, "trained": after, "best_step": best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder of an encoder of four layers or more")
    parser.add_argument("--text", type=Path, required=True, help="a .txt.gz with a text per line")
    parser.add_argument("--sts", type=Path, required=True, help="a folder with sts12_test.tsv.gz ... and stsb_dev.tsv.gz")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs and of results.jsonl")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--poolings", nargs="*", default=list(get_args(Pooling)), choices=get_args(Pooling))
    options = parser.parse_args()
    for name in ("model", "text", "sts", "work"):
        setattr(options, name, getattr(options, name).resolve())
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    path = options.work / "results.jsonl"
    results = read_results(path)
    for pooling in options.poolings:
        if (pooling, options.steps) in [(row["pooling"], row["steps"]) for row in results]:
            continue
        print(f"{pooling}: {options.steps} steps", file=sys.stderr, flush=True)
        results.append(run(pooling, options))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(results[-1]) + "\n")
    rows = sorted((row for row in results if row["steps"] == options.steps), key=lambda row: -row["trained"])
    cells = [
        [row["pooling"], f"{row['untrained']:.2f}", f"{row['trained']:.2f}", str(row["best_step"]), paper]
        for row in rows
        for paper in [f"{PAPER[row['pooling']]:.2f}" if row["pooling"] in PAPER else None]
    ]
    print(format_table(["pooling", "untrained", "trained", "at step", "the paper's"], cells))


if __name__ == "__main__":
    main()
