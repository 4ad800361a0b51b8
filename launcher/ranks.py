"""How a process that was started by the deepspeed launcher, torchrun or srun finds the other ranks."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any


def rank_from_environment() -> int:
    """Sets RANK, WORLD_SIZE and LOCAL_RANK from Slurm's names if nobody has set them; returns the rank."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
        os.environ.update({ours: os.environ[slurm] for ours, slurm in names.items()})
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    return int(os.environ["RANK"])


def start_process_group(timeout: float) -> Any:
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
