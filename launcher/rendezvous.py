"""How a rank started by the deepspeed launcher, torchrun or srun finds the other ranks, and exits together with them."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.run import cores
from distill.run.heartbeats import RankHeartbeats
from distill.run.temporary import TemporaryError
from launcher import command, slurm_job
from launcher.rank_log import log_to_file, show_on_terminal

if TYPE_CHECKING:
    from distill.config import RunConfig

RANK_0_FIRST = 1.0  # seconds in which rank 0 may report what all ranks have found


OF_A_RANK = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def rank_from_environment() -> int:
    """Sets RANK, WORLD_SIZE and LOCAL_RANK if nobody has set them; returns the rank. Raises ValueError if they do not fit.

    Slurm's variables are used only in a step of several tasks: a batch script has SLURM_PROCID and SLURM_NTASKS too.
    """
    names: Sequence[str] = list(OF_A_RANK)
    if not os.environ.keys() & set(names):
        if integer("SLURM_STEP_NUM_TASKS", "1") == 1:
            os.environ |= ALONE
        else:
            names = list(OF_A_RANK.values())
    if absent := [name for name in names if name not in os.environ]:
        found = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        raise ValueError(f"{' and '.join(absent)} not set, but {found}: set all of {', '.join(names)}, or none")
    rank, world_size, local_rank = map(integer, names)
    if not 0 <= rank < world_size or not 0 <= local_rank < world_size:
        found = ", ".join(f"{name}={os.environ[name]}" for name in names)
        raise ValueError(f"{found} do not fit: the ranks of W processes are 0 to W - 1")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(local_rank)}
    return rank


def integer(name: str, default: str | None = None) -> int:
    """An environment variable that holds a whole number. Raises ValueError if it does not, or is not set."""
    value = os.environ.get(name, default)
    try:
        return int(value or "")
    except ValueError:
        raise ValueError(f"{name} is {'not set' if value is None else repr(value)}: it must be a whole number") from None


def local_environments(ranks: int) -> list[dict[str, str]]:
    """The environment in which each of the ranks that are started on this machine finds the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(number), "LOCAL_RANK": str(number)} for number in range(ranks)]


def num_gpus() -> int:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES leaves to it."""
    import torch

    return torch.cuda.device_count()


def ranks_per_node(config: RunConfig) -> int:
    """The ranks that training starts on this machine: one per GPU, or fewer as configured; without a GPU, 2 by default."""
    gpus, wanted = num_gpus(), config.engine.num_ranks
    return min(wanted or gpus, gpus) if gpus else wanted or 2


def num_cores(local_world_size: int = 1) -> int:
    """The cores that the ranks of this machine share: those of this process, or of the Slurm step that binds each to a part."""
    if local_world_size > 1 and "SLURM_CPUS_ON_NODE" in os.environ:
        return integer("SLURM_CPUS_ON_NODE")
    return cores.num_cores()


def check_batch(config: RunConfig, stage: str, world_size: int) -> None:
    """Raises ValueError if a stage's global batch does not have a row for each rank."""
    rows = config.train(stage).global_batch
    if rows < world_size:
        raise ValueError(f"{stage}.global_batch {rows} is smaller than the world size {world_size}")


def start_process_group(timeout: float) -> Any:
    """Joins the other ranks, unless this process has; returns this rank's device.

    Raises TemporaryError if the port is taken, and TimeoutError if not all ranks join.
    """
    import logging

    import torch
    from torch.distributed import distributed_c10d

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    deepspeed.utils.logging.logger.setLevel(logging.WARNING)
    on_gpu = torch.cuda.is_available()
    if torch.distributed.is_initialized():
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    if on_gpu:
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"there is no GPU for local rank {local}: this node has {gpus}; start one rank a GPU")
        torch.cuda.set_device(local)
    else:
        # gloo alone: the shared-memory extension would be compiled for a minute and leave its buffers in /dev/shm
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "MASTER_ADDR" not in os.environ and "SLURM_JOB_NODELIST" in os.environ and os.environ["WORLD_SIZE"] != "1":
        os.environ |= slurm_job.rendezvous()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    limit = timedelta(seconds=timeout)
    # DeepSpeed makes groups of its own, which would wait for torch's 30 minutes
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        deepspeed.init_distributed("nccl" if on_gpu else "gloo", timeout=limit, auto_mpi_discovery=False, verbose=False)
    except Exception as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise TemporaryError(
                f"port {os.environ['MASTER_PORT']} is in use on {os.environ['MASTER_ADDR']}: choose another, --master_port N"
            ) from None
        if is_collective_failure(error):
            raise TimeoutError(
                f"the {os.environ['WORLD_SIZE']} ranks did not all join at {place} within {timeout:g} s (engine.timeout): one"
                f" has failed before that, or cannot reach it ({str(error).splitlines()[0]})"
            ) from None
        raise
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


@contextmanager
def exiting_together(folder: Path, device: Any, timeout: float, continues: Callable[[], str]) -> Iterator[RankHeartbeats]:
    """What fails inside, on any rank, is reported by one rank; all others exit quietly with its exit code.

    `folder` is for the ranks' heartbeats; `continues()` says from where the same command would continue.
    """
    from distill.run.collectives import FailedElsewhere, from_rank_0, rank, world_size

    start = from_rank_0(f"{time.time_ns():x}" if rank() == 0 else None, device)
    heartbeats = RankHeartbeats(folder / start, rank(), world_size())
    try:
        yield heartbeats
        heartbeats.close()
        if heartbeats.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt as stop:
        heartbeats.elect(command.exit_code(stop))
        raise
    except Exception as error:
        if is_collective_failure(error) or isinstance(error, FailedElsewhere):
            message = heartbeats.diagnose(str(error).splitlines()[0], timeout)
            if message:
                show_on_terminal()
                print(f"error: {message}; logs: {folder.with_name('logs')}; {continues()}", file=sys.stderr, flush=True)
                raise command.Exit(1) from None
            raise _quiet_exit(heartbeats, error) from None
        if rank() > 0:
            time.sleep(RANK_0_FIRST)
        if not heartbeats.elect(command.exit_code(error)):
            raise _quiet_exit(heartbeats, error) from None
        show_on_terminal()
        raise


def _quiet_exit(heartbeats: RankHeartbeats, error: Exception) -> command.Exit:
    """The exit of a rank whose failure another rank reports; its own log file has what it saw."""
    code, seen = heartbeats.elected_code or 1, command.describe(error).splitlines()[0]
    log_to_file(f"ended after step {heartbeats.step} with exit code {code}; another rank reports why; seen here: {seen}")
    return command.Exit(code)


def is_collective_failure(error: Exception) -> bool:
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
