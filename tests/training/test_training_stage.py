"""How a stage begins: its modules' mode, and dropout that a stop does not change."""

from __future__ import annotations

import hashlib

import pytest
import torch
from commands import launch

from distill.config import load_config
from distill.training.stage import build_recipe

SIMCSE = ("stage=simcse", "simcse.global_batch=16", "simcse.micro_batch=16", "simcse.max_steps=4", "simcse.dropout=0.3",
          "simcse.lr=1e-3", "simcse.dev_every=100", "engine.precision=fp32")  # fmt: skip


@pytest.mark.parametrize("stage", ["ckd", "simcse"])
def test_every_module_is_in_training_mode_from_the_first_step(embedded_copy, tmp_path, stage):
    config, _ = embedded_copy
    recipe = build_recipe(load_config(config), stage, tmp_path, torch.device("cpu"), None)
    assert all(module.training for module in recipe.task.modules())


@pytest.mark.slow
def test_a_stage_with_dropout_that_was_stopped_gives_the_same_student(embedded_copy):
    config, run = embedded_copy
    students = []
    for name, stops in (("straight", False), ("stopped", True)):
        place = (f"name={name}", f"shards_from={run.name}")
        if stops:
            (run.parent / name).mkdir()
            (run.parent / name / "STOP").touch()
            assert launch("train.py", "--config", config, *place, *SIMCSE).returncode == 75
        done = launch("train.py", "--config", config, *place, *SIMCSE)
        assert done.returncode == 0, done.stdout
        assert ("continuing after step 1 of 4" in done.stdout) == stops
        weights = run.parent / name / "simcse/student/model.safetensors"
        students.append(hashlib.sha256(weights.read_bytes()).hexdigest())
    assert students[0] == students[1]
