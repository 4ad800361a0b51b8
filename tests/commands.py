"""Runs the launchers as a user would, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from distributed_ranks import free_port
from reference_times import hang_limit

ROOT = Path(__file__).parents[1]
LAUNCHER = ROOT / "launcher"


def environment() -> dict[str, str]:
    set_by_tests = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR")
    kept = {name: value for name, value in os.environ.items() if name not in set_by_tests}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MASTER_PORT": str(free_port())}


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(LAUNCHER / script), *map(str, arguments)]


def launch(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs launcher/`script` to its end; stdout and stderr come back together in `.stdout`."""
    return subprocess.run(
        command(script, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=hang_limit(),
    )


def deepspeed(num_ranks: int, *arguments: object, port: int | None = None) -> list[str]:
    """The command that starts train.py on `num_ranks` ranks through the deepspeed launcher."""
    program = str(Path(sys.executable).with_name("deepspeed"))
    options = ["--num_gpus", str(num_ranks), "--master_port", str(port or free_port()), "--quiet"]
    return [program, *options, str(LAUNCHER / "train.py"), *map(str, arguments)]


def kill_group_when(arguments: list[str], ready: Callable[[], bool], *, signum: int = signal.SIGKILL) -> str:
    """Starts a command in a process group of its own and sends `signum` to all of it once `ready()`; returns its output."""
    limit = hang_limit()  # measured before the process runs, or it would be killed too late
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        cwd=ROOT,
        start_new_session=True,
    )
    deadline = time.monotonic() + limit
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
            raise AssertionError(f"it ended or hung before it could be killed:\n{process.communicate()[0]}")
        time.sleep(0.002)
    os.killpg(process.pid, signum)
    return process.communicate(timeout=limit)[0]
