#!/usr/bin/env python3
"""Runs all stages of a run, one after the other, on this machine: text, teacher, students, export, evaluation.

    python launcher/pipeline.py --config configs/quickstart.yaml [key=value ...]

A finished stage whose inputs and config have not changed is skipped; the same command again goes on where it stopped.

SIGTERM, SIGUSR1, SIGUSR2 or a file runs/NAME/STOP stop it: training with a checkpoint, other stages with what they have
finished; the exit code is then 75. So does Ctrl-C, with 130; a second one ends everything at once.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import command
import job
from ranks import check_batch, meetings

from distill.models import num_layers
from distill.training.stopping import StopRequest

LAUNCHER = Path(__file__).resolve().parent
END_OF_RANKS = 60  # seconds from the end of a training stage's first rank to that of its last
ASKS_TO_STOP = signal.SIGUSR1  # srun passes it on to its tasks; of SIGTERM it kills them
ENDS_OF_A_STOP = (command.INTERRUPTED, *(128 + each for each in (ASKS_TO_STOP, signal.SIGTERM, signal.SIGKILL)))
PATIENCE = 20.0  # seconds that the other processes of a stage have to end once one has failed


def main() -> int:
    config = command.config_of(arguments)
    if not arguments.srun:
        begin(config)
        return run_stages(config)
    begun = None
    try:
        begun = job.progress(config)
        begin(config)
        os.environ |= job.meeting_place()
        code = look_at_nodes(config) or run_stages(config)
    except command.Terminated:  # before the stages listened
        code = command.STOPPED
    return job.come_back(config, code, begun)


def begin(config: command.RunConfig) -> None:
    from distill.export.formats import require_packages
    from distill.stages import open_run

    if "export" in config.stages:
        require_packages(config.export.formats)
    check_student(config)
    open_run(config)


def check_student(config: command.RunConfig) -> None:
    """Before the teacher works for hours: that the student's layers are there. Raises ValueError."""
    from distill.stages import stage_of, trained_stages

    begins = "precompute" in config.stages and stage_of(config, "precompute").reason_to_run() is not None
    encoder = config.teacher.model if config.student.init == "teacher" else config.student.init
    if begins and trained_stages(config) and encoder and (depth := num_layers(encoder)):
        config.student.kept(depth)


def look_at_nodes(config: command.RunConfig) -> int:
    """Whether this job's nodes would do, before anything is begun on them; returns doctor.py's exit code."""
    ranks = ranks_a_node(config)
    srun, cores = job.srun_python(1)
    doctor = [str(LAUNCHER / "doctor.py"), "--config", arguments.config, f"--ranks-per-node={ranks}"]
    environment = {"OMP_NUM_THREADS": str(max(1, cores // ranks))} | dict(os.environ)
    return subprocess.run([*srun, *doctor, *arguments.overrides], env=environment).returncode


def run_stages(config: command.RunConfig) -> int:
    """All stages that are not done; returns the exit code."""
    from distill.stages import stage_of

    stop = StopRequest(config.run_dir / "STOP")
    signals = Signals(stop)
    command.listen(signals.hear)
    ran = False
    for name in config.stages:
        if stop.is_asked:
            return stopped(signals)
        reason = stage_of(config, name).reason_to_run()
        if reason is None:
            print(f"{name}: done already", flush=True)
            continue
        ran = True
        print(f"{name}: {reason}", flush=True)
        started = time.monotonic()
        code = run_stage(config, name, signals)
        if code == command.STOPPED:
            return stopped(signals)
        if code:
            stop.obeyed()
            mended = "once that is mended, " if code == command.MENDED_BY_USER else ""
            print(f"{name} ended with exit code {code}; {mended}{command.GOES_ON}", file=sys.stderr)
            return code
        print(f"{name}: done in {time.monotonic() - started:.0f} s{summary(stage_of(config, name).directory)}", flush=True)
    stop.obeyed()  # too late: all is done
    if not ran:
        print("nothing to do: every stage is done and nothing it depends on has changed")
    table = config.run_dir / "evaluate" / "table.txt"
    if table.exists():
        print(f"\n{table.read_text()}\nstudents: {config.run_dir / 'export'}")
    report = config.run_dir / "report.html"
    if report.exists():
        print(f"the run on one page: {report}")
    return 0


class Signals:
    """What this process has been sent."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop
        self.num_interrupts = 0

    def hear(self, signum: int) -> None:
        self.num_interrupts += signum == signal.SIGINT
        self.stop.ask()


def stopped(signals: Signals) -> int:
    """The exit code, once nothing runs any more."""
    signals.stop.obeyed()
    print(f"stopped as asked; {command.GOES_ON}", file=sys.stderr)
    return command.INTERRUPTED if signals.num_interrupts else command.STOPPED


def run_stage(config: command.RunConfig, name: str, signals: Signals) -> int:
    """One stage in processes of its own, so that its memory and threads end with it; returns its exit code."""
    same = ["--config", arguments.config, *(["--traceback"] if arguments.traceback else []), *arguments.overrides]
    cores = os.cpu_count() or 1
    if name == "precompute":
        return precompute(same, config.teacher.tasks, cores, signals)
    if name in ("export", "evaluate"):
        return run_all([[sys.executable, str(LAUNCHER / f"{name}.py"), *same]], signals, threads=cores)
    script = [str(LAUNCHER / "train.py"), *same, f"stage={name}"]
    ranks = ranks_a_node(config)
    if (config.engine.num_ranks or 0) > ranks:
        print(f"{name}: one rank for each of the {ranks} GPUs of this node, instead of {config.engine.num_ranks}", flush=True)
    check_batch(config, name, ranks * int(os.environ["SLURM_JOB_NUM_NODES"] if arguments.srun else 1))
    if arguments.srun:
        srun, threads = job.srun_python(ranks, wait=END_OF_RANKS)
        return run_all([[*srun, *script]], signals, threads=threads, stops_by_file=True)
    commands = [[sys.executable, *script, f"--local_rank={number}"] for number in range(ranks)]
    return run_all(commands, signals, threads=max(1, cores // ranks), environments=meetings(ranks), stops_by_file=True)


def precompute(same: list[str], tasks: int, cores: int, signals: Signals) -> int:
    """The text first, once; then tasks side by side."""
    script = [str(LAUNCHER / "precompute.py"), *same]
    if code := run_all([[sys.executable, *script, "--text-only"]], signals, threads=1):
        return code
    if arguments.srun:
        srun, threads = job.srun_python(num_gpus() or tasks)
        return run_all([[*srun, *script]], signals, threads=threads)
    numbers = [{"LOCAL_RANK": str(number)} for number in range(tasks)]  # where each finds its GPU
    return run_all([[sys.executable, *script]] * tasks, signals, threads=max(1, cores // tasks), environments=numbers)


def run_all(
    commands: list[list[str]],
    signals: Signals,
    *,
    threads: int,
    environments: list[dict[str, str]] | None = None,
    stops_by_file: bool = False,
) -> int:
    """Runs commands side by side, each with its own environment on top of this one; when one fails, the others are ended.

    A stop is passed on: by the file STOP to ranks, which stop together, by a signal to others. Returns the first code that is
    not 0, and STOPPED for processes that were ended because of a stop.
    """
    shared = {"OMP_NUM_THREADS": str(threads)} | dict(os.environ)
    own = environments or [{}] * len(commands)
    processes = [subprocess.Popen(each, env=shared | more) for each, more in zip(commands, own, strict=True)]
    at_once = signal.SIGTERM if arguments.srun else signal.SIGKILL  # srun's death would leave its tasks
    passed_on, deadline = False, math.inf
    while any(process.poll() is None for process in processes):
        time.sleep(0.05)
        if signals.stop.is_asked and not passed_on:
            passed_on = True
            if stops_by_file:
                assert signals.stop.file is not None
                signals.stop.file.touch()
            else:
                send(processes, ASKS_TO_STOP)
        if deadline == math.inf and any(process.returncode for process in processes):
            deadline = time.monotonic() + PATIENCE
            send(processes, signal.SIGTERM)
        if signals.num_interrupts > 1 or time.monotonic() > deadline:
            send(processes, at_once)
    code = next((process.returncode for process in processes if process.returncode), 0)
    code = code if code >= 0 else 128 - code
    return command.STOPPED if passed_on and code in ENDS_OF_A_STOP else code


def send(processes: list[subprocess.Popen[bytes]], signum: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signum)


def ranks_a_node(config: command.RunConfig) -> int:
    gpus = num_gpus()
    return min(config.engine.num_ranks or gpus, gpus) if gpus else config.engine.num_ranks or 2


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


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
