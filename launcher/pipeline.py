#!/usr/bin/env python3
"""Runs all stages of a run, one after the other, on this machine: text, teacher, students, export, evaluation.

    python launcher/pipeline.py --config configs/quickstart.yaml [key=value ...]

A finished stage whose inputs and config have not changed is skipped; the same command again goes on where it stopped.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import command

SRUN = ("srun", "--kill-on-bad-exit=1")  # a rank that fails leaves no other waiting
LAUNCHER = Path(__file__).resolve().parent


def main() -> int:
    from distill.stages import open_run, stage_of

    config = command.config_of(arguments)
    open_run(config)
    ran = False
    for name in config.stages:
        reason = stage_of(config, name).reason_to_run()
        if reason is None:
            print(f"{name}: done already", flush=True)
            continue
        ran = True
        print(f"{name}: {reason}", flush=True)
        started = time.monotonic()
        code = run_stage(config, name)
        if code:
            print(f"{name} ended with exit code {code}; the same command goes on from here", file=sys.stderr)
            return code
        print(f"{name}: done in {time.monotonic() - started:.0f} s{summary(stage_of(config, name).directory)}", flush=True)
    if not ran:
        print("nothing to do: every stage is done and nothing it depends on has changed")
    table = config.run_dir / "evaluate" / "table.txt"
    if table.exists():
        print(f"\n{table.read_text()}")
    return 0


def run_stage(config: command.RunConfig, name: str) -> int:
    """One stage in processes of its own, so that its memory and threads end with it; returns its exit code."""
    same = ["--config", arguments.config, *(["--traceback"] if arguments.traceback else []), *arguments.overrides]
    cores = os.cpu_count() or 1
    if name == "precompute":
        return precompute(same, config.teacher.tasks, cores)
    if name in ("export", "evaluate"):
        return run_all([[sys.executable, str(LAUNCHER / f"{name}.py"), *same]], threads=cores)
    train = [str(LAUNCHER / "train.py"), *same, f"stage={name}"]
    if arguments.srun:
        return run_all([[*SRUN, sys.executable, *train]], threads=1)
    gpus = num_gpus()
    ranks = min(config.engine.num_ranks or gpus, gpus) if gpus else config.engine.num_ranks or 2
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    ports = ["--master_port", str(free_port())]
    return run_all([[deepspeed, "--num_gpus", str(ranks), *ports, "--quiet", *train]], threads=max(1, cores // ranks))


def precompute(same: list[str], tasks: int, cores: int) -> int:
    """The text first, once; then tasks side by side."""
    script = [sys.executable, str(LAUNCHER / "precompute.py"), *same]
    if code := run_all([[*script, "--text-only"]], threads=1):
        return code
    if arguments.srun:
        return run_all([[*SRUN, *script]], threads=1)
    return run_all([script] * tasks, threads=max(1, cores // tasks), numbered=True)


def run_all(commands: list[list[str]], *, threads: int, numbered: bool = False) -> int:
    """Runs commands side by side; when one fails, the others are ended. Returns the first code that is not 0.

    `numbered`: each finds its number, from 0, in LOCAL_RANK, and so its GPU.
    """
    environment = {"OMP_NUM_THREADS": str(threads)} | dict(os.environ)
    processes = [
        subprocess.Popen(command, env=environment | ({"LOCAL_RANK": str(number)} if numbered else {}))
        for number, command in enumerate(commands)
    ]
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        while any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes):
                break
            time.sleep(0.05)
    except KeyboardInterrupt:
        for process in processes:
            process.send_signal(signal.SIGINT)  # a terminal has sent it already, a batch system has not
            process.wait()
        return command.INTERRUPTED
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    return next((code for code in [process.wait() for process in processes] if code), 0)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def summary(directory: Path) -> str:
    """What a stage's DONE.json says of it, in a few words."""
    from distill.stages import read_json

    results = (read_json(directory / "DONE.json") or {}).get("results", {})
    parts = [f"{results[key]:,} {key}" for key in ("sentences", "held_out", "steps") if isinstance(results.get(key), int)]
    if isinstance(results.get("best_score"), float):
        parts.append(f"best dev score {results['best_score']:.3f}")
    return f" ({', '.join(parts)})" if parts else ""


if __name__ == "__main__":
    parser = command.parser(__doc__)
    parser.add_argument("--srun", action="store_true", help="inside a Slurm allocation: start ranks and tasks with srun")
    arguments = parser.parse_intermixed_args()
    command.run(main, show_traceback=arguments.traceback)
