#!/usr/bin/env python3
"""Checks whether a run of this config would work here: on this machine, or on the nodes that it is started on.

    python launcher/doctor.py --config configs/quickstart.yaml [key=value ...]
    srun python launcher/doctor.py --config C                             one process per rank
    torchrun --nproc-per-node 2 launcher/doctor.py --config C             or through the deepspeed launcher

One process per node is enough, and faster, with the number of ranks that training will have on a node:

    srun --ntasks=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 python launcher/doctor.py --config C --ranks-per-node 8

Rank 0 prints one line if all is well; else what is wrong on which node, and how to fix it. The ranks meet at
MASTER_ADDR:MASTER_PORT, as in training; one that cannot reach rank 0 prints what is wrong on its own node. Healthy nodes take
seconds; where a network or a file system hangs, or a node does not start, it ends within --timeout.

Exit codes: 0 no faults, perhaps warnings; 1 faults; 2 a config that cannot be read, or that names what no node has.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launcher import command, slurm_job
from launcher.rendezvous import num_cores, rank_from_environment, ranks_per_node

if TYPE_CHECKING:
    from distill.config import RunConfig
    from distill.doctor import Context

GRACE = 5.0  # seconds after the timeout that a process which still runs is ended
PRINT_SECONDS = 1.0  # in which rank 0 has printed
IMPORTED = 0.45  # fraction of the timeout in which torch has to be imported
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    parser = command.parser(__doc__)
    parser.add_argument(
        "--ranks-per-node", type=int, help="ranks that training will have on a node; default: those started now"
    )
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="the time that it takes at most (120)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    return command.run(lambda: diagnose(arguments, started), show_traceback=arguments.traceback)


def diagnose(arguments: argparse.Namespace, started: float) -> int:
    """Examines this node together with the others; returns the exit code."""
    rank_from_environment()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # the findings report what fails
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    faulthandler.dump_traceback_later(arguments.timeout + GRACE, exit=True, file=2)  # stderr; works even where the GIL is held
    try:
        with ending_after(IMPORTED * arguments.timeout):
            from distill.doctor import examine, format_diagnosis
        from distill.config import load_config

        command.set_up_libraries()
        config = load_config(arguments.config, arguments.overrides)
        context = context_of(config, started, arguments.timeout, arguments.ranks_per_node)
        diagnosis = examine(context)
    finally:
        faulthandler.cancel_dump_traceback_later()
    if diagnosis is None:
        return 0
    if context.rank == 0:
        print(format_diagnosis(diagnosis, with_table=bool(diagnosis.findings) or sys.stdout.isatty()), flush=True)
    else:
        if context.local_rank == 0:
            print(format_diagnosis(diagnosis, with_table=False), file=sys.stderr, flush=True)
        time.sleep(PRINT_SECONDS)  # a launcher ends all ranks with the first that fails
    return diagnosis.code


@contextmanager
def ending_after(seconds: float) -> Iterator[None]:
    """Ends this process, with a message, if the imports inside, torch above all, take more than `seconds`."""
    message = f"`import torch` is not done after {seconds:.0f} s on {socket.gethostname()}: a slow file system, or a busy node"

    def end() -> None:
        print(f"error: {message}; if it is only slow, --timeout more", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def context_of(config: RunConfig, started: float, timeout: float, num_ranks: int | None) -> Context:
    """This process as its environment describes it."""
    from distill.doctor import Context

    environment = os.environ
    in_slurm, world_size = "SLURM_JOB_NODELIST" in environment, int(environment["WORLD_SIZE"])
    if in_slurm and world_size > 1 and "MASTER_ADDR" not in environment:
        environment |= slurm_job.rendezvous()
    here = processes_here()
    threads = environment.get("OMP_NUM_THREADS", "")
    return Context(
        config,
        started=started,
        timeout=timeout,
        run_id=run_id(),
        rank=int(environment["RANK"]),
        world_size=world_size,
        local_rank=int(environment["LOCAL_RANK"]),
        local_world_size=here,
        hosts=slurm_hosts() if in_slurm and environment["RANK"] == "0" else (),
        ranks_per_node=num_ranks or (here if world_size > 1 else ranks_per_node(config)),
        master_addr=environment.get("MASTER_ADDR", "127.0.0.1"),
        master_port=int(environment.get("MASTER_PORT", "29500")),
        store_is_served=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        cores=num_cores(here),
        threads=int(threads) if threads.isdigit() else None,
        interfaces={name: environment[name] for name in INTERFACES if environment.get(name)},
    )


def run_id() -> str:
    """The same on all ranks, and another one in each run that may be here at the same time."""
    variables = ["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        variables = ["TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"]
    return ".".join(os.environ.get(name, "") for name in variables)


def processes_here() -> int:
    """The doctor's processes on this node."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # torchrun's, the deepspeed launcher's
        if name in os.environ:
            return int(os.environ[name])
    return slurm_counts()[int(os.environ["SLURM_NODEID"])] if "SLURM_STEP_TASKS_PER_NODE" in os.environ else 1


def slurm_counts() -> list[int]:
    """Tasks of this step on each of its nodes: 2(x3),1 is 2, 2, 2, 1."""
    counts = []
    for part in os.environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts


def slurm_hosts() -> tuple[str, ...]:
    """The node of each rank of this step; () where that is not known."""
    try:
        nodes = slurm_job.hostnames(os.environ.get("SLURM_STEP_NODELIST", os.environ["SLURM_JOB_NODELIST"]))
        hosts = tuple(node for node, count in zip(nodes, slurm_counts(), strict=True) for _ in range(count))
    except (OSError, subprocess.SubprocessError, LookupError, ValueError):
        return ()
    return hosts if len(hosts) == int(os.environ["WORLD_SIZE"]) else ()  # tasks that start ranks are no ranks


if __name__ == "__main__":
    command.start(main)
