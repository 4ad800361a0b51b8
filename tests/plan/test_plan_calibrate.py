"""Calibration: the real stage and teacher run for a moment, and the plan then says of a step what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from commands import LAUNCHER, ROOT
from conftest import write_config
from distributed_ranks import on_ranks
from plan.counted import CPU, start_deepspeed
from reference_times import hang_limit

from distill.config import RunConfig, load_config
from distill.plan import calibrate
from distill.plan.corpus import look_at_corpus
from distill.plan.devices import load_devices
from distill.plan.plan import make_plan, models_of
from distill.plan.time import Cluster

RUNS = """
import json, os, sys
from pathlib import Path
import plan

said = {}
for name, (code, patience) in json.loads(sys.argv[2]).items():
    plan.BETWEEN_LOOKS = 2.0 if name == "together" else 0.02
    try:
        plan.run_ranks([sys.executable, "-c", code], dict(os.environ), 3, Path(sys.argv[1]), patience)
        said[name] = None
    except ValueError as error:
        said[name] = str(error)
print(json.dumps(said))
"""
RANK = "import os, sys, time; rank = int(os.environ['RANK'])\n"
WAITS = f"{RANK}time.sleep(60 * (rank < 2)); "
RANKS = {  # what each of three ranks does, and how long it may take
    "well": (RANK + "print('x' * 200_000)", 60),
    "knows": (WAITS + "print('step 1'); sys.exit('error: no room for that')", 60),
    "silent": (WAITS + "os._exit(7)", 60),
    "together": (RANK + "print(rank, flush=True); os._exit(1 + (rank == 1))", 60),
    "slow": (WAITS, 1.5),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What launcher/plan.py says of ranks that calibrate and fail."""
    arguments = [sys.executable, "-c", RUNS, str(tmp_path_factory.mktemp("ranks")), json.dumps(RANKS)]
    environment = os.environ | {"PYTHONPATH": f"{LAUNCHER}:{ROOT}"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=hang_limit())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_ranks_that_print_more_than_a_pipe_holds_end_well(said):
    assert said["well"] is None


def test_the_first_rank_that_fails_is_the_one_that_is_heard(said):
    assert said["knows"] == "calibration failed here, on rank 2: no room for that"
    assert said["silent"] == "calibration failed here, on rank 2: exit code 7, and nothing was printed"


def test_of_ranks_that_fail_together_the_one_that_knows_what_to_mend_is_heard(said):
    assert said["together"] == "calibration failed here, on rank 1: 1"


def test_a_rank_that_takes_too_long_is_one_line(said):
    assert "more than 1.5 s" in said["slow"] and "rank 0 printed last: nothing" in said["slow"]


def test_only_the_device_that_is_here_is_measured_and_no_more_ranks_than_fit():
    table = load_devices()
    of = {name: Cluster(4, 8, name, table.devices[name], table.assumed, is_bf16=True) for name in ("cpu", "H100")}
    calibrate.check_device(of["H100"], "H100", 8)
    with pytest.raises(ValueError, match="which has cpu, not H100"):
        calibrate.check_device(of["H100"], "cpu", 64)
    with pytest.raises(ValueError, match="8 ranks here, on 2 cores"):
        calibrate.check_device(of["cpu"], "cpu", 2)


def test_a_head_on_a_frozen_encoder_says_nothing_of_a_devices_rate(tiny_encoder, tmp_path):
    frozen = ["stages=[precompute,hpd]", "hpd.init=student", "hpd.freeze_encoder=true"]
    config, table = load_config(write_config(tmp_path, tiny_encoder), frozen), load_devices()
    cluster = Cluster(1, 2, "cpu", table.devices["cpu"], table.assumed, is_bf16=False)
    plan = make_plan(config, cluster, look_at_corpus(config, table.assumed, tokens=9), models_of(config))
    with pytest.raises(ValueError, match="nothing to calibrate"):
        calibrate.calibrated(plan, print, lambda made, ranks: [])


def rank(config: RunConfig):
    start_deepspeed()
    return calibrate.run_rank(config, CPU)


@pytest.mark.slow
def test_the_planned_step_becomes_the_measured_one(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "SECONDS", 1.0)
    config, table = load_config(write_config(tmp_path, tiny_encoder)), load_devices()
    cluster = Cluster(1, 2, "cpu", table.devices["cpu"], table.assumed, is_bf16=False)
    plan = make_plan(config, cluster, look_at_corpus(config, table.assumed, tokens=9), models_of(config))
    said: list[str] = []
    found = calibrate.calibrated(plan, said.append, lambda made, ranks: on_ranks(ranks, rank, made))
    assert found.stages[0].step.total == pytest.approx(found.measured["seconds_a_step"])
    assert found.measured["teacher"] > 0 and found.teacher_seconds != plan.teacher_seconds
    assert len(said) == 1
    assert not (tmp_path / "runs").exists()  # nothing is left in the run's own directory
