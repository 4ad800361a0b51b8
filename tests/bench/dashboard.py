"""What TensorBoard costs: the share of the CKD loop's time that is spent in measuring and writing what is logged.

    python tests/bench/dashboard.py --model MODELS/minilm-l6 --text DATA/unlabelled/wiki1m_en.txt.gz --work /tmp/bench

measuring   on logged steps alone: hardest negatives, masked ones, floors, inside the forward pass
counting    on every step: tokens, and what is added to the sums that ranks exchange
writing     scalars and histograms

Timed from outside by wrapping what the loop calls, as ckd_run.py does. Nothing else may run meanwhile.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch.distributed as dist
from ckd_run import CPU, StepClock, begin_again, embedded_run, on_ranks, run_parser
from ckd_run import join_ranks as join

from distill.config import RunConfig
from distill.training import loop
from distill.training.ckd import CkdTask
from distill.training.instruments import Instruments
from distill.training.stage import run_stage

FIRST_STEPS = 10  # up to the first logged one, in which kernels are chosen; not counted
GOAL = 0.01
PARTS = {
    "measuring": [(CkdTask, "_measure")],
    "counting": [(Instruments, "count"), (Instruments, "sums"), (CkdTask, "take_observed")],
    "writing": [(loop.Trainer, "_log")],
}


def rank_of(rank: int, world_size: int, port: int, threads: int, config: RunConfig) -> dict[str, Any]:
    join(rank, world_size, port, threads)
    clock = StepClock()
    for name, methods in PARTS.items():
        for owner, method in methods:
            setattr(owner, method, clock._part(name, getattr(owner, method)))
    run_stage(config, "ckd", CPU)
    dist.destroy_process_group()
    total = clock.ends[-1] - clock.starts[FIRST_STEPS]
    counted = clock.seconds[FIRST_STEPS:]
    shares = {name: round(sum(step[name] for step in counted) / total, 5) for name in PARTS}
    return {"steps": len(counted), "seconds_a_step": round(total / len(counted), 4), "share": shares}


def main() -> None:
    parser = run_parser(__doc__, sentences=20_000, global_batch=256, micro_batch=64)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--queue", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--log-every", type=int, default=10)
    options = parser.parse_args()
    ckd = {"global_batch": options.global_batch, "micro_batch": options.micro_batch, "queue": options.queue, "prefill": True}
    ckd |= {"epochs": 1e6, "max_steps": options.steps, "log_every": options.log_every}
    config = embedded_run(options.work, options.model, options.text, options.sentences, layers=options.layers, ckd=ckd)
    begin_again(config)
    ranks = on_ranks(rank_of, options.ranks, max(1, (os.cpu_count() or 1) // options.ranks), config)
    worst = max(sum(rank["share"].values()) for rank in ranks)
    goals = {"TensorBoard's share of a step": {"goal": GOAL, "is": round(worst, 4), "met": worst <= GOAL}}
    result = {**ckd, "ranks": ranks, "goals": goals}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
