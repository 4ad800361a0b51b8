"""The Slurm job that a pipeline runs in: where its ranks meet, and whether the job is to come back once it has ended.

A job that was stopped, by the warning before a time limit or a preemption, asks Slurm for itself again: the same job, the same
log, the same run directory, from where it stopped. So does one that failed in a way that another start may mend, a rank lost or
a cable cut. But `MAX_FRUITLESS` starts that get no further are enough, also of stops, where a start takes longer than the time
limit leaves it. Preemptions are not counted, nor what Slurm starts again by itself, having seen a node die. What the user has
to mend (exit code 2) ends the job at once, and so does scancel.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from contextlib import suppress
from typing import Any

import command

from distill.config import TRAINING_STAGES, RunConfig
from distill.files import write_json
from distill.stages import checkpoint_steps, read_json

MAX_FRUITLESS = 3
PATIENCE = 10.0  # seconds for an answer of Slurm
FINAL = (0, 2, command.INTERRUPTED)  # exit codes after which another start is of no use, or not wanted


def srun_python(ranks_a_node: int, *, wait: int = 0) -> tuple[list[str], int]:
    """The start of a command that runs a script of Python once a rank, on all the nodes that this job has now; a rank's cores.

    The job itself has one task a node: one of several, once it has run on two nodes, never comes back on one.

    After a bad exit the others are not killed: ranks end by themselves once they know which one was lost, tasks of precompute
    go on. And Slurm's controller repeats a kill that was not answered within 10 s after a minute, when it hits the step of the
    same number of a job that has come back. `wait`: seconds from the first end, after which srun kills what hangs; 0: never.
    """
    nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    cores = max(1, int(os.environ["SLURM_CPUS_ON_NODE"]) // ranks_a_node)
    srun = ["srun", "--kill-on-bad-exit=0", f"--wait={wait}", f"--nodes={nodes}", f"--ntasks={nodes * ranks_a_node}"]
    srun += [f"--ntasks-per-node={ranks_a_node}", f"--cpus-per-task={cores}"]
    return [*srun, *(shlex.split(os.environ.get("DISTILL_PYTHON", "")) or [sys.executable])], cores


def hostnames(nodes: str) -> list[str]:
    """n1, n2 ... of Slurm's n[1-2]. Raises OSError or SubprocessError where scontrol does not say."""
    asked = ["scontrol", "show", "hostnames", nodes]
    return subprocess.run(asked, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout.split()


def meeting_place() -> dict[str, str]:
    """Where ranks meet: the first node, on a port that no other job of this cluster has, nor this one before it came back."""
    try:
        first = hostnames(os.environ["SLURM_JOB_NODELIST"])[0]
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"Slurm does not say where ranks meet ({error}): export MASTER_ADDR and MASTER_PORT") from None
    number = int(os.environ["SLURM_JOB_ID"]) + 1009 * restarts()
    return {"MASTER_ADDR": first, "MASTER_PORT": str(20000 + number % 20000)}


def come_back(config: RunConfig, code: int, begun: dict[str, Any] | None) -> int:
    """Has Slurm start this job again where that is of use, and says so; returns the exit code of this time.

    `begun`: the run's progress when this start began; None if it was stopped before that was known.
    """
    record = config.run_dir / f".job-{os.environ['SLURM_JOB_ID']}.json"
    if code in FINAL:
        record.unlink(missing_ok=True)
        return code
    shown = state()
    if int(shown.get("Restarts", 0)) > restarts():
        say("Slurm starts it again")
        return code
    if shown.get("PreemptTime", "None") != "None":
        requeue()
        return code
    if shown.get("JobState", "RUNNING") != "RUNNING" and shown.get("Reason") != "TimeLimit":
        record.unlink(missing_ok=True)
        say("cancelled; not started again")
        return code
    fruitless = (read_json(record) or {}).get("fruitless", 0) + 1 if progress(config) == begun else int(code != command.STOPPED)
    if fruitless >= MAX_FRUITLESS:
        record.unlink(missing_ok=True)
        say(f"{_how(code)}; {fruitless} starts got no further: not started again; {_remedy(code)}, then submit it again")
        return code
    config.run_dir.mkdir(parents=True, exist_ok=True)  # a stop may come before anything is there
    write_json(record, {"fruitless": fruitless})
    if fruitless:
        say(f"{_how(code)}; starts without getting further: {fruitless}, of {MAX_FRUITLESS} that would end the job")
    requeue()
    return code


def _how(code: int) -> str:
    return "stopped" if code == command.STOPPED else f"failed (exit code {code})"


def _remedy(code: int) -> str:
    if code == command.STOPPED:
        return "a start takes longer than its time limit leaves it: give it more --time"
    return "mend what is said above"


def requeue() -> None:
    """Asks Slurm to start this job again, once it has ended."""
    asked = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], capture_output=True, text=True)
    if asked.returncode == 0 or "pending" in asked.stderr:  # it is, already, after the loss of a node
        say("Slurm will start it again")
    else:
        say(f"Slurm refuses to start it again ({asked.stderr.strip()}): submit it again")


def restarts() -> int:
    """How often this job has come back before this start."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def state() -> dict[str, str]:
    """What `scontrol show job` says of this job: JobState, Reason, Restarts, PreemptTime ...; {} where it says nothing.

    JobState is RUNNING after a warning. It is COMPLETING where Slurm is ending the job, for good unless Restarts has grown; the
    Reason is TimeLimit where it has not stopped in time. PreemptTime is this start's, or None.
    """
    asked = ["scontrol", "--oneliner", "show", "job", os.environ["SLURM_JOB_ID"]]
    try:
        shown = subprocess.run(asked, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)


def progress(config: RunConfig) -> dict[str, Any]:
    """What a run has got to: equal at two moments if nothing was finished between them."""
    done = sorted(path.parent.name for path in config.run_dir.glob("*/DONE.json"))
    steps = {stage: checkpoint_steps(config.run_dir / stage) for stage in TRAINING_STAGES}
    text = 0
    with suppress(FileNotFoundError):  # another task is at the text, and renames it
        for path in config.precompute_dir.glob("text*/*"):
            text += path.stat().st_size
    shards = len(list(config.shards_dir.glob("**/*.tar")))
    newest = {stage: found[-1] for stage, found in steps.items() if found}
    return {"done": done, "steps": newest, "text": text, "shards": shards}


def say(line: str) -> None:
    print(f"job {os.environ['SLURM_JOB_ID']}: {line}", file=sys.stderr, flush=True)
