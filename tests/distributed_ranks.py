"""Runs a function on several ranks, processes with gloo or with NCCL: `on_ranks(2, function, *arguments)` -> their results."""

from __future__ import annotations

import os
import pickle
import random
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from launcher.command import log_to_terminal

TIMEOUT = 300


def free_port() -> int:
    """A port that nobody listens on, from a range that only this worker of pytest-xdist and no outgoing connection uses."""
    first = 10_000 + 5_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = random.SystemRandom().randrange(first, first + 5_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _work(
    function: Callable[..., Any], rank: int, size: int, port: int, pipe: Connection, arguments: tuple[Any, ...], backend: str
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log_to_terminal()
    try:
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT))
        # by value: tensors that Connection.send shares would be gone where this process ends before they are received
        pipe.send_bytes(pickle.dumps((True, function(*arguments))))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        os._exit(1)
    os._exit(0)


def start_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, backend: str = "gloo"
) -> tuple[list[multiprocessing.Process], list[Connection]]:
    """Starts `function(*arguments)` on each of `size` ranks; each sends (whether it went well, its result or traceback)."""
    context = multiprocessing.get_context("fork" if backend == "gloo" else "spawn")  # CUDA does not outlive a fork
    port = free_port()
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(function, rank, size, port, theirs, arguments, backend))
        with patch.dict(os.environ, DS_ACCELERATOR="cpu" if backend == "gloo" else "cuda"):
            process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    return processes, pipes


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any, backend: str = "gloo") -> list[Any]:
    """`function(*arguments)` on each of `size` ranks; results in rank order. A rank's exception is raised here."""
    processes, pipes = start_ranks(size, function, *arguments, backend=backend)
    results, failures = [], []
    for rank, pipe in enumerate(pipes):
        try:
            good, value = pipe.recv() if pipe.poll(TIMEOUT) else (False, "no answer")
        except EOFError:
            good, value = False, "ended without an answer"
        (results if good else failures).append(value if good else f"rank {rank}: {value}")
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
    assert not failures, "\n".join(failures)
    return results
