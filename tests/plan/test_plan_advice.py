"""A plan recommends nothing that the config has already."""

from __future__ import annotations

import pytest
from conftest import write_config
from plan.plans import cluster_of, inputs_of

from distill.config import load_config
from distill.plan.planner import make_plan


@pytest.fixture
def advice(tmp_path, tiny_encoder):
    """The advice for devices with this many bytes of memory, and a config with these overrides."""
    path = write_config(tmp_path, tiny_encoder)

    def advise(memory: float, *overrides: str) -> str:
        config = load_config(path, ["stages=[precompute,ckd]", *overrides])
        return "\n".join(make_plan(inputs_of(config, cluster_of(memory=memory), tokens_per_text=20)).advice)

    return advise


def test_a_teacher_that_does_not_fit_is_placed_once(advice):
    assert "teacher.placement=zero3" in advice(1e3)
    assert "teacher.placement" not in advice(1e3, "teacher.placement=zero3")


def test_checkpointing_is_recommended_only_where_it_is_off(advice):
    assert "activation_checkpointing=true" in advice(1e3)
    with_checkpointing = advice(1e3, "engine.activation_checkpointing=true")
    assert "activation_checkpointing" not in with_checkpointing and "larger devices" in with_checkpointing


def test_a_plan_by_tokens_is_of_the_longest_texts_that_they_hold_and_advises_tokens(tmp_path, tiny_encoder, advice):
    path, plans = write_config(tmp_path, tiny_encoder), []
    for override in ("ckd.tokens_per_batch=64", "ckd.micro_batch=2"):
        config = load_config(path, ["stages=[precompute,ckd]", override, "student.max_length=32"])
        plans.append(make_plan(inputs_of(config, cluster_of(memory=1e12), tokens_per_text=20)).stages["ckd"].chosen)
    by_tokens, by_rows = plans
    assert by_tokens.memory_bytes == by_rows.memory_bytes
    assert by_tokens.largest_micro_batch == by_rows.largest_micro_batch
    by_tokens, by_rows = (
        advice(1e12, "student.max_length=32", each) for each in ("ckd.tokens_per_batch=64", "ckd.micro_batch=2")
    )
    rows = int(by_rows.split("ckd.micro_batch=")[1].split(":")[0])
    assert f"ckd.tokens_per_batch={32 * rows}: it fits" in by_tokens and "micro_batch=" not in by_tokens
