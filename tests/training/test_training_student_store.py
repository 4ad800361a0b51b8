"""The best student: after a kill, and interpolated with what the stage began with."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from distributed_ranks import on_ranks
from engines import train_stage
from safetensors.torch import load_file

from distill.config import load_config, stage_of
from distill.student import Student
from distill.training.checkpoint import Checkpoints
from distill.training.loop import Trainer
from distill.training.student_store import restore_folder

STEPS = ("ckd.global_batch=16", "ckd.micro_batch=8", "ckd.queue=32", "ckd.max_steps=4", "ckd.lr=1e-2", "ckd.dev_every=4",
         "ckd.projection=linear", "engine.precision=fp32")  # fmt: skip


def weights(folder):
    return load_file(folder / "model.safetensors") | load_file(folder / "heads.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("engine", [pytest.param("zero1", marks=pytest.mark.soak), "zero3"])
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
        on_ranks(1, train_with_scores, config, overrides, {0: 0.0, 4: 1.0})
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


def train_with_scores(config, overrides, scores, killed_at=None):
    """A CKD run whose dev evaluations give these scores by step, and that fails before the checkpoint of `killed_at`."""
    save = Checkpoints.save

    def fail(checkpoints, engine, step, *more):
        checkpoints.wait()
        if step == killed_at:
            raise InterruptedError("killed before this checkpoint")
        save(checkpoints, engine, step, *more)

    Checkpoints.save = fail
    Trainer._score = lambda trainer, metrics: scores[trainer.progress.step]
    return train_stage(config, "ckd", overrides)


def test_a_student_of_an_evaluation_that_a_kill_undid_is_not_kept(embedded_copy):
    """As where a resumed run rounds differently: the evaluation after the checkpoint is not the best any more."""
    config, run = embedded_copy
    overrides = [*STEPS, "ckd.max_steps=6", "ckd.dev_every=2", "ckd.save_every=2", "ckd.keep=3"]
    with pytest.raises(AssertionError, match="killed before this checkpoint"):
        on_ranks(1, train_with_scores, config, overrides, {0: 0.1, 2: 0.5, 4: 0.6}, 4)
    of_step_2 = weights(run / "ckd/checkpoints/step-00000002/student")
    assert not weights(run / "ckd/student")["projection.weight"].equal(of_step_2["projection.weight"])
    (results,) = on_ranks(1, train_with_scores, config, overrides, {4: 0.4, 6: 0.3})
    kept = weights(run / "ckd/student")
    assert results["best_step"] == 2 and all(kept[name].equal(value) for name, value in of_step_2.items())


def test_every_file_of_the_best_student_and_its_folders_are_flushed_before_the_former_one_is_deleted(tmp_path, monkeypatch):
    (tmp_path / "kept/tokenizer").mkdir(parents=True)
    for name in ("model.safetensors", "tokenizer/vocab.txt"):
        (tmp_path / "kept" / name).write_text("new")
    shutil.copytree(tmp_path / "kept", tmp_path / "stage/student")
    flushed, fsync = [], os.fsync

    def record(file: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{file}").readlink())
        fsync(file)

    monkeypatch.setattr(os, "fsync", record)
    restore_folder(tmp_path / "stage/student", tmp_path / "kept")
    part = tmp_path / "stage/student.part"
    assert {part / "model.safetensors", part / "tokenizer/vocab.txt", part / "tokenizer", part} <= set(flushed[:-1])
    assert flushed[-1] == tmp_path / "stage"
