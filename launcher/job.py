"""The Slurm job that a pipeline runs in: where its ranks meet, and whether the job is to come back once it has ended.

A job that was stopped, by the warning before a time limit or a preemption, asks Slurm for itself again: the same job, the same
log, the same run directory, from where it stopped. So does one that failed in a way that another start may mend, a rank lost or
a cable cut, but only until it has failed `MAX_FAILURES` times without getting further. What the user has to mend (exit code 2)
ends it at once.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from typing import Any

import command

from distill.config import TRAINING_STAGES, RunConfig
from distill.files import write_json
from distill.stages import checkpoint_steps, read_json

MAX_FAILURES = 3
FINAL = (0, 2, command.INTERRUPTED)  # exit codes after which another start is of no use, or not wanted


def srun_python(ranks_a_node: int) -> tuple[list[str], int]:
    """The start of a command that runs a script of Python once a rank, on all the nodes that this job has now; a rank's cores.

    The job itself has one task a node: a job of several, once it has run on two nodes, never comes back on one.
    """
    nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    cores = max(1, int(os.environ["SLURM_CPUS_ON_NODE"]) // ranks_a_node)
    srun = ["srun", "--kill-on-bad-exit=1", f"--nodes={nodes}", f"--ntasks={nodes * ranks_a_node}"]
    srun += [f"--ntasks-per-node={ranks_a_node}", f"--cpus-per-task={cores}"]
    return [*srun, *(shlex.split(os.environ.get("DISTILL_PYTHON", "")) or [sys.executable])], cores


def meeting_place() -> dict[str, str]:
    """Where ranks meet: the first node, on a port that no other job of this cluster has, nor this one before it came back."""
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], check=True, capture_output=True, text=True
    ).stdout.split()
    number = int(os.environ["SLURM_JOB_ID"]) + 1009 * int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return {"MASTER_ADDR": hosts[0], "MASTER_PORT": str(20000 + number % 20000)}


def come_back(config: RunConfig, code: int) -> int:
    """Has Slurm start this job again where that is of use, and says so; returns the exit code of this time."""
    record = config.run_dir / ".failures.json"
    if code in FINAL:
        record.unlink(missing_ok=True)
        return code
    if code != command.STOPPED:
        before, reached = read_json(record) or {}, progress(config)
        failures = before.get("failures", 0) + 1 if before.get("reached") == reached else 1
        write_json(record, {"failures": failures, "reached": reached})
        if failures >= MAX_FAILURES:
            record.unlink()
            say(f"failed {failures} times without getting further; not started again: mend it, then submit it again")
            return code
        say(f"failed (exit code {code}), {failures} times without getting further; {MAX_FAILURES} would end the job")
    requeue()
    return code


def requeue() -> None:
    """Asks Slurm to start this job again, once it has ended."""
    asked = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], capture_output=True, text=True)
    if asked.returncode == 0 or "pending" in asked.stderr:  # it is, already, after the loss of a node
        say("Slurm will start it again")
    else:
        say(f"Slurm refuses to start it again ({asked.stderr.strip()}): submit it again")


def progress(config: RunConfig) -> dict[str, Any]:
    """What a run has got to, JSON-able: equal at two moments if nothing was finished between them."""
    done = sorted(path.parent.name for path in config.run_dir.glob("*/DONE.json"))
    steps = {stage: checkpoint_steps(config.run_dir / stage) for stage in TRAINING_STAGES}
    shards = len(list(config.shards_dir.glob("**/*.tar")))
    return {"done": done, "steps": {stage: found[-1] for stage, found in steps.items() if found}, "shards": shards}


def say(line: str) -> None:
    print(f"job {os.environ['SLURM_JOB_ID']}: {line}", file=sys.stderr, flush=True)
