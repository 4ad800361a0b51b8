"""The environment variables by which ranks find one another; what does not fit is one line."""

from __future__ import annotations

import os

import pytest
from commands import call
from conftest import write_config

from launcher.rendezvous import num_cores, rank_from_environment

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture
def environ(monkeypatch):
    """Sets the variables of this process, after all of those of a rank and of Slurm are removed."""
    for name in [name for name in os.environ if name in RANKS or name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name in RANKS:  # so that what the test sets is removed afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def set_variables(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


def found() -> tuple[str, ...]:
    rank_from_environment()
    return tuple(os.environ[name] for name in RANKS)


def test_a_process_alone_is_rank_0_also_in_a_batch_script_of_several_tasks(environ):
    environ(SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_LOCALID="0")
    assert found() == ("0", "1", "0")


def test_a_task_of_a_step_is_a_rank(environ):
    environ(SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="3", SLURM_LOCALID="1")
    assert found() == ("3", "4", "1")


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK is 'one': it must be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "", "LOCAL_RANK": "0"}, "WORLD_SIZE is '': it must be a whole number"),
        (
            {"WORLD_SIZE": "2"},
            "RANK and LOCAL_RANK not set, but WORLD_SIZE=2: set all of RANK, WORLD_SIZE, LOCAL_RANK",
        ),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2, WORLD_SIZE=2, LOCAL_RANK=0 do not fit"),
        ({"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "do not fit"),
        ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS is 'x': it must be a whole number"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "SLURM_LOCALID not set, but SLURM_PROCID=1"),
    ],
)
def test_variables_that_do_not_fit_are_named(environ, variables, message):
    environ(**variables)
    with pytest.raises(ValueError, match=message):
        rank_from_environment()


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "doctor.py"])
def test_commands_report_them_in_one_line(environ, monkeypatch, tmp_path, tiny_encoder, script):
    environ(RANK="a", WORLD_SIZE="2", LOCAL_RANK="0")
    monkeypatch.setattr("commands.environment", dict)
    done = call(script, "--config", write_config(tmp_path, tiny_encoder))
    assert done.returncode == 2 and "RANK is 'a': it must be a whole number" in done.stdout, done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize("script, option", [("pipeline.py", "--srun"), ("precompute.py", "--requeue")])
def test_what_needs_a_slurm_job_is_refused_outside_of_one(environ, tmp_path, tiny_encoder, script, option):
    done = call(script, "--config", write_config(tmp_path, tiny_encoder), option)
    assert done.returncode == 2 and f"error: {option} is for a Slurm job, and SLURM_JOB_ID" in done.stdout, done.stdout
    assert not (tmp_path / "runs").exists()


def test_the_cores_of_a_step_are_those_that_slurm_gives(environ):
    environ(SLURM_CPUS_ON_NODE="6")
    assert num_cores(2) == 6
    environ(SLURM_CPUS_ON_NODE="six")
    with pytest.raises(ValueError, match="SLURM_CPUS_ON_NODE is 'six'"):
        num_cores(2)
