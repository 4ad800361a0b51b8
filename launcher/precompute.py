#!/usr/bin/env python3
"""Embeds a run's text with its teacher, into WebDataset shards under runs/NAME/shards.

    python launcher/precompute.py --config configs/quickstart.yaml

Any number of these may run, here and on other machines that see the run directory: each takes shards that no other is making.
Shards that are there already are kept, so the same command again continues where it stopped.

A teacher too large for one device:

    python launcher/precompute.py --config C teacher.placement=auto                     over GPUs, memory and disk (accelerate)
    deepspeed --num_gpus 8 launcher/precompute.py --config C teacher.placement=zero3    over ranks (ZeRO-3), on any nodes
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launcher import command, slurm_job
from launcher.rank_log import RankLog
from launcher.rendezvous import exiting_together, integer, rank_from_environment, start_process_group

if TYPE_CHECKING:
    from distill.config import RunConfig


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("--text-only", action="store_true", help="cut the text into chunks and stop")
    parser.add_argument("--requeue", action="store_true", help="requeue this Slurm job if it is asked to stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    return command.run(lambda: precompute_or_requeue(arguments), show_traceback=arguments.traceback)


def precompute_or_requeue(arguments: argparse.Namespace) -> int:
    from distill.config import load_config

    if arguments.requeue:
        slurm_job.check_environment("--requeue")
    config, begun = load_config(arguments.config, arguments.overrides), None
    try:
        begun = slurm_job.progress(config) if arguments.requeue else None
        return precompute(config, text_only=arguments.text_only)
    except command.Terminated:
        if arguments.requeue:
            slurm_job.maybe_requeue(config, command.STOPPED, begun)
        raise


def precompute(config: RunConfig, *, text_only: bool) -> int:
    """Runs this process's part of the precompute stage: the text alone, or shards too. Returns its exit code."""
    import torch

    from distill.config import open_run, stage_of
    from distill.run.precision import autocast_dtype
    from distill.teacher.precompute import PrecomputeStage

    open_run(config, ["precompute"])
    stage = stage_of(config, "precompute")
    assert isinstance(stage, PrecomputeStage)
    if stage.reason_to_run() is None and (text_only or not stage.lacks_dev_score):
        print(f"precompute: done already ({config.shards_dir})")
        return 0
    if text_only:
        stage.prepare()
        return 0
    command.set_up_libraries()
    sharded = config.teacher.placement == "zero3"
    rank = rank_from_environment() if sharded else 0
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local = integer("LOCAL_RANK" if "LOCAL_RANK" in os.environ else "SLURM_LOCALID", "0")
        device = torch.device("cuda", local % torch.cuda.device_count())
    with ExitStack() as stack:
        if sharded:
            stack.enter_context(RankLog(config.precompute_dir.with_name("logs"), "precompute", rank))
            stage.prepare()  # which may take longer than a collective's timeout: ranks wait for a file lock
            stage.identify(autocast_dtype(config.teacher.precision, device))
            start_process_group(config.engine.timeout)
            heartbeats = config.precompute_dir.with_name(".precompute.ranks")
            stack.enter_context(exiting_together(heartbeats, device, config.engine.timeout, lambda: command.CONTINUES))
        is_complete = stage.run(device)
    if not is_complete and rank == 0:
        print("precompute: nothing is left for this task; others are at work", file=sys.stderr)
    return 0


if __name__ == "__main__":
    command.start(main)
