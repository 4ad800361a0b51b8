"""Objectives compared by STS and fidelity: students of all-MiniLM-L6-v2 after one pass over the same texts.

    python tests/bench/objectives.py --data DATA --models MODELS --work DIR scan    every objective, one seed
    python tests/bench/objectives.py --data DATA --models MODELS --work DIR seeds   the two best, two more seeds
    python tests/bench/objectives.py --data DATA --models MODELS --work DIR more    tuned, and 128,000 and 150,000 texts
    python tests/bench/objectives.py --data DATA --models MODELS --work DIR table   the results so far

three-layers    layers 0, 2, 5 of the teacher      no projection
one-layer       layer 0 of the teacher             no projection
bert-tiny       4.4M parameters, 128 dimensions    learned projection

Scan and seeds have the same settings, batches of 256; `tuned` has smaller batches and higher rates, chosen by a few trials on
51,200 texts with the same STS sets.
Each cell is a run of launcher/train.py on two ranks and an evaluation of the student that scored best on the held-out dev
texts; the test texts and the STS sets select nothing. Cells in results.jsonl are not run again, and a cell that was killed
continues from its checkpoint: repeat the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

ROOT = Path(__file__).parents[2]
OBJECTIVES: dict[str, dict[str, float]] = {
    "MSE": {"mse": 1.0},
    "cosine": {"cosine": 1.0},
    "CKD": {"ckd": 1.0},
    "ConGen": {"congen": 1.0},
    "CKD + cosine": {"ckd": 1.0, "cosine": 10.0},
    "ConGen + cosine": {"congen": 1.0, "cosine": 10.0},
    "ConGen + 0.1 CKD + cosine": {"congen": 1.0, "ckd": 0.1, "cosine": 10.0},
}
STUDENTS: dict[str, dict[str, Any]] = {
    "three-layers": {"init": "teacher", "layers": [0, 2, 5]},
    "one-layer": {"init": "teacher", "layers": [0]},
    "bert-tiny": {"init": "bert-tiny"},
}
LR = {"three-layers": 5e-4, "one-layer": 1e-3, "bert-tiny": 1e-3}
ALL_TEXTS, SCAN = 170_000, 51_200
GLOBAL_BATCH, QUEUE = 256, 16_384
TUNED: dict[str, dict[str, Any]] = {
    "three-layers": {"global_batch": 128, "lr": 1e-3},
    "one-layer": {"global_batch": 64, "lr": 2e-3},
    "bert-tiny": {"global_batch": 128, "lr": 2e-3},
}
MORE = [  # student, objective, texts, passes over them, whether tuned
    ("three-layers", "CKD + cosine", 51_200, 1, True),
    ("three-layers", "CKD + cosine", 150_000, 1, True),
    ("three-layers", "CKD + cosine", 128_000, 2, True),
    ("one-layer", "CKD + cosine", 51_200, 1, True),
    ("one-layer", "CKD + cosine", 150_000, 1, True),
    ("bert-tiny", "MSE", 128_000, 1, True),  # at too high a rate for MSE
    ("bert-tiny", "MSE", 128_000, 1, False),
    ("bert-tiny", "ConGen", 51_200, 1, True),
    ("bert-tiny", "ConGen", 128_000, 1, True),
    ("bert-tiny", "ConGen", 128_000, 2, True),
]


class Cell(NamedTuple):
    student: str
    objective: str
    texts: int
    seed: int
    passes: int = 1
    tuned: bool = False

    @property
    def name(self) -> str:
        objective = self.objective.replace(" + ", "-").replace(" ", "")
        return f"{self.student}-{objective}-{self.texts}-{self.passes}-{self.seed}" + ("-tuned" if self.tuned else "")

    @property
    def settings(self) -> dict[str, Any]:
        return TUNED[self.student] if self.tuned else {"global_batch": GLOBAL_BATCH, "lr": LR[self.student]}

    @property
    def available_texts(self) -> int:
        """The texts of the run: more than one pass takes, or those of every pass."""
        return ALL_TEXTS if self.passes == 1 else self.texts


def base_config(num_texts: int, options: argparse.Namespace) -> dict[str, Any]:
    """The texts of all sources, chosen by hash, and the teacher."""
    unlabelled = options.data / "unlabelled"
    sources = [
        {"type": "file", "path": str(unlabelled / "wiki1m_en.txt.gz"), "limit": 100_000},
        {"type": "file", "path": str(unlabelled / "tatoeba_en.txt.gz"), "limit": 40_000},
        {"type": "file", "path": str(unlabelled / "sgd_utterances.txt.gz"), "limit": 30_000},
        {"type": "file", "path": str(unlabelled / "questions_wellformed.txt.gz")},
        {"type": "file", "path": str(unlabelled / "wordnet_examples.txt.gz"), "limit": 15_000},
        {"type": "file", "path": str(options.data / "nli/snli.tsv.gz"), "field": "premise"},
    ]
    return {
        "name": f"base-{num_texts}",
        "runs_dir": str(options.work),
        "text": {"sources": sources, "max_sentences": num_texts},
        "teacher": {"model": str(options.models / "minilm-l6"), "max_length": 64, "tokens_per_batch": 1024, "tasks": 2},
        "shards": {"rows": 20_000},
        "engine": {"num_ranks": 2},
        "stages": ["precompute"],
    }


def config_of(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    student = dict(STUDENTS[cell.student]) | {"max_length": 64}
    if student["init"] != "teacher":
        student["init"] = str(options.models / student["init"])
    steps = cell.texts * cell.passes // cell.settings["global_batch"]
    every = max(50, steps // 10)
    ckd = cell.settings | {
        "micro_batch": 128,
        "queue": QUEUE,
        "warmup": 0.1,
        "weights": OBJECTIVES[cell.objective],
        "epochs": cell.passes,
        "max_steps": steps,
        "dev_every": every,
        "save_every": every,
    }
    base = base_config(cell.available_texts, options)
    return base | {"name": cell.name, "shards_from": base["name"], "seed": cell.seed, "student": student, "ckd": ckd}


def write_config(config: dict[str, Any], work: Path) -> Path:
    path = work / f"{config['name']}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def launch(*arguments: str | Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *map(str, arguments)], check=True, env=environment)


def run(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    config = write_config(config_of(cell, options), options.work)
    launch(ROOT / "launcher/pipeline.py", "--config", config)  # the shards, unless another cell made them
    directory = options.work / cell.name
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    launch(*torchrun, ROOT / "launcher/train.py", "--config", config, "stage=ckd")
    scores = evaluate(directory, options.work / f"base-{cell.available_texts}" / "shards", options)
    shutil.rmtree(directory / "ckd" / "checkpoints")
    done = json.loads((directory / "ckd/DONE.json").read_text(encoding="utf-8"))
    return cell._asdict() | scores | {"seconds": done["results"]["seconds"]}


def evaluate(directory: Path, shards: Path, options: argparse.Namespace) -> dict[str, Any]:
    from distill.corpus.evaluation_sets import read_sts
    from distill.metrics.fidelity import fidelity
    from distill.metrics.held_out import final_rows
    from distill.metrics.sts import sts_scores
    from distill.shards import ShardReader
    from distill.student import Student

    held_out = ShardReader(shards / "held_out")
    rows = final_rows(len(held_out), 2000, 1000)
    student = Student.load(directory / "ckd/student").eval()
    scores = sts_scores(student.encode, read_sts(options.data / "sts"), bootstrap=0)["sts"]
    kept = fidelity(student.encode(held_out.texts(rows)), held_out.vectors(rows).astype("float32"))
    return {"sts": scores["AVG"], "sts_of": scores["AVG_OF"], **{name: round(value, 4) for name, value in kept.items()}}


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def quality(row: dict[str, Any]) -> float:
    """The sum of STS (0..1) and the mean fidelity, by which objectives are ranked."""
    return row["sts"] / 100 + (row["spearman"] + row["spearman_top50"] + row["top10"]) / 3


def cell_of(row: dict[str, Any]) -> Cell:
    return Cell(**{name: row[name] for name in Cell._fields if name in row})


def cells(what: str, results: list[dict[str, Any]]) -> list[Cell]:
    scanned = [row for row in results if cell_of(row)[2:] == (SCAN, 0, 1, False)]
    best = {
        student: [row["objective"] for row in sorted(scanned, key=quality) if row["student"] == student][:-3:-1]
        for student in STUDENTS
    }
    if what == "scan":
        return [Cell(student, objective, SCAN, 0) for student in STUDENTS for objective in OBJECTIVES]
    if what == "seeds":
        contrasted = {"bert-tiny": ["MSE", "CKD", "ConGen"]}
        wanted = {student: dict.fromkeys([*best[student], *contrasted.get(student, [])]) for student in STUDENTS}
        return [Cell(s, objective, SCAN, seed) for s in STUDENTS for objective in wanted[s] for seed in (1, 2)]
    return [Cell(student, objective, texts, 0, passes, tuned) for student, objective, texts, passes, tuned in MORE]


def table(results: list[dict[str, Any]]) -> str:
    groups: dict[tuple[str, bool, int, int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in results:
        cell = cell_of(row)
        groups[cell.student, cell.tuned, cell.texts, cell.passes, cell.objective].append(row)
    lines = ["| student | texts | objective | seeds | STS | spearman | top-50 | top-10 |", "|" + "---|" * 8]
    for (student, tuned, texts, passes, objective), rows in sorted(groups.items()):
        count = f"{texts:,}" + (f" x {passes}" if passes > 1 else "") + (", tuned" if tuned else "")

        def mean(name: str, form: str, rows: list[dict[str, Any]] = rows) -> str:
            values = [row[name] for row in rows]
            spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
            return f"{statistics.mean(values):{form}}{spread}"

        columns = [mean("sts", ".2f"), *(mean(name, ".3f") for name in ("spearman", "spearman_top50", "top10"))]
        lines.append(f"| {student} | {count} | {objective} | {len(rows)} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with unlabelled/, nli/ and sts/")
    parser.add_argument("--models", type=Path, required=True, help="a folder with minilm-l6/ and bert-tiny/")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs and of results.jsonl")
    parser.add_argument("--results", type=Path, help="the results file, if elsewhere")
    parser.add_argument("--students", nargs="*", default=list(STUDENTS), choices=STUDENTS)
    parser.add_argument("what", choices=["scan", "seeds", "more", "table"])
    options = parser.parse_args()
    options.work, options.data, options.models = (path.resolve() for path in (options.work, options.data, options.models))
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.results or options.work / "results.jsonl"
    results = read_results(path)
    if options.what != "table":
        torch.set_num_threads(1)
        known = {cell_of(row) for row in results}
        wanted = [cell for cell in cells(options.what, results) if cell.student in options.students and cell not in known]
        for number, cell in enumerate(wanted):
            print(f"{number + 1} of {len(wanted)}: {cell.name}", flush=True)
            results.append(run(cell, options))
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(results[-1]) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
