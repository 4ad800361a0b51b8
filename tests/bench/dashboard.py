"""The cost of TensorBoard: the fraction of the CKD loop's time that measuring and writing what is logged takes.

    python tests/bench/dashboard.py --model MODELS/minilm-l6 --text DATA/unlabelled/wiki1m_en.txt.gz --work /tmp/bench

measuring   on logged steps alone: hardest negatives, masked negatives, reference losses, in the forward pass
counting    on every step: tokens, and the values added to the sums over ranks
writing     scalars and histograms

Measured by wrapping what the loop calls, as ckd_run.py does. Run nothing else meanwhile.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch.distributed as dist
from ckd_run import CPU, StepTimer, ckd_stage, delete_training, embedded_run, join_ranks, on_ranks, run_parser

from distill.config import RunConfig
from distill.training import loop
from distill.training.step_metrics import StepMetrics
from distill.training.task import StepContext
from distill.training.teacher_keys import TeacherKeysModule

FIRST_STEPS = 10  # up to the first logged one, in which kernels are chosen; not counted
GOAL = 0.01
PARTS = {
    "measuring": [(TeacherKeysModule, "_observe")],
    "counting": [(StepMetrics, "count"), (StepMetrics, "sums"), (StepContext, "observations")],
    "writing": [(loop.Trainer, "_log")],
}


def measure_rank(rank: int, world_size: int, port: int, threads: int, config: RunConfig) -> dict[str, Any]:
    join_ranks(rank, world_size, port, threads)
    timer = StepTimer()
    for name, methods in PARTS.items():
        for owner, method in methods:
            setattr(owner, method, timer.part(name, getattr(owner, method)))
    ckd_stage(config).run(CPU)
    dist.destroy_process_group()
    total, counted = timer.total_seconds(FIRST_STEPS), timer.seconds[FIRST_STEPS:]
    fractions = {name: round(sum(step[name] for step in counted) / total, 5) for name in PARTS}
    return {"steps": len(counted), "seconds_per_step": round(total / len(counted), 4), "fraction_of_step": fractions}


def main() -> None:
    parser = run_parser(__doc__, num_texts=20_000, global_batch=256, micro_batch=64)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--queue", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--log-every", type=int, default=10)
    options = parser.parse_args()
    ckd = {"global_batch": options.global_batch, "micro_batch": options.micro_batch, "queue": options.queue, "prefill": True}
    ckd |= {"epochs": 1e6, "max_steps": options.steps, "log_every": options.log_every}
    config = embedded_run(options.work, options.model, options.text, options.num_texts, layers=options.layers, ckd=ckd)
    delete_training(config)
    ranks = on_ranks(measure_rank, options.ranks, max(1, (os.cpu_count() or 1) // options.ranks), config)
    largest = max(sum(rank["fraction_of_step"].values()) for rank in ranks)
    goals = {"TensorBoard's fraction of a step": {"goal": GOAL, "is": round(largest, 4), "met": largest <= GOAL}}
    result = {**ckd, "ranks": ranks, "goals": goals}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
