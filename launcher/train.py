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
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import command
from ranks import ending_together, rank_from_environment, start_process_group

from distill.training.stopping import Stopped, StopRequest


def main() -> int:
    config = command.config_of(arguments)
    world_size = int(os.environ["WORLD_SIZE"])
    section = getattr(config, config.stage)
    if section.global_batch < world_size:
        raise ValueError(f"{config.stage}.global_batch {section.global_batch} is smaller than the world size {world_size}")
    from distill.stages import open_run, stage_of

    stop = StopRequest(config.run_dir / "STOP" if rank == 0 else None)
    signals = Signals(stop)
    command.listen(signals.hear)
    if rank == 0:
        open_run(config)
    stage = stage_of(config, config.stage)
    command.quiet_libraries()
    device = start_process_group(config.engine.timeout)
    signals.joined = True
    import torch.distributed

    from distill.training.distributed import from_rank_0
    from distill.training.stage import run_stage

    heartbeats = config.run_dir / f".{stage.name}.ranks"
    with ending_together(heartbeats, device, config.engine.timeout, lambda: goes_on(stage.directory)) as watch:
        reason = from_rank_0(stage.reason_to_run(), device)
        if rank == 0:
            print(f"{stage.name}: {reason or 'done already'}", file=sys.stderr, flush=True)

        def asked_to_stop(step: int) -> bool:
            watch.step = step
            return stop.is_asked

        if reason is not None:
            with only_one(config.run_dir / f".{stage.name}.lock") if rank == 0 else nullcontext():
                try:
                    run_stage(config, config.stage, device, asked_to_stop)
                except Stopped as stopped:
                    stop.obeyed()
                    if rank == 0:
                        print(f"{stopped}; {command.GOES_ON}", file=sys.stderr, flush=True)
                    return command.INTERRUPTED if signals.interrupted else command.STOPPED

    torch.distributed.destroy_process_group()
    return 0


class Signals:
    """What this rank does on a signal: nothing but asks for a stop, once it has joined the others."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop
        self.joined = False
        self.interrupted = False

    def hear(self, signum: int) -> None:
        is_interrupt = signum == signal.SIGINT
        if not self.joined or (is_interrupt and self.interrupted):
            if rank == 0:
                print(f"stopped; {command.GOES_ON}", file=sys.stderr, flush=True)
            os._exit(command.INTERRUPTED if is_interrupt else command.STOPPED)
        if is_interrupt and rank == 0:
            print("\nstopping after this step; Ctrl-C again ends at once", file=sys.stderr, flush=True)
        self.interrupted |= is_interrupt
        self.stop.ask()


def goes_on(stage: Path) -> str:
    """From where the same command goes on, as far as this moment shows."""
    steps = sorted(
        int(path.parent.name.removeprefix("step-")) for path in stage.glob("checkpoints/step-????????/COMPLETE.json")
    )
    return (
        f"the same command goes on from step {steps[-1]}"
        if steps
        else "there is no checkpoint yet: the same command begins again"
    )


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
