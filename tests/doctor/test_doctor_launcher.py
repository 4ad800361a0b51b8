"""launcher/doctor.py: in this process, and under torchrun and the deepspeed launcher."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import LAUNCHER, ROOT, environment
from conftest import write_config
from distributed_ranks import free_port
from reference_times import hang_limit

from distill.config import load_config


@pytest.fixture
def config(tmp_path, tiny_encoder):
    return write_config(tmp_path, tiny_encoder)


@pytest.fixture
def doctor(monkeypatch):
    """The launcher as a module, in an environment of its own."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    from launcher import doctor

    return doctor


def test_alone_all_is_well_in_one_line(doctor, config, capsys):
    assert doctor.main(["--config", str(config)]) == 0
    assert capsys.readouterr().out == "doctor: 1 node, 1 process: all is well\n"
    assert list((config.parent / "runs/tiny").iterdir()) == []


def test_what_is_missing_is_named(doctor, config, capsys):
    missing = ["student.init=/none", "text.sources=[{type: file, path: none.txt}]"]
    assert doctor.main(["--config", str(config), *missing]) == 2
    printed = capsys.readouterr().out
    assert "student.init: no model at /none" in printed and "'none.txt' names no file" in printed


def test_a_config_that_cannot_be_read(doctor, config, capsys):
    assert doctor.main(["--config", str(config), "ckd.lrr=1"]) == 2
    assert "unknown key ckd.lrr" in capsys.readouterr().err


@pytest.mark.parametrize(
    "variables, processes",
    [
        ({}, 1),
        ({"LOCAL_SIZE": "3"}, 3),
        ({"LOCAL_WORLD_SIZE": "2"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),1", "SLURM_NODEID": "2"}, 1),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),1", "SLURM_NODEID": "1"}, 4),
    ],
)
def test_processes_on_this_node(doctor, variables, processes):
    os.environ.update(variables)
    assert doctor.processes_here() == processes


@pytest.mark.parametrize("gpus, wanted, ranks", [(0, None, 2), (0, 5, 5), (4, None, 4), (4, 2, 2), (4, 8, 4)])
def test_ranks_alone_are_those_of_the_pipeline_on_the_gpus_that_torch_sees(doctor, config, monkeypatch, gpus, wanted, ranks):
    from launcher import pipeline, rendezvous

    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    run = load_config(config, [f"engine.num_ranks={'null' if wanted is None else wanted}"])
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert doctor.context_of(run, 0.0, 10.0, None).ranks_per_node == ranks
    assert pipeline.ranks_per_node is rendezvous.ranks_per_node


@pytest.mark.parametrize(
    "variables, here, cores",
    [({}, 1, 3), ({}, 2, 3), ({"SLURM_CPUS_ON_NODE": "16"}, 1, 3), ({"SLURM_CPUS_ON_NODE": "16"}, 4, 16)],
)
def test_cores_are_those_that_this_process_may_use_or_that_a_step_shares_among_its_ranks(
    doctor, monkeypatch, variables, here, cores
):
    monkeypatch.setattr("distill.run.cores.num_cores", lambda: 3)
    os.environ.pop("SLURM_CPUS_ON_NODE", None)
    os.environ.update(variables)
    assert doctor.num_cores(here) == cores


def test_an_import_that_takes_too_long_ends_the_process_with_its_reason():
    slow = "import time; from launcher.doctor import ending_after\nwith ending_after(0.1): time.sleep(600)"
    done = subprocess.run([sys.executable, "-c", slow], cwd=ROOT, capture_output=True, text=True, timeout=hang_limit())
    assert done.returncode == 1 and done.stderr.startswith("error: `import torch` is not done after 0 s on "), done.stderr


def launchers() -> dict[str, list[str]]:
    script = str(LAUNCHER / "doctor.py")
    programs = Path(sys.executable).parent
    return {
        "torchrun": [str(programs / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port()), script],
        "deepspeed": [str(programs / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), "--quiet", script],
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.soak)])
def test_ranks_of_a_launcher_meet_and_rank_0_alone_prints(config, name):
    arguments = [*launchers()[name], "--config", str(config), "--timeout", "200"]
    done = subprocess.run(
        arguments,
        env=environment(),
        cwd=ROOT,
        text=True,
        timeout=hang_limit(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    printed = [line for line in done.stdout.splitlines() if line.startswith("doctor")]
    well = r"doctor: 1 node, 2 processes: all is well \(all-reduce [\d.]+ [GM]B/s\)"
    assert len(printed) == 1 and re.fullmatch(well, printed[0]), done.stdout
