#!/usr/bin/env python3
"""Trains one stage of a run, on one rank or many; the same command again continues from the last checkpoint.

    deepspeed --num_gpus 2 launcher/train.py --config configs/quickstart.yaml stage=ckd
    torchrun --nproc-per-node 2 launcher/train.py --config C stage=finetune
    srun python launcher/train.py --config C stage=hpd                 one task a rank
    python launcher/train.py --config C                                one rank

On a machine without GPUs, `deepspeed --num_gpus N` starts N ranks on its processor.

SIGTERM, SIGUSR1 or SIGUSR2 to any rank, or a file runs/NAME/STOP, stop all ranks after the same step, with a checkpoint; the
same command goes on from there. So does Ctrl-C; a second one ends at once.

Exit codes: 0 done; 75 stopped as asked; 130 stopped by Ctrl-C; 2 an error that its message says how to mend; others: it failed.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import command
from log import RankLog, speak
from ranks import check_batch, ending_together, rank_from_environment, start_process_group

from distill.training.stopping import Stopped, StopRequest

NO_CHECKPOINT = "there is no checkpoint yet: the same command begins again"
A_WHILE = 3.0  # seconds in which a launcher ends the other ranks once rank 0 has said what fails on all of them


def main() -> int:
    signals = Signals()
    command.listen(signals.hear)
    try:
        config, log, device = join(signals)
    except Exception as error:
        if rank > 0:  # as a rule it fails on rank 0 as well, which says it
            signals.code = command.exit_code(error)
            time.sleep(A_WHILE)
            speak()
        raise
    import torch.distributed

    from distill.precision import describe_precision
    from distill.stages import checkpoint_steps, stage_of
    from distill.training.distributed import from_rank_0
    from distill.training.stage import run_stage

    stage, stop = stage_of(config, config.stage), signals.stop
    heartbeats = config.run_dir / f".{stage.name}.ranks"

    def goes_on() -> str:
        steps = checkpoint_steps(stage.directory)
        return f"the same command goes on from step {steps[-1]}" if steps else NO_CHECKPOINT

    with ending_together(heartbeats, device, config.engine.timeout, goes_on) as watch:
        reason = from_rank_0(stage.reason_to_run(), device)
        if rank == 0:
            print(f"{stage.name}: {reason or 'done already'}", file=sys.stderr, flush=True)
            if reason is not None:
                precision = describe_precision(config.engine.precision, device)
                print(f"{stage.name}: precision: {precision}", file=sys.stderr, flush=True)

        def asked_to_stop(step: int) -> bool:
            watch.step = log.step = step
            return stop.is_asked

        if reason is not None:
            with only_one(config.run_dir / f".{stage.name}.lock") if rank == 0 else nullcontext():
                try:
                    run_stage(config, config.stage, device, asked_to_stop)
                except Stopped as stopped:
                    stop.obeyed()
                    if rank == 0:
                        print(f"{stopped}; {command.GOES_ON}", file=sys.stderr, flush=True)
                    torch.distributed.destroy_process_group()
                    return command.INTERRUPTED if signals.interrupted else command.STOPPED

    torch.distributed.destroy_process_group()
    log.add("done")
    return 0


def join(signals: Signals) -> tuple[command.RunConfig, RankLog, Any]:
    """Finds the other ranks. Returns the config, this rank's log and its device."""
    config = command.config_of(arguments)
    check_batch(config, config.stage, int(os.environ["WORLD_SIZE"]))
    from distill.stages import open_run

    if rank == 0:
        open_run(config)
        signals.stop = StopRequest(config.run_dir / "STOP")
    log = RankLog(config.run_dir / "logs", config.stage, rank)
    command.quiet_libraries()
    device = start_process_group(config.engine.timeout)
    signals.joined = True
    return config, log, device


class Signals:
    """What this rank does on a signal: nothing but asks for a stop, once it has joined the others."""

    def __init__(self) -> None:
        self.stop = StopRequest()
        self.joined = False
        self.interrupted = False
        self.code = command.STOPPED  # of an end by a signal, before this rank has joined the others

    def hear(self, signum: int) -> None:
        is_interrupt = signum == signal.SIGINT
        if not self.joined or (is_interrupt and self.interrupted):
            if rank == 0:
                print(f"stopped; {command.GOES_ON}", file=sys.stderr, flush=True)
            os._exit(command.INTERRUPTED if is_interrupt else self.code)
        if is_interrupt and rank == 0:
            print("\nstopping after this step; Ctrl-C again ends at once", file=sys.stderr, flush=True)
        self.interrupted |= is_interrupt
        self.stop.ask()


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Holds a lock as long as this process lives. Raises ValueError if another process trains here."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another process is training this stage; wait for it, or end it") from None
        yield


if __name__ == "__main__":
    parser = command.parser(__doc__)
    parser.add_argument("--local_rank", type=int, help="given by launchers that stay: this rank ends with its launcher")
    arguments = parser.parse_intermixed_args()
    if arguments.local_rank is not None:
        command.end_with_parent()
    rank = rank_from_environment()
    command.run(main, rank=rank, show_traceback=arguments.traceback)
