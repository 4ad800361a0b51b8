"""launcher/doctor.py on this machine: alone, under torchrun and the deepspeed launcher, with a rank that never starts."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import LAUNCHER, ROOT, command, environment, launch
from conftest import write_config
from distributed_ranks import free_port
from reference_times import hang_limit, starts

pytestmark = [pytest.mark.slow, pytest.mark.serial]
SLOW = "is not back after 13 s"  # an import, where this machine is busy
PROMISED = 20  # seconds that doctor.py may take once it has started, whatever hangs


@pytest.fixture
def config(tmp_path, tiny_encoder):
    return write_config(tmp_path, tiny_encoder)


def test_alone_all_is_well_in_one_line(config):
    started = time.monotonic()
    done = launch("doctor.py", "--config", config)
    assert done.returncode == 0 and done.stdout == "doctor: 1 node, 1 process: all is well\n", done.stdout
    assert time.monotonic() - started < PROMISED + starts(2)
    assert not (config.parent / "runs/tiny/.doctor").exists()


def test_what_is_wrong_is_named_and_nothing_is_written(config):
    done = launch("doctor.py", "--config", config, "student.init=/none", "text.sources=[{type: file, path: none.txt}]")
    assert done.returncode == 2, done.stdout
    assert "student.init: no model at /none" in done.stdout and "'none.txt' names no file" in done.stdout
    assert list((config.parent / "runs/tiny").iterdir()) == []


def test_a_config_that_cannot_be_read(config):
    done = launch("doctor.py", "--config", config, "ckd.lrr=1")
    assert done.returncode == 2 and done.stdout.startswith("error: ") and done.stdout.count("\n") == 1, done.stdout


def launchers() -> dict[str, list[str]]:
    script = str(LAUNCHER / "doctor.py")
    programs = Path(sys.executable).parent
    return {
        "torchrun": [str(programs / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port()), script],
        "deepspeed": [str(programs / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), "--quiet", script],
    }


@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_ranks_of_a_launcher_meet_and_rank_0_alone_speaks(config, name):
    arguments = [*launchers()[name], "--config", str(config)]
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
    said = [line for line in done.stdout.splitlines() if line.startswith("doctor")]
    assert len(said) == 1, done.stdout
    well = re.fullmatch(r"doctor: 1 node, 2 processes: all is well \(all-reduce [\d.]+ [GM]B/s\)", said[0])
    assert well or SLOW in done.stdout, done.stdout


def ended(config: Path, rank: int, address: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """One rank of two, the other of which never starts; and the seconds that it took."""
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": address}
    started = time.monotonic()
    done = subprocess.run(
        command("doctor.py", "--config", config),
        env=environment() | variables,
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=hang_limit(),
    )
    assert list((config.parent / "runs/tiny").iterdir()) == []
    return done, time.monotonic() - started


def test_rank_0_names_who_is_missing_and_an_address_that_is_not_its_own(config):
    done, seconds = ended(config, 0, "192.0.2.1")  # an address that nobody has
    assert done.returncode == 1 and seconds < PROMISED + starts(2)
    assert "rank 0 cannot serve 192.0.2.1:" in done.stdout and "rank 1: has not reported within" in done.stdout, done.stdout


def test_a_rank_that_waits_for_rank_0_in_vain_says_so_itself(config):
    done, seconds = ended(config, 1, "127.0.0.1")
    assert done.returncode == 1 and seconds < PROMISED + starts(2)
    assert "nothing heard of rank 0" in done.stderr and done.stdout == "", done
