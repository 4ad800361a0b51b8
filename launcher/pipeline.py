#!/usr/bin/env python3
"""Runs all stages of a run, one after the other, on this machine: text, teacher, students, export, evaluation, report.

    python launcher/pipeline.py --config configs/quickstart.yaml [key=value ...]

A finished stage whose inputs and config have not changed is skipped; the same command again continues where it stopped.

SIGTERM, SIGUSR1, SIGUSR2 or a file runs/NAME/STOP stop it: training with a checkpoint, other stages with what they have
finished; the exit code is then 75. So does Ctrl-C, with 130; a second one ends everything at once.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launcher import command, slurm_job
from launcher.rendezvous import check_batch, local_environments, num_cores, num_gpus, ranks_per_node

if TYPE_CHECKING:
    from distill.config import RunConfig
    from distill.run.stopping import StopRequest

LAUNCHER = Path(__file__).resolve().parent
WAIT_FOR_RANKS = 60  # seconds from the exit of a training stage's first rank to that of its last
ASK_TO_STOP = signal.SIGUSR1  # srun passes it on to its tasks; of SIGTERM it kills them
STOPPED_CODES = (command.INTERRUPTED, *(128 + each for each in (ASK_TO_STOP, signal.SIGTERM, signal.SIGKILL)))
WAIT_FOR_TASKS = 2.0  # seconds until it is seen again whether other tasks have finished
GRACE = 20.0  # seconds that the other processes of a stage have to exit once one has failed


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("--srun", action="store_true", help="inside a Slurm allocation: start ranks and tasks with srun")
    arguments = parser.parse_intermixed_args(argv)
    return command.run(lambda: run_pipeline(arguments), show_traceback=arguments.traceback)


def run_pipeline(arguments: argparse.Namespace) -> int:
    from distill.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    pipeline = Pipeline(config, arguments)
    if not arguments.srun:
        pipeline.begin()
        return pipeline.run_stages()
    slurm_job.check_environment("--srun")
    begun = None
    try:
        begun = slurm_job.progress(config)
        pipeline.begin()
        os.environ |= slurm_job.rendezvous()
        code = pipeline.check_nodes() or pipeline.run_stages()
    except command.Terminated:  # before the stages listened
        code = command.STOPPED
    return slurm_job.maybe_requeue(config, code, begun)


class Signals:
    """The signals that this process has received; each requests a stop."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop
        self.num_interrupts = 0

    def on_signal(self, signum: int) -> None:
        self.num_interrupts += signum == signal.SIGINT
        self.stop.request()


@dataclass(frozen=True)
class Pipeline:
    """The stages of a run on this machine, or on the nodes of a Slurm job with --srun."""

    config: RunConfig
    arguments: argparse.Namespace

    def begin(self) -> None:
        """Checks what can be known before the first stage works, and creates the run directory. Raises Exit for problems."""
        from distill.config import open_run
        from distill.doctor.preflight import problems

        command.set_up_libraries()
        if found := problems(self.config):
            for problem in found:
                print(f"error: {problem}", file=sys.stderr)
            raise command.Exit(command.USER_ERROR)
        for name in self.config.training_stages:
            if self.config.stage_of(name).reason_to_run() is not None:
                check_batch(self.config, name, self.world_size())
        open_run(self.config, self.config.stages)

    def world_size(self) -> int:
        """The ranks of a training stage, on all nodes."""
        return ranks_per_node(self.config) * int(os.environ["SLURM_JOB_NUM_NODES"] if self.arguments.srun else 1)

    def check_nodes(self) -> int:
        """Runs doctor.py on the nodes of this job before anything is begun on them; returns its exit code."""
        ranks = ranks_per_node(self.config)
        srun, cores = slurm_job.srun_python(1)
        doctor = [str(LAUNCHER / "doctor.py"), "--config", self.arguments.config, f"--ranks-per-node={ranks}"]
        environment = {"OMP_NUM_THREADS": str(max(1, cores // ranks))} | dict(os.environ)
        return subprocess.run([*srun, *doctor, *self.arguments.overrides], env=environment).returncode

    def run_stages(self) -> int:
        """Runs all stages that are not finished; returns the exit code."""
        from distill.run.stopping import StopRequest

        stop = StopRequest(self.config.run_dir / "STOP")
        command.remove_left_over(stop)
        signals = Signals(stop)
        with command.listening(signals.on_signal):
            ran = False
            for name in self.config.stages:
                if stop.is_requested:
                    return stopped(signals)
                stage = self.config.stage_of(name)
                reason = stage.reason_to_run()
                if reason is None:
                    print(f"{name}: done already", flush=True)
                    continue
                ran = True
                print(f"{name}: {reason}", flush=True)
                started = time.monotonic()
                code = self.run_stage(name, signals)
                if code == command.STOPPED:
                    return stopped(signals)
                if code:
                    stop.clear()
                    fixed = "once that is fixed, " if code == command.USER_ERROR else ""
                    print(f"{name} ended with exit code {code}; {fixed}{command.CONTINUES}", file=sys.stderr)
                    return code
                print(f"{name}: done in {time.monotonic() - started:.0f} s{summary(stage.directory)}", flush=True)
            stop.clear()  # too late: all is done
            if not ran:
                print("nothing to do: every stage is done and nothing it depends on has changed")
            if "evaluate" in self.config.stages:
                self.report(write=ran)
        return 0

    def report(self, *, write: bool) -> None:
        """Writes the model cards and the page of an evaluated run, and prints where they are."""
        from distill.evaluation.score_tables import format_results
        from distill.metrics.results import read_results
        from distill.run.files import read_json

        config = self.config
        directory, page = config.run_dir / "evaluate", config.run_dir / "report.html"
        if write or not page.exists() or page.stat().st_mtime < (directory / "DONE.json").stat().st_mtime:
            from distill.report.page import write_report

            write_report(config)
        results = read_results(directory / "results.json")
        done = read_json(directory / "DONE.json") or {}
        in_order = {name: results[name] for name in done["results"]["models"]}  # read_results sorts by name
        table = format_results(in_order)
        print(f"\n{table}\n\nstudents: {config.run_dir / 'export'}\nthe run on one page: {page}")

    def run_stage(self, name: str, signals: Signals) -> int:
        """One stage in processes of its own, so that its memory and threads end with it; returns its exit code."""
        arguments, config = self.arguments, self.config
        same = ["--config", arguments.config, *(["--traceback"] if arguments.traceback else []), *arguments.overrides]
        cores = num_cores()
        if name == "precompute":
            return self.precompute(same, cores, signals)
        if name not in config.training_stages:
            return self.run_all([[sys.executable, str(LAUNCHER / f"{name}.py"), *same]], signals, threads=cores)
        script = [str(LAUNCHER / "train.py"), *same, f"stage={name}"]
        ranks = ranks_per_node(self.config)
        if (config.engine.num_ranks or 0) > ranks:
            num_ranks = config.engine.num_ranks
            print(f"{name}: one rank for each of the {ranks} GPUs of this node, instead of {num_ranks}", flush=True)
        if arguments.srun:
            srun, threads = slurm_job.srun_python(ranks, wait=WAIT_FOR_RANKS)
            return self.run_all([[*srun, *script]], signals, threads=threads, stops_by_file=True)
        commands = [[sys.executable, *script]] * ranks
        threads = max(1, cores // ranks)
        return self.run_all(commands, signals, threads=threads, environments=local_environments(ranks), stops_by_file=True)

    def precompute(self, same: list[str], cores: int, signals: Signals) -> int:
        """The text first, once; then tasks side by side, and again where tasks of others have left shards out."""
        script = [str(LAUNCHER / "precompute.py"), *same]
        if code := self.run_all([[sys.executable, *script, "--text-only"]], signals, threads=1):
            return code
        before = None
        while not (code := self.run_tasks(script, cores, signals)) and (left := self.wait_for_others(signals)):
            if signals.stop.is_requested:
                return command.STOPPED
            if left == before:  # the next stage says what is wrong
                break
            before = left
        return code

    def run_tasks(self, script: list[str], cores: int, signals: Signals) -> int:
        """The tasks of the precompute stage on this machine or on the nodes of the job; returns the exit code."""
        tasks = self.tasks_per_node()
        if self.arguments.srun:
            srun, threads = slurm_job.srun_python(tasks)
            return self.run_all([[*srun, *script]], signals, threads=threads)
        if self.config.teacher.placement == "zero3":
            environments = local_environments(tasks)
        else:
            environments = [{"LOCAL_RANK": str(number)} for number in range(tasks)]  # where each finds its GPU
        commands = [[sys.executable, *script]] * tasks
        return self.run_all(commands, signals, threads=max(1, cores // tasks), environments=environments)

    def tasks_per_node(self) -> int:
        """The processes of the precompute stage on a node: a teacher placed by accelerate uses all of its devices in one."""
        teacher = self.config.teacher
        if teacher.placement == "auto":
            return 1
        if teacher.placement == "zero3":
            return ranks_per_node(self.config)
        return num_gpus() or teacher.tasks if self.arguments.srun else teacher.tasks

    def wait_for_others(self, signals: Signals) -> str | None:
        """What is left of the stage, in words, once no task of another command makes it; None if nothing is."""
        from distill.teacher.claims import Claims
        from distill.teacher.precompute import PrecomputeStage

        stage, claims = self.config.stage_of("precompute"), Claims()
        assert isinstance(stage, PrecomputeStage)
        is_waiting = False
        while (reason := stage.reason_to_run()) is not None:
            missing = stage.missing_shards()
            if not missing or not all(claims.state(claim) in ("live", "unknown") for claim in missing):
                return f"{reason}, {len(missing)} shards"
            if not is_waiting:
                print(f"precompute: waiting for {len(missing)} shards that tasks of another command make", flush=True)
            is_waiting = True
            if signals.stop.wait(WAIT_FOR_TASKS):
                break
        return reason

    def run_all(
        self,
        commands: list[list[str]],
        signals: Signals,
        *,
        threads: int,
        environments: list[dict[str, str]] | None = None,
        stops_by_file: bool = False,
    ) -> int:
        """Runs commands side by side, each with its own environment on top of this one; when one fails, the others are ended.

        A stop is passed on: by the file STOP to ranks, which stop together, by a signal to others. Returns the exit code of the
        first that failed, 0 if none did, and STOPPED for processes that were ended because of a stop.
        """
        shared = {"OMP_NUM_THREADS": str(threads)} | dict(os.environ) | {command.IN_PIPELINE: "1"}
        if not self.arguments.srun:  # the tasks of srun have another parent, on other nodes
            shared[command.PARENT] = str(os.getpid())
        own = environments or [{}] * len(commands)
        processes = [subprocess.Popen(each, env=shared | more) for each, more in zip(commands, own, strict=True)]
        at_once = signal.SIGTERM if self.arguments.srun else signal.SIGKILL  # srun's death would leave its tasks
        passed_on, deadline, code, running = False, math.inf, 0, processes
        while running:
            time.sleep(0.05)
            codes = [process.poll() for process in processes]
            code = code or next((each for each in codes if each), 0)
            running = [process for process, each in zip(processes, codes, strict=True) if each is None]
            if signals.stop.is_requested and not passed_on:
                passed_on = True
                if stops_by_file:
                    signals.stop.pass_on()
                else:
                    send(processes, ASK_TO_STOP)
            if deadline == math.inf and code:
                deadline = time.monotonic() + GRACE
                send(processes, signal.SIGTERM)
            if signals.num_interrupts > 1 or time.monotonic() > deadline:
                send(processes, at_once)
        code = code if code >= 0 else 128 - code
        return command.STOPPED if passed_on and code in STOPPED_CODES else code


def stopped(signals: Signals) -> int:
    """The exit code, once nothing runs any more."""
    signals.stop.clear()
    print(f"stopped on request; {command.CONTINUES}", file=sys.stderr)
    return command.INTERRUPTED if signals.num_interrupts else command.STOPPED


def send(processes: list[subprocess.Popen[bytes]], signum: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signum)


def summary(directory: Path) -> str:
    """The key results of a stage's DONE.json, in a few words."""
    from distill.run.files import read_json

    results: dict[str, Any] = (read_json(directory / "DONE.json") or {}).get("results", {})
    parts = [f"{results[key]:,} {key}" for key in ("texts", "held_out", "steps") if isinstance(results.get(key), int)]
    if isinstance(results.get("best_score"), float):
        parts.append(f"best dev score {results['best_score']:.3f}")
    return f" ({', '.join(parts)})" if parts else ""


if __name__ == "__main__":
    command.start(main)
