"""What the plan recommends is not what the config says already."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import write_config

from distill.config import RunConfig, load_config
from distill.plan.corpus import Corpus
from distill.plan.devices import load_devices
from distill.plan.plan import make_plan, models_of
from distill.plan.time import Cluster


@pytest.fixture
def advice(tmp_path, tiny_encoder):
    """Of a run on devices with so many bytes of memory, by the config's overrides."""
    path = write_config(tmp_path, tiny_encoder)

    def advise(memory: float, *overrides: str) -> str:
        config: RunConfig = load_config(path, ["stages=[precompute,ckd]", *overrides])
        table = load_devices()
        device = table.devices["cpu"].model_copy(update={"memory": memory})
        corpus = Corpus(1000, 10, 50.0, np.full(100, 20), {})
        cluster = Cluster(1, 2, "cpu", device, table.assumed, is_bf16=False)
        return "\n".join(make_plan(config, cluster, corpus, models_of(config)).advice)

    return advise


def test_a_teacher_that_does_not_fit_is_placed_once(advice):
    assert "teacher.placement=zero3" in advice(1e3)
    assert "teacher.placement" not in advice(1e3, "teacher.placement=zero3")


def test_checkpointing_is_recommended_to_those_who_have_none(advice):
    assert "activation_checkpointing=true" in advice(1e3)
    said = advice(1e3, "engine.activation_checkpointing=true")
    assert "activation_checkpointing" not in said and "larger devices" in said
