"""Calibration: the real stage and teacher run for a moment, and the plan then says of a step what was measured."""

from __future__ import annotations

import pytest
from conftest import write_config
from plan.counted import CPU, start_deepspeed
from ranks import on_ranks

from distill.config import RunConfig, load_config
from distill.plan import calibrate
from distill.plan.corpus import look_at_corpus
from distill.plan.devices import load_devices
from distill.plan.plan import make_plan, models_of
from distill.plan.time import Cluster


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
