#!/usr/bin/env python3
"""Trains one stage of a run, on one rank or many; the same command again continues from the last checkpoint.

    deepspeed --num_gpus 2 launcher/train.py --config configs/quickstart.yaml stage=ckd
    torchrun --nproc-per-node 2 launcher/train.py --config C stage=finetune
    srun python launcher/train.py --config C stage=hpd                 one task a rank
    python launcher/train.py --config C                                one rank

On a machine without GPUs, `deepspeed --num_gpus N` starts N ranks on its processor.

SIGTERM, SIGUSR1 or SIGUSR2 to any rank, or a file runs/NAME/STOP, stop all ranks after the same step, with a checkpoint; the
same command continues from there. So does Ctrl-C; a second one ends at once.

Exit codes: 0 done; 75 stopped on request; 130 stopped by Ctrl-C; 2 an error that the user has to fix, as its message says; else
a failure.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launcher import command
from launcher.rank_log import RankLog, show_on_terminal
from launcher.rendezvous import check_batch, exiting_together, rank_from_environment, start_process_group

NO_CHECKPOINT = "there is no checkpoint yet: the same command begins again"
RANK_0_FIRST = 3.0  # seconds in which a launcher ends the other ranks once rank 0 has reported what fails on all of them


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("--local_rank", type=int, help="given by launchers that stay: this rank ends with its launcher")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.local_rank is not None:
        command.end_with_parent()
    return command.run(lambda: train(arguments), show_traceback=arguments.traceback)


def train(arguments: argparse.Namespace) -> int:
    """Runs the stage on this rank, together with the others; returns the exit code."""
    rank = rank_from_environment()
    stop = RankStop(rank)
    with command.listening(stop.on_signal):
        try:
            return train_with_others(arguments, stop)
        except Exception as error:
            if not stop.joined and rank > 0:  # as a rule it fails on rank 0 as well, which reports it
                stop.code = command.exit_code(error)
                time.sleep(RANK_0_FIRST)
                show_on_terminal()
            raise


def train_with_others(arguments: argparse.Namespace, stop: RankStop) -> int:
    """Finds the other ranks, runs the stage, and exits as they do."""
    from distill.config import load_config, open_run, stage_of
    from distill.run.collectives import from_rank_0
    from distill.run.stage import checkpoint_steps
    from distill.run.stopping import Stopped, StopRequest

    config = load_config(arguments.config, arguments.overrides)
    check_batch(config, config.stage, int(os.environ["WORLD_SIZE"]))
    if stop.rank == 0:
        open_run(config, [config.stage])
        stop.request = StopRequest(config.run_dir / "STOP")
        if command.IN_PIPELINE not in os.environ:
            command.remove_left_over(stop.request)
    with RankLog(config.run_dir / "logs", config.stage, stop.rank) as log:
        command.set_up_libraries()
        device = start_process_group(config.engine.timeout)
        stop.joined = True
        stage = stage_of(config, config.stage)
        heartbeats_dir = config.run_dir / f".{stage.name}.ranks"

        def continues() -> str:
            steps = checkpoint_steps(stage.directory)
            return f"the same command continues from step {steps[-1]}" if steps else NO_CHECKPOINT

        with exiting_together(heartbeats_dir, device, config.engine.timeout, continues) as heartbeats:
            reason = from_rank_0(stage.reason_to_run() if stop.rank == 0 else None, device)
            if stop.rank == 0:
                print(f"{stage.name}: {reason or 'done already'}", file=sys.stderr, flush=True)

            def stop_requested(step: int) -> bool:
                heartbeats.step = log.step = step
                return stop.request.is_requested

            if reason is not None:
                with command.only_one(stage.lock_file) if stop.rank == 0 else nullcontext():
                    try:
                        stage.run(device, stop_requested)
                    except Stopped as stopped:
                        stop.request.clear()
                        if stop.rank == 0:
                            print(f"{stopped}; {command.CONTINUES}", file=sys.stderr, flush=True)
                        return command.INTERRUPTED if stop.interrupted else command.STOPPED
        log.add("done")
        return 0


class RankStop:
    """What a signal does to this rank: it requests a stop, once the rank has joined the others; before, it ends the process."""

    def __init__(self, rank: int) -> None:
        from distill.run.stopping import StopRequest

        self.rank = rank
        self.request = StopRequest()
        self.joined = False
        self.interrupted = False
        self.code = command.STOPPED  # of an end by a signal, before this rank has joined the others

    def on_signal(self, signum: int) -> None:
        is_interrupt = signum == signal.SIGINT
        if not self.joined or (is_interrupt and self.interrupted):
            if self.rank == 0:
                print(f"stopped; {command.CONTINUES}", file=sys.stderr, flush=True)
            os._exit(command.INTERRUPTED if is_interrupt else self.code)
        if is_interrupt and self.rank == 0:
            print("\nstopping after this step; Ctrl-C again ends at once", file=sys.stderr, flush=True)
        self.interrupted |= is_interrupt
        self.request.request()


if __name__ == "__main__":
    command.start(main)
