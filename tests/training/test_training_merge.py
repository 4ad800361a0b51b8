"""A stage's student merged with what the stage began with: which weights are kept, and whose figures are reported."""

from __future__ import annotations

import pytest
import torch
from commands import launch
from safetensors.torch import load_file

from distill.config import load_config
from distill.stages import read_json
from distill.student import Student
from distill.training.stage import build_dev, build_student

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
        place = (f"name={name}", f"shards_from={run.name}", "stage=ckd", f"engine.deepspeed=configs/deepspeed/{engine}.json")
        if name == "half":
            (run.parent / name).mkdir()
            (run.parent / name / "STOP").touch()
            assert launch("train.py", "--config", config, *place, *STEPS, *more).returncode == 75
        done = launch("train.py", "--config", config, *place, *STEPS, *more)
        assert done.returncode == 0, done.stdout
        assert ("ckd: the student of step 4, merged 0." in done.stdout) == bool(more)
        kept[name] = weights(run.parent / name / "ckd/student")
    assert all(kept[name].keys() == kept["whole"].keys() for name in kept)
    began = build_student(load_config(config, list(STEPS)), "ckd").encoder.state_dict()
    moved = 0.0
    for name, trained in kept["whole"].items():
        origin = (kept["tenth"][name] - 0.1 * trained) / 0.9  # heads: where they began is fitted, not kept
        if name in began:
            torch.testing.assert_close(origin, began[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(kept["half"][name], (origin + trained) / 2, rtol=1e-5, atol=1e-6)
        moved += float((trained - origin).norm())
    assert moved > 0.1


def test_the_reported_figures_are_those_of_the_merged_student(embedded_copy):
    config, run = embedded_copy
    changes = (f"shards_from={run.name}", "name=merged", "ckd.merge=0.3", *STEPS)
    done = launch("train.py", "--config", config, "stage=ckd", *changes)
    assert done.returncode == 0, done.stdout
    stage = run.parent / "merged/ckd"
    figures = build_dev(load_config(config, list(changes)), None)(Student.load(stage / "student").eval())
    fidelity = [figure for name, figure in figures.items() if name.startswith("fidelity/")]
    assert read_json(stage / "DONE.json")["results"]["best_score"] == pytest.approx(sum(fidelity) / len(fidelity), abs=1e-3)
