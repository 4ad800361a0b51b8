#!/usr/bin/env python3
"""Embeds a run's text with its teacher, into WebDataset shards under runs/NAME/shards.

    python launcher/precompute.py --config configs/quickstart.yaml

Start it as often as you like, here and on other machines that see the run directory: each takes shards that nobody else is
making. Shards that are there already are kept, so the same command again goes on where it stopped.

A teacher too large for one device:

    python launcher/precompute.py --config C teacher.placement=auto                     over GPUs, memory and disk (accelerate)
    deepspeed --num_gpus 8 launcher/precompute.py --config C teacher.placement=zero3    over ranks (ZeRO-3), on any nodes
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext

import command
import job
from log import RankLog
from ranks import ending_together, rank_from_environment, start_process_group


def main() -> int:
    config, begun = command.config_of(arguments), None
    try:
        begun = job.progress(config) if arguments.requeue else None
        return precompute(config)
    except command.Terminated:
        if arguments.requeue:
            job.come_back(config, command.STOPPED, begun)
        raise


def precompute(config: command.RunConfig) -> int:
    """Makes what falls to this task; returns its exit code."""
    import torch

    from distill.precision import autocast_dtype, describe_precision
    from distill.stages import open_run, stage_of
    from distill.teacher.precompute import prepare, run_precompute

    open_run(config)
    reason = stage_of(config, "precompute").reason_to_run()
    if reason is None:
        print(f"precompute: done already ({config.shards_dir})")
        return 0
    if arguments.text_only:
        prepare(config)
        return 0
    command.quiet_libraries()
    spread = config.teacher.placement == "zero3"
    rank = rank_from_environment() if spread else 0
    if spread:
        RankLog(config.precompute_dir.with_name("logs"), "precompute", rank)
        start_process_group(config.engine.timeout)
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local % torch.cuda.device_count())
    amp = autocast_dtype(config.teacher.precision, device)
    if config.teacher.vectors is None and rank == 0:
        print(f"precompute: precision: {describe_precision(config.teacher.precision, device)}", file=sys.stderr)
    heartbeats = config.precompute_dir.with_name(".precompute.ranks")
    with ending_together(heartbeats, device, config.engine.timeout, lambda: command.GOES_ON) if spread else nullcontext():
        whole = run_precompute(config, device, amp, lambda line: print(f"precompute: {line}", file=sys.stderr))
    if not whole and rank == 0:
        print("precompute: nothing is left for this task; others are at work", file=sys.stderr)
    if spread:
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    parser = command.parser(__doc__)
    parser.add_argument("--text-only", action="store_true", help="cut the text into pieces and stop")
    parser.add_argument("--requeue", action="store_true", help="have Slurm start this job again if it is told to stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    command.run(main, rank=int(os.environ.get("RANK", "0")), show_traceback=arguments.traceback)
