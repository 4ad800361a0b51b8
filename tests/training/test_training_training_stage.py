"""How a stage begins: its modules' mode, and dropout that a stop does not change."""

from __future__ import annotations

import hashlib

import pytest
import torch
from distributed_ranks import on_ranks
from engines import train_stage

from distill.config import load_config, stage_of

SIMCSE = ("simcse.global_batch=16", "simcse.micro_batch=16", "simcse.max_steps=4", "simcse.dropout=0.3",
          "simcse.lr=1e-3", "simcse.dev_every=100", "engine.precision=fp32")  # fmt: skip


@pytest.mark.parametrize("name", ["ckd", "simcse"])
def test_every_module_is_in_training_mode_from_the_first_step(embedded_copy, name):
    stage = stage_of(load_config(embedded_copy[0]), name)
    task = stage.build(stage.setup(torch.device("cpu"), None))
    assert all(module.training for module in task.module.modules())


@pytest.mark.slow
def test_a_stage_with_dropout_that_was_stopped_gives_the_same_student(embedded_copy):
    config, run = embedded_copy
    students = []
    for name in ("straight", "stopped"):
        overrides = [f"name={name}", f"shards_from={run.name}", *SIMCSE]
        if name == "stopped":
            stopped = on_ranks(1, train_stage, config, "simcse", overrides, lambda step: step == 1)
            assert stopped == ["simcse: stopped on request at step 1 of 4"]
            checkpoints = run.parent / name / "simcse/checkpoints"
            assert [path.name for path in checkpoints.iterdir()] == ["step-00000001"]
        on_ranks(1, train_stage, config, "simcse", overrides)
        weights = run.parent / name / "simcse/student/model.safetensors"
        students.append(hashlib.sha256(weights.read_bytes()).hexdigest())
    assert students[0] == students[1]
