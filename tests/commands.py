"""Runs the launchers: as a user would, in processes of their own, or by their `main` in a fork of this process."""

from __future__ import annotations

import importlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from distributed_ranks import free_port
from reference_times import hang_limit

ROOT = Path(__file__).parents[1]
LAUNCHER = ROOT / "launcher"
sys.path.append(str(ROOT))  # launcher is no installed package


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


def call(
    script: str, *arguments: object, before: Callable[[], object] | None = None, limit: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `main` of launcher/`script` in a fork of this process, which saves the imports; returns what `launch` does.

    before: called in the fork first. Where it makes the process end by a signal, the code is the signal's, negated, and what
    the process printed is lost. limit: seconds until it is considered hung, instead of `hang_limit()`.
    """
    for module in ("deepspeed", "sentence_transformers", launcher := f"launcher.{script.removesuffix('.py')}"):
        importlib.import_module(module)
    limit, words = limit or hang_limit(), list(map(str, arguments))
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call_main, args=(launcher, words, theirs, before))
    process.start()
    theirs.close()
    is_over = ours.poll(limit)
    if not is_over:
        process.kill()
    process.join()
    assert is_over and (process.exitcode == 0 or before is not None), f"main{words} of {launcher} did not return"
    code, printed = ours.recv() if process.exitcode == 0 else (process.exitcode, "")
    return subprocess.CompletedProcess([script, *words], code, printed)


def _call_main(launcher: str, arguments: list[str], pipe: Connection, before: Callable[[], object] | None) -> None:
    os.environ |= environment()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    if before is not None:
        before()
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            code = sys.modules[launcher].main(arguments)
        except SystemExit as end:  # argparse
            code = end.code or 0
    pipe.send((code, printed.getvalue()))
    os._exit(0)


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
