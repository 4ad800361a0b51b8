#!/usr/bin/env python3
"""Embeds a run's text with its teacher, into WebDataset shards under runs/NAME/shards.

    python launcher/precompute.py --config configs/quickstart.yaml
    python launcher/precompute.py --config C --task 3 --tasks 8      one of eight; any machine that sees the run directory

Shards that are there already are kept: the same command again goes on where it stopped.
"""

from __future__ import annotations

import os
import sys

import command


def main() -> int:
    import torch

    from distill.stages import open_run, stage_of
    from distill.teacher.precompute import prepare, run_precompute
    from distill.training.engine import autocast_dtype

    config = command.config_of(arguments)
    open_run(config)
    reason = stage_of(config, "precompute").reason_to_run()
    if reason is None:
        print(f"precompute: done already ({config.run_dir / 'shards'})")
        return 0
    if arguments.text_only:
        prepare(config)
        return 0
    command.quiet_libraries()
    task, tasks = arguments.task, arguments.tasks
    if arguments.task_of_slurm:
        task, tasks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    if not 0 <= task < tasks:
        raise ValueError(f"--task {task} is not one of 0 to {tasks - 1}: --tasks says how many there are")
    gpu = int(os.environ.get("SLURM_LOCALID", task)) % max(1, torch.cuda.device_count())
    device = torch.device("cuda", gpu) if torch.cuda.is_available() else torch.device("cpu")
    amp = autocast_dtype(config.teacher.precision, device)
    if not run_precompute(config, device, amp, task=task, num_tasks=tasks):
        print(f"precompute: task {task} of {tasks} has done its share; others are at work", file=sys.stderr)
    return 0


if __name__ == "__main__":
    parser = command.parser(__doc__)
    parser.add_argument("--task", type=int, default=0, help="this task's number, from 0")
    parser.add_argument("--tasks", type=int, default=1, help="how many tasks share the work")
    parser.add_argument("--task-of-slurm", action="store_true", help="take both from SLURM_PROCID and SLURM_NTASKS")
    parser.add_argument("--text-only", action="store_true", help="cut the text into pieces and stop")
    arguments = parser.parse_intermixed_args()
    command.run(main, show_traceback=arguments.traceback)
