#!/usr/bin/env python3
"""Says whether a run of this config would work here: on this machine, or on the nodes that it is started on.

    python launcher/doctor.py --config configs/quickstart.yaml [key=value ...]
    srun python launcher/doctor.py --config C                             one process a rank
    torchrun --nproc-per-node 2 launcher/doctor.py --config C             or through the deepspeed launcher

One process a node is enough, and sooner done, if it is told how many ranks a node will have:

    srun --ntasks=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 python launcher/doctor.py --config C --ranks-per-node 8

One line if all is well; else a table, what is wrong on which node, and what mends it. It takes less than 20 seconds, also where
a network or a file system hangs. Nodes tell each other over the run directory and over the network, so that either is found out
by the other.

Exit codes: 0 all is well, but for warnings; 1 faults; 2 a config that cannot be read, or asks for what no node has.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import command
import job
from ranks import rank_from_environment

from distill.doctor import Start, examine, printed, report_to_rank_0

if TYPE_CHECKING:
    import torch

A_MOMENT = 1.0  # seconds in which rank 0 has printed
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
GPUS = "nvidia[0-9]*"


def main() -> int:
    start = start_here(command.config_of(arguments))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if rank == 0:
        diagnosis = examine(start, join)
        print(printed(diagnosis, always_table=sys.stdout.isatty()), flush=True)
        return diagnosis.code
    if problem := report_to_rank_0(start, join):
        print(f"doctor: {problem}", file=sys.stderr, flush=True)
        time.sleep(A_MOMENT)  # a launcher ends all ranks with the first that fails
        return 1
    return 0


def start_here(config: command.RunConfig) -> Start:
    """What the environment says of this process."""
    in_slurm = "SLURM_JOB_NODELIST" in os.environ
    world_size = int(os.environ["WORLD_SIZE"])
    if in_slurm and world_size > 1 and "MASTER_ADDR" not in os.environ:
        os.environ |= job.meeting_place()
    here = processes_here()
    ranks = arguments.ranks_per_node or (here if world_size > 1 else ranks_alone(config))
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return Start(
        config,
        name=name_of_start(),
        began=began,
        launcher=Path(__file__).resolve().parent,
        rank=rank,
        world_size=world_size,
        local_rank=int(os.environ["LOCAL_RANK"]),
        hosts=slurm_hosts() if in_slurm and rank == 0 else (),
        ranks_per_node=ranks,
        num_training_ranks=world_size * ranks // here,
        address=os.environ.get("MASTER_ADDR", "127.0.0.1"),
        port=int(os.environ.get("MASTER_PORT", "29500")),
        is_store_served=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        threads=int(threads) if threads.isdigit() else None,
        interfaces={name: os.environ[name] for name in INTERFACES if os.environ.get(name)},
    )


def name_of_start() -> str:
    """A file name that all ranks of this start have, and no other start at the same time."""
    if os.environ["WORLD_SIZE"] == "1":
        return str(os.getpid())
    variables = ["MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"]
    if "SLURM_STEP_ID" in os.environ:
        variables = ["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"]
    return re.sub(r"[^\w.]+", "-", ".".join(os.environ.get(name, "") for name in variables))


def processes_here() -> int:
    """The processes of this start on this node."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # torchrun's, the deepspeed launcher's
        if name in os.environ:
            return int(os.environ[name])
    return slurm_counts()[int(os.environ["SLURM_NODEID"])] if "SLURM_STEP_TASKS_PER_NODE" in os.environ else 1


def ranks_alone(config: command.RunConfig) -> int:
    """The ranks that pipeline.py would start on this machine."""
    gpus = len(list(Path("/dev").glob(GPUS)))
    return min(config.engine.num_ranks or gpus, gpus) if gpus else config.engine.num_ranks or 2


def slurm_counts() -> list[int]:
    """Tasks of this step on each of its nodes: 2(x3),1 is 2, 2, 2, 1."""
    counts = []
    for part in os.environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts


def slurm_hosts() -> tuple[str, ...]:
    """The node of each rank of this step; () where that cannot be found out."""
    try:
        nodes = job.hostnames(os.environ.get("SLURM_STEP_NODELIST", os.environ["SLURM_JOB_NODELIST"]))
        hosts = tuple(node for node, count in zip(nodes, slurm_counts(), strict=True) for _ in range(count))
        return hosts if len(hosts) == int(os.environ["WORLD_SIZE"]) else ()  # tasks that start ranks are no ranks
    except (OSError, subprocess.SubprocessError, LookupError, ValueError):
        return ()


def join(store: Any, timeout: float) -> torch.device:
    """Makes this process a rank of the process group that training would have."""
    import torch

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=10 * timeout if on_gpu else timeout),  # at NCCL's, its watchdog ends the process
    )
    return device


if __name__ == "__main__":
    began = time.monotonic()
    parser = command.parser(__doc__)
    parser.add_argument(
        "--ranks-per-node", type=int, help="ranks a node that training will have; else as many as are started now"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what fails is said in our own words
    rank = rank_from_environment()
    command.run(main, rank=rank, show_traceback=arguments.traceback)
