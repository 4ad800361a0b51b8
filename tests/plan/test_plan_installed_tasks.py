"""A task of an installed package has no more fields than every stage has: no init, temperature, weights or dropout."""

from __future__ import annotations

import pytest
from conftest import write_config
from plan.plans import cluster_of, inputs_of
from pydantic import create_model

from distill import config as run_config
from distill.config import RunConfig
from distill.plan.calibration import calibrated_stage
from distill.plan.plan_text import format_plan
from distill.plan.planner import make_plan
from distill.run.config import load_tree, validate
from distill.training.task import Task
from distill.training.train_config import TrainConfig
from distill.training.training_stage import Setup, TrainingStage


class PlainConfig(TrainConfig):
    """The config section `plain`."""


class PlainStage(TrainingStage):
    name = "plain"
    config_class = PlainConfig
    title = "plain"

    def build(self, setup: Setup) -> Task:
        raise NotImplementedError


class AfterCkdStage(PlainStage):
    name = "after_ckd"

    @property
    def init(self) -> str:
        return "ckd"


@pytest.fixture
def config(tmp_path, tiny_encoder, monkeypatch) -> RunConfig:
    """A run whose only training stages are two of an installed package."""
    installed: dict[str, type[TrainingStage]] = {stage.name: stage for stage in (PlainStage, AfterCkdStage)}
    tasks = run_config.training_tasks() | installed
    monkeypatch.setattr(run_config, "training_tasks", lambda: tasks)
    monkeypatch.setattr(run_config, "TRAINING_STAGES", tuple(tasks))
    monkeypatch.setattr(run_config, "STAGES", ("precompute", *tasks, "export", "evaluate"))
    sections = {name: (PlainConfig, PlainConfig(global_batch=32)) for name in installed}
    model = create_model("RunConfig", __base__=RunConfig, **sections)  # type: ignore[call-overload]
    tree = load_tree(write_config(tmp_path, tiny_encoder), ["stages=[precompute,after_ckd,plain]"])
    return validate(model, tree, "the config")


def test_a_task_of_an_installed_package_is_planned(config):
    plan = make_plan(inputs_of(config, cluster_of("H100", 1, 8), tokens_per_text=9, num_texts=640))
    assert plan.stages.keys() == {"after_ckd", "plain"}
    for stage in plan.stages.values():
        assert stage.steps == 20 and stage.trained_parameters == stage.parameters
        memory, received = stage.chosen.memory_bytes, stage.chosen.bytes_received_per_step
        assert memory["parameters"] > 0 and memory["queue"] == memory["keys"] == memory["loss"] == 0
        assert stage.chosen.seconds_per_step["compute"] > 0
        assert received["total"] == pytest.approx(received["gradients"] + received["parameters"])
    assert "plain: " in format_plan(plan, config)


def test_a_task_of_an_installed_package_is_calibrated_if_it_trains_the_encoder_of_section_student(config):
    assert calibrated_stage(config) == "plain"
