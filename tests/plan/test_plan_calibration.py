"""Calibration: the real stage and teacher run for a moment, and the planned time of a step is then the measured one."""

from __future__ import annotations

import os
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import write_config
from plan.counted import CPU, start_deepspeed
from plan.plans import cluster_of, inputs_of
from torch.multiprocessing import start_processes

from distill.config import RunConfig, load_config
from distill.plan import calibration
from distill.plan.devices import load_devices
from distill.plan.planner import make_plan
from launcher.rendezvous import local_environments


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Ranks without the time that a new interpreter takes to import torch."""
    monkeypatch.setattr(calibration, "start_processes", partial(start_processes, start_method="fork"))


@pytest.fixture
def config(tmp_path, tiny_encoder) -> RunConfig:
    return load_config(write_config(tmp_path, tiny_encoder))


@pytest.fixture
def run(config):
    """Runs a function of this file on three ranks."""
    config.run_dir.mkdir(parents=True)
    return lambda measure: calibration.run_ranks(config, local_environments(3), lambda timeout: CPU, measure)


def rank() -> int:
    return int(os.environ["RANK"])


def prints_a_lot(config, device):
    os.write(1, b"x" * 200_000)  # pytest holds sys.stdout
    return {"rank": rank(), "world_size": int(os.environ["WORLD_SIZE"])}


def raises_on_the_last_rank(config, device):
    if rank() == 2:
        raise ValueError("no room for that")
    time.sleep(60)


def exits_on_the_last_rank(config, device):
    if rank() == 2:
        os._exit(7)
    time.sleep(60)


def raises_everywhere(config, device):
    if rank() == 1:
        raise ValueError("no room for that")
    while not (config.run_dir / "1.error").exists():
        time.sleep(0.01)
    raise RuntimeError("Connection closed by peer")


def never_ends(config, device):
    os.write(1, f"rank {rank()} waits".encode())
    time.sleep(60)


def test_results_come_in_the_order_of_ranks_which_may_print_more_than_a_pipe_holds(run):
    assert run(prints_a_lot) == [{"rank": rank, "world_size": 3} for rank in range(3)]


def test_the_reason_of_the_first_rank_that_fails_is_reported(run):
    with pytest.raises(ValueError, match="failed on rank 2: no room for that"):
        run(raises_on_the_last_rank)


def test_a_rank_that_dies_is_reported_with_its_exit_code(run):
    with pytest.raises(ValueError, match=r"failed on rank 2: .*exit code 7"):
        run(exits_on_the_last_rank)


def test_of_ranks_that_fail_together_the_one_with_an_error_of_the_user_is_reported(run):
    with pytest.raises(ValueError, match="failed on rank 1: no room for that"):
        run(raises_everywhere)


def test_ranks_that_take_too_long_are_ended_and_reported(run, monkeypatch):
    monkeypatch.setattr(calibration, "TIME_LIMIT", 3.0)
    with pytest.raises(ValueError, match=r"more than 3 s .* printed last: rank 0 waits"):
        run(never_ends)


def test_only_this_machines_device_is_measured_on_at_most_as_many_ranks_as_it_has(config, monkeypatch):
    table, inputs = load_devices(), inputs_of(config)

    def check(device: str, *local: object) -> None:
        monkeypatch.setattr(calibration, "local_devices", lambda: local)
        calibration.check_local(calibration.replace(inputs, cluster=cluster_of(device, 4, 8)), table)

    check("H100", "NVIDIA H100 80GB HBM3", 8)
    with pytest.raises(ValueError, match="which has cpu, not H100"):
        check("H100", "cpu", 64)
    with pytest.raises(ValueError, match="8 ranks here, on 2 cores"):
        check("cpu", "cpu", 2)


def test_a_head_on_a_frozen_encoder_measures_no_rate(tmp_path, tiny_encoder):
    frozen = ["stages=[precompute,hpd]", "hpd.init=student", "hpd.freeze_encoder=true"]
    inputs = inputs_of(load_config(write_config(tmp_path, tiny_encoder), frozen))
    with pytest.raises(ValueError, match="nothing to calibrate"):
        calibration.calibrate(inputs, lambda made: [])


def join(timeout: float) -> torch.device:
    torch.set_num_threads(1)  # a forked process does not have the other threads of its parent
    dist.init_process_group("gloo")
    start_deepspeed()
    return CPU


@pytest.mark.slow
def test_the_planned_time_of_a_step_becomes_the_measured_one(config, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "SECONDS", 1.0)
    inputs = inputs_of(config, tokens_per_text=9)
    plan = make_plan(inputs)
    calibrated, measured = calibration.calibrate(
        inputs, partial(calibration.run_ranks, environments=local_environments(2), join=join)
    )
    found = make_plan(calibrated, measured)
    assert plan.teacher is not None and found.teacher is not None
    assert found.stages["ckd"].chosen.seconds_per_step["total"] == pytest.approx(measured["seconds_per_step"])
    assert found.stages["ckd"].chosen.seconds_per_step["total"] != plan.stages["ckd"].chosen.seconds_per_step["total"]
    assert measured["teacher"] > 0 and found.teacher.seconds != plan.teacher.seconds
    assert not (tmp_path / "runs").exists()  # nothing is left in the run's own directory
