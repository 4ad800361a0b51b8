"""A student interpolated with what the stage began with: which weights are kept, and whose metrics are reported."""

from __future__ import annotations

import pytest
import torch
from distributed_ranks import on_ranks
from engines import train_stage
from safetensors.torch import load_file

from distill.config import load_config, stage_of
from distill.student import Student

STEPS = ("ckd.global_batch=16", "ckd.micro_batch=8", "ckd.queue=32", "ckd.max_steps=4", "ckd.lr=1e-2", "ckd.dev_every=4",
         "ckd.projection=linear", "engine.precision=fp32")  # fmt: skip


def weights(folder):
    return load_file(folder / "model.safetensors") | load_file(folder / "heads.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero3"])
def test_the_kept_weights_lie_between_where_training_began_and_ended_also_after_a_stop(embedded_copy, engine):
    config, run = embedded_copy
    kept = {}
    for name, more in (("whole", ()), ("tenth", ("ckd.merge=0.1",)), ("half", ("ckd.merge=0.5",))):
        overrides = [
            f"name={name}",
            f"shards_from={run.name}",
            f"engine.deepspeed=configs/deepspeed/{engine}.json",
            *STEPS,
            *more,
        ]
        if name == "half":
            stopped = on_ranks(1, train_stage, config, "ckd", overrides, lambda step: step == 1)
            assert stopped == ["ckd: stopped on request at step 1 of 4"]
        on_ranks(1, train_stage, config, "ckd", overrides)
        kept[name] = weights(run.parent / name / "ckd/student")
    assert all(kept[name].keys() == kept["whole"].keys() for name in kept)
    stage = stage_of(load_config(config, list(STEPS)), "ckd")
    initial = stage.setup(torch.device("cpu"), None).student.encoder.state_dict()
    moved = 0.0
    for name, trained in kept["whole"].items():
        extrapolated = (kept["tenth"][name] - 0.1 * trained) / 0.9  # heads begin where they are fitted
        if name in initial:
            torch.testing.assert_close(extrapolated, initial[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(kept["half"][name], (extrapolated + trained) / 2, rtol=1e-5, atol=1e-6)
        moved += float((trained - extrapolated).norm())
    assert moved > 0.1


def test_the_reported_metrics_are_those_of_the_merged_student(embedded_copy):
    config, run = embedded_copy
    overrides = [f"shards_from={run.name}", "name=merged", "ckd.merge=0.3", *STEPS]
    (results,) = on_ranks(1, train_stage, config, "ckd", overrides)
    evaluation = stage_of(load_config(config, overrides), "ckd").dev_evaluation(None)
    metrics = evaluation(Student.load(run.parent / "merged/ckd/student").eval())
    fidelity = [value for name, value in metrics.items() if name.startswith("fidelity/")]
    assert results["best_score"] == pytest.approx(sum(fidelity) / len(fidelity), abs=1e-3)
