#!/usr/bin/env python3
"""Trains one stage of a run, on one rank or many; the same command again continues from the last checkpoint.

    deepspeed --num_gpus 2 launcher/train.py --config configs/quickstart.yaml stage=ckd
    torchrun --nproc-per-node 2 launcher/train.py --config C stage=finetune
    srun python launcher/train.py --config C stage=hpd                 one task a rank
    python launcher/train.py --config C                                one rank

On a machine without GPUs, `deepspeed --num_gpus N` starts N ranks on its processor.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import command
from ranks import rank_from_environment, start_process_group


def main() -> int:
    config = command.config_of(arguments)
    world_size = int(os.environ["WORLD_SIZE"])
    section = getattr(config, config.stage)
    if section.global_batch < world_size:
        raise ValueError(f"{config.stage}.global_batch {section.global_batch} is smaller than the world size {world_size}")
    from distill.stages import open_run, stage_of

    if rank == 0:
        open_run(config)
    stage = stage_of(config, config.stage)
    command.quiet_libraries()
    device = start_process_group(config.engine.timeout)
    import torch.distributed

    from distill.training.distributed import from_rank_0
    from distill.training.stage import run_stage

    reason = from_rank_0(stage.reason_to_run(), device)
    if rank == 0:
        print(f"{stage.name}: {reason or 'done already'}", file=sys.stderr, flush=True)
    if reason is not None:
        with only_one(config.run_dir / f".{stage.name}.lock") if rank == 0 else nullcontext():
            run_stage(config, config.stage, device)

    torch.distributed.destroy_process_group()
    return 0


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
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; not used")
    arguments = parser.parse_intermixed_args()
    rank = rank_from_environment()
    command.run(main, rank=rank, show_traceback=arguments.traceback)
