#!/usr/bin/env python3
"""Embeds a run's text with its teacher, into WebDataset shards under runs/NAME/shards.

    python launcher/precompute.py --config configs/quickstart.yaml
    python launcher/precompute.py --config C --task 3 --tasks 8      one of eight; any machine that sees the run directory

Shards that are there already are kept: the same command again goes on where it stopped.
"""

from __future__ import annotations

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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    amp = autocast_dtype(config.teacher.precision, device)
    whole = run_precompute(config, device, amp, task=arguments.task, num_tasks=arguments.tasks)
    if not whole:
        print(f"precompute: task {arguments.task} of {arguments.tasks} has done its share; others are at work", file=sys.stderr)
    return 0


if __name__ == "__main__":
    parser = command.parser(__doc__)
    parser.add_argument("--task", type=int, default=0, help="this task's number, from 0")
    parser.add_argument("--tasks", type=int, default=1, help="how many tasks share the work")
    parser.add_argument("--text-only", action="store_true", help="cut the text into pieces and stop")
    arguments = parser.parse_intermixed_args()
    command.run(main, show_traceback=arguments.traceback)
