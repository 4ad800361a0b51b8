"""How a job ends that cannot go on: cancelled, with a config that is wrong, failing or out of time at every start."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from commands import launch
from conftest import write_config
from jobs import LONG, Job, changed_code, make_folder
from reference_times import starts

pytestmark = [pytest.mark.slow, pytest.mark.serial]
ASLEEP = """
import os, sys, time
def fall_asleep(*_):
    open(os.path.join(os.environ["ASLEEP"], os.environ.get("SLURM_RESTART_COUNT", "0")), "w").close()
    time.sleep(600)
"""
KILLED_BY_THE_FIRST_STOP = """
if sys.argv[0].endswith("precompute.py") and "--text-only" not in sys.argv and "SLURM_RESTART_COUNT" not in os.environ:
    fall_asleep()
"""
SLOW = "PrecomputeStage.run = fall_asleep"
RANK_3_FAILS = """
import os
_step = Trainer._step
def _fails(self, step, *arguments):
    if rank() == 3 and step == 30 and os.environ.get("SLURM_RESTART_COUNT") == "2":
        raise RuntimeError("planted")
    return _step(self, step, *arguments)
Trainer._step = _fails
"""


def test_an_invalid_config_is_reported_once_and_ends_the_job(cluster, embedded_copy):
    config, _ = embedded_copy
    job = Job(cluster, config, "ckd.learning_rate=1")
    ended = cluster.wait(job.number, starts(3))
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), ended
    assert job.printed.count("error:") == 1 and "ckd.learning_rate" in job.printed, job.printed


def test_a_cancelled_job_is_not_requeued(cluster, embedded_copy):
    job = Job(cluster, embedded_copy[0], *LONG)
    job.until_step(20)
    cluster("scancel", job.number)
    job.until_printed(f"job {job.number}: cancelled; not requeued")
    ended = cluster.wait(job.number)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), ended


@pytest.mark.soak
def test_starts_that_outlast_their_time_limit_end_the_job_and_preemptions_do_not_count(cluster, tmp_path, tiny_encoder):
    """The tasks of the precompute stage make no progress. They stop on request; in the first start the signal kills them."""
    code = changed_code(tmp_path, {"__init__.py": ASLEEP + KILLED_BY_THE_FIRST_STOP, "teacher/precompute.py": ASLEEP + SLOW})
    config, asleep = write_config(tmp_path, tiny_encoder), make_folder(tmp_path / "asleep")
    assert launch("precompute.py", "--config", config, "--text-only").returncode == 0  # or the first start would get further
    options = ("--time=60", "--signal=B:USR1@595")
    job = Job(cluster, config, "stages=[precompute]", options=options, **code, ASLEEP=str(asleep))
    for number, how in enumerate(("out of time", "preempted", "warned", "warned")):
        job.until((asleep / str(number)).exists)
        if how == "preempted":
            job.preempt()
        elif how == "warned":
            job.warn()
        else:  # Slurm itself sends the signal, at its next look at the time limits
            cluster("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
            job.until_requeued(number + 1)
            cluster("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    ended = cluster.wait(job.number)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "3"), f"{ended}\n{job.printed}"
    assert "3 starts without progress" in job.printed and "more --time" in job.printed, job.printed
    assert "failed" not in job.printed and "exit code" not in job.printed.replace("exit code 75", ""), job.printed


@pytest.mark.soak
def test_repeated_failures_end_the_job_and_each_is_reported(cluster, embedded_copy, tmp_path):
    """Rank 3 is killed before the first checkpoint, then again, and then raises what nobody expects."""
    config, run = embedded_copy
    code = changed_code(tmp_path, {"training/loop.py": RANK_3_FAILS})
    job = Job(cluster, config, *LONG, "ckd.save_every=100000", "ckd.max_steps=100000", **code)
    killed = {-1}
    for _ in range(2):
        job.until(lambda: record_of_rank_3(run)["step"] > 0 and record_of_rank_3(run)["pid"] not in killed)
        pid = record_of_rank_3(run)["pid"]
        killed.add(pid)
        os.kill(pid, signal.SIGKILL)
        job.until_printed(f"lost rank 3 (pid {pid} on n2)")
    ended = cluster.wait(job.number)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "2"), f"{ended}\n{job.printed}"
    assert "3 starts without progress" in job.printed, job.printed
    last = job.printed[job.printed.rindex("doctor:") :]
    assert last.count("Traceback") == 1, job.printed
    after = last[last.rindex("\nrank 3: error: RuntimeError: planted\n") :].splitlines()[2:]
    assert all(re.match(r"srun: |slurmstepd-n\d: |ckd ended with exit code 1;|job \d+: ", line) for line in after), job.printed


def record_of_rank_3(run: Path) -> dict[str, int]:
    """The state that it last wrote in this start, or in the one before."""
    try:
        newest = max(run.glob(".ckd.ranks/*/3.json"), key=lambda path: path.stat().st_mtime)
        return json.loads(newest.read_text())
    except (OSError, ValueError):
        return {"pid": -1, "step": 0}
