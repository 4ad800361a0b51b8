"""The Slurm job that a pipeline runs in: the rendezvous of its ranks, and whether the job is requeued once it has ended.

A job that was stopped, by the warning before a time limit or a preemption, is requeued: the same job, log and run directory,
from where it stopped. So is a job that failed in a way that another start may fix, such as a lost rank or a network failure.
After `MAX_WITHOUT_PROGRESS` starts in a row without progress the job is no longer requeued; starts that were stopped count too,
because the time limit may be too short to get anywhere. Preemptions, and requeues by Slurm itself after a node failure, do not
count. An error that the user has to fix (exit code 2) ends the job at once, and so does scancel.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from distill.run.files import read_json, write_json
from launcher import command

if TYPE_CHECKING:
    from distill.config import RunConfig

MAX_WITHOUT_PROGRESS = 3
SLURM_TIMEOUT = 10.0  # seconds for an answer of a Slurm client
OF_A_JOB = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_CPUS_ON_NODE")
KEPT = ("*/cache/**/*.npy", "*/triplets.npy", "measured/*.json")  # what a stage keeps before it is finished
FINAL = (0, 2, command.INTERRUPTED)  # exit codes after which another start is of no use, or not wanted


def check_environment(option: str) -> None:
    """Raises ValueError where this process is not in a Slurm job, or its variables are not what Slurm sets."""
    if absent := [name for name in OF_A_JOB if not os.environ.get(name)]:
        missing = " and ".join(absent)
        raise ValueError(f"{option} is for a Slurm job, and {missing} not set here: submit it with sbatch, or leave it out")
    for name in ("SLURM_JOB_NUM_NODES", "SLURM_CPUS_ON_NODE", "SLURM_RESTART_COUNT", "SLURM_JOB_ID"):
        if not os.environ.get(name, "0").isdecimal():
            raise ValueError(f"{name} is {os.environ[name]!r}: it must be a whole number, as Slurm sets it")


def job_id() -> str:
    """The id by which Slurm knows this job alone. One task of an array has the array's id, which means all of its tasks."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def srun_python(ranks_per_node: int, *, wait: int = 0) -> tuple[list[str], int]:
    """The srun command that runs a Python script once per rank on all nodes of this job, and the cores of a rank.

    The job itself has one task a node: a job of several tasks, once it has run on two nodes, is never requeued on one.

    If one rank exits with an error, srun does not kill the other ranks: they exit by themselves once they know which one was
    lost, and precompute tasks continue. A kill would also be unsafe: if it is not acknowledged within 10 s, Slurm's controller
    repeats it a minute later, and it then kills the step with the same number in the requeued job.
    wait: srun kills the ranks that still run this many seconds after the first one exited; 0: never.
    """
    nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    cores = max(1, int(os.environ["SLURM_CPUS_ON_NODE"]) // ranks_per_node)
    srun = ["srun", "--kill-on-bad-exit=0", f"--wait={wait}", f"--nodes={nodes}", f"--ntasks={nodes * ranks_per_node}"]
    srun += [f"--ntasks-per-node={ranks_per_node}", f"--cpus-per-task={cores}"]
    return [*srun, *(shlex.split(os.environ.get("DISTILL_PYTHON", "")) or [sys.executable])], cores


def hostnames(nodes: str) -> list[str]:
    """The host names in a Slurm node list: n1 and n2 for n[1-2]. Raises OSError or SubprocessError if scontrol fails."""
    asked = ["scontrol", "show", "hostnames", nodes]
    return subprocess.run(asked, check=True, capture_output=True, text=True, timeout=SLURM_TIMEOUT).stdout.split()


def rendezvous() -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT: the first node, and a port of no other job, nor of an earlier start of this one.

    What the user has exported stays. The ports are below those that Linux gives to clients.
    """
    exported = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if os.environ.get(name)}
    if len(exported) == 2:
        return exported
    try:
        first = hostnames(os.environ["SLURM_JOB_NODELIST"])[0]
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"Slurm does not give the nodes of this job ({error}): export MASTER_ADDR and MASTER_PORT") from None
    number = int(os.environ["SLURM_JOB_ID"]) + 1009 * restarts()
    return {"MASTER_ADDR": first, "MASTER_PORT": str(10000 + number % 20000)} | exported


def maybe_requeue(config: RunConfig, code: int, begun: dict[str, Any] | None) -> int:
    """Requeues this job where that is of use, and reports it; returns the exit code of this start.

    `begun`: the run's progress when this start began; None if it was stopped before that was known.
    """
    record = config.run_dir / f".job-{job_id()}.json"
    if code in FINAL:
        record.unlink(missing_ok=True)
        return code
    shown = state()
    if int(shown.get("Restarts", 0)) > restarts():
        report("Slurm requeues it")
        return code
    if shown.get("PreemptTime", "None") != "None":
        requeue()
        return code
    if shown.get("JobState", "RUNNING") != "RUNNING" and shown.get("Reason") != "TimeLimit":
        record.unlink(missing_ok=True)
        report("cancelled; not requeued")
        return code
    without_progress = int(code != command.STOPPED)
    if progress(config) == begun:
        without_progress = (read_json(record) or {}).get("starts_without_progress", 0) + 1
    if without_progress >= MAX_WITHOUT_PROGRESS:
        record.unlink(missing_ok=True)
        report(f"{_how(code)}; {without_progress} starts without progress: not requeued; {_remedy(code)}, then submit it again")
        return code
    config.run_dir.mkdir(parents=True, exist_ok=True)  # a stop may come before anything is there
    write_json(record, {"starts_without_progress": without_progress})
    if without_progress:
        report(f"{_how(code)}; starts without progress: {without_progress}; {MAX_WITHOUT_PROGRESS} end the job")
    requeue()
    return code


def _how(code: int) -> str:
    return "stopped" if code == command.STOPPED else f"failed (exit code {code})"


def _remedy(code: int) -> str:
    if code == command.STOPPED:
        return "the time limit is too short for a start to make progress: give it more --time"
    return "fix what is reported above"


def requeue() -> None:
    """Asks Slurm to requeue this job, once it has ended."""
    scontrol = ["scontrol", "requeue", job_id()]
    try:
        asked = subprocess.run(scontrol, capture_output=True, text=True, timeout=SLURM_TIMEOUT)
    except (OSError, subprocess.SubprocessError) as error:
        report(f"Slurm was asked to requeue it and does not answer ({error}): see squeue, and submit it again if it is gone")
        return
    if asked.returncode == 0 or "pending" in asked.stderr:  # Slurm requeued it already, after a node failure
        report("requeued")
    else:
        report(f"Slurm refuses to requeue it ({asked.stderr.strip()}): submit it again")


def restarts() -> int:
    """How often this job was requeued before this start."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def state() -> dict[str, str]:
    """What `scontrol show job` says of this job: JobState, Reason, Restarts, PreemptTime ...; {} where it says nothing.

    JobState is still RUNNING after the warning signal. It is COMPLETING while Slurm ends the job, which is final unless
    Restarts has increased; Reason is TimeLimit if the job ran past its limit. PreemptTime is of this start, None if not
    preempted.
    """
    asked = ["scontrol", "--oneliner", "show", "job", job_id()]
    try:
        shown = subprocess.run(asked, check=True, capture_output=True, text=True, timeout=SLURM_TIMEOUT).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)


def progress(config: RunConfig) -> dict[str, Any]:
    """The progress of a run: equal at two moments if nothing was finished between them."""
    from distill.config import TRAINING_STAGES
    from distill.run.stage import checkpoint_steps

    done = sorted(path.parent.name for path in config.run_dir.glob("[!.]*/DONE.json"))
    steps = {stage: checkpoint_steps(config.run_dir / stage) for stage in TRAINING_STAGES}
    text = 0
    with suppress(FileNotFoundError):  # another task renames it
        for path in config.precompute_dir.glob("text*/**/*"):
            text += path.stat().st_size if path.is_file() else 0
    shards = len(list(config.shards_dir.glob("**/*.tar")))
    kept = sum(1 for pattern in KEPT for _ in config.run_dir.glob(pattern))
    newest = {stage: found[-1] for stage, found in steps.items() if found}
    return {"done": done, "steps": newest, "text": text, "shards": shards, "kept": kept}


def report(line: str) -> None:
    print(f"job {job_id()}: {line}", file=sys.stderr, flush=True)
