"""A job's rendezvous, its progress, and whether it is requeued; `scontrol` is a script that records what it is asked."""

from __future__ import annotations

import os
import re
from types import SimpleNamespace

import pytest
from conftest import write_config

from distill.config import load_config
from launcher import command, slurm_job

SCONTROL = """#!/bin/sh
echo "$@" >> "{calls}"
case "$*" in
  *hostnames*) printf 'n1\\nn2\\n' ;;
  *"show job"*) echo JobId=12 JobState=RUNNING Restarts=0 PreemptTime=None Reason=None ;;
esac
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Sets this process's Slurm variables; `job.calls()` are the arguments of each call of scontrol."""
    calls = tmp_path / "calls"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scontrol").write_text(SCONTROL.format(calls=calls))
    (tmp_path / "bin/scontrol").chmod(0o755)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "12", "JOB_NODELIST": "n[1-2]", "JOB_NUM_NODES": "2", "CPUS_ON_NODE": "4"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return SimpleNamespace(calls=lambda: calls.read_text().splitlines(), set=monkeypatch.setenv)


@pytest.fixture
def config(tmp_path, tiny_encoder):
    return load_config(write_config(tmp_path, tiny_encoder))


def test_the_ranks_meet_below_the_ports_of_clients_and_each_start_at_another_port(job):
    ports = []
    for number, restart in (("12", "0"), ("12", "1"), ("49151", "0"), ("2147483647", "7")):
        job.set("SLURM_JOB_ID", number)
        job.set("SLURM_RESTART_COUNT", restart)
        found = slurm_job.rendezvous()
        assert found["MASTER_ADDR"] == "n1"
        ports.append(int(found["MASTER_PORT"]))
    assert all(1024 < port < 32768 for port in ports) and len(set(ports)) == 4


def test_what_the_user_has_exported_stays(job):
    job.set("MASTER_PORT", "4711")
    assert slurm_job.rendezvous() == {"MASTER_ADDR": "n1", "MASTER_PORT": "4711"}
    job.set("MASTER_ADDR", "head")
    assert slurm_job.rendezvous() == {"MASTER_ADDR": "head", "MASTER_PORT": "4711"}


def test_a_task_of_an_array_requeues_itself_alone(job, config, capsys):
    job.set("SLURM_ARRAY_JOB_ID", "12")
    job.set("SLURM_ARRAY_TASK_ID", "5")
    assert slurm_job.maybe_requeue(config, command.STOPPED, slurm_job.progress(config)) == command.STOPPED
    assert job.calls() == ["--oneliner show job 12_5", "requeue 12_5"]
    assert [path.name for path in config.run_dir.glob(".job-*.json")] == [".job-12_5.json"]
    assert "job 12_5: requeued" in capsys.readouterr().err


@pytest.mark.parametrize(
    "made",
    ["precompute/text.part/spool/texts", "hpd/cache/0a1b/000000.npy", "finetune/triplets.npy", "measured/ab.json",
     "shards/held_out/000000.tar"],
)  # fmt: skip
def test_what_a_start_leaves_to_the_next_is_progress(config, made):
    before = slurm_job.progress(config)
    path = config.run_dir / made
    path.parent.mkdir(parents=True)
    path.write_bytes(b"text")
    after = slurm_job.progress(config)
    assert after != before and slurm_job.progress(config) == after


def test_starts_that_fail_are_counted_unless_they_made_progress(job, config, capsys):
    blocks = config.run_dir / "hpd/cache/0a1b"
    blocks.mkdir(parents=True)
    for start in range(5):
        begun = slurm_job.progress(config)
        (blocks / f"{start:06d}.npy").touch()
        slurm_job.maybe_requeue(config, 1, begun)
    assert job.calls().count("requeue 12") == 5
    for _ in range(2):
        slurm_job.maybe_requeue(config, 1, slurm_job.progress(config))
    assert job.calls().count("requeue 12") == 6 and "3 starts without progress" in capsys.readouterr().err


def test_srun_runs_the_words_of_a_container_whatever_is_in_them(job):
    job.set("DISTILL_PYTHON", "'apptainer' 'exec' '--bind' '/home/a b/clone' 'image.sif' 'python'")
    srun, cores = slurm_job.srun_python(2)
    assert srun[-6:] == ["apptainer", "exec", "--bind", "/home/a b/clone", "image.sif", "python"] and cores == 2


def test_slurms_variables_must_be_those_of_a_job(job, monkeypatch):
    slurm_job.check_environment("--srun")
    job.set("SLURM_JOB_NUM_NODES", "two")
    with pytest.raises(ValueError, match=re.escape("SLURM_JOB_NUM_NODES is 'two': it must be a whole number")):
        slurm_job.check_environment("--srun")
    monkeypatch.delenv("SLURM_JOB_NUM_NODES")
    with pytest.raises(ValueError, match="--srun is for a Slurm job, and SLURM_JOB_NUM_NODES not set here"):
        slurm_job.check_environment("--srun")
