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
from datetime import timedelta
from pathlib import Path

import command


def rank_from_environment() -> int:
    """Sets RANK, WORLD_SIZE and LOCAL_RANK from Slurm's names if nobody has set them; returns the rank."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
        os.environ.update({ours: os.environ[slurm] for ours, slurm in names.items()})
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    return int(os.environ["RANK"])


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


def start_process_group(timeout: float):
    """Joins the other ranks; returns this rank's device. Raises ValueError if the port is taken."""
    import logging

    import torch

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    deepspeed.utils.logging.logger.setLevel(logging.WARNING)
    # gloo alone: the shared-memory extension would be compiled for a minute and leave its buffers in /dev/shm
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    try:
        deepspeed.init_distributed(
            "nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout), auto_mpi_discovery=False, verbose=False
        )
    except Exception as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            port = os.environ["MASTER_PORT"]
            raise ValueError(f"port {port} is in use on {os.environ['MASTER_ADDR']}: choose another, --master_port N") from None
        raise
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


if __name__ == "__main__":
    parser = command.parser(__doc__)
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; not used")
    arguments = parser.parse_intermixed_args()
    rank = rank_from_environment()
    command.run(main, rank=rank, show_traceback=arguments.traceback)
