"""A gradient that is not finite on one rank changes nothing on any, under every ZeRO stage; too many in a row end the run."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conftest import write_config
from distributed_ranks import on_ranks
from engines import CELLS, embed_text, full_state, new_engine, train_stage, train_steps
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.run.collectives import rank, world_size
from distill.training.engine import gradient_norm, has_finite_weights
from distill.training.loop import Trainer
from distill.training.teacher_keys import TeacherKeysModule


def around_a_spoiled_step(folder, cell, clip):
    """The state before, after and two steps after a step in which one rank's loss is NaN; the same without that step."""
    engine = new_engine(cell, folder, clip=clip, num_micro=2)
    train_steps(engine, range(2))
    before = full_state(engine)
    assert engine.was_step_applied() and math.isfinite(gradient_norm(engine))
    train_steps(engine, [2], spoiled=(2,))
    assert not engine.was_step_applied() and not math.isfinite(gradient_norm(engine))
    after = full_state(engine)
    losses = train_steps(engine, [3, 4])
    assert engine.was_step_applied()
    later = full_state(engine)
    engine.destroy()
    other = new_engine(cell, folder, clip=clip, num_micro=2)
    expected_losses = train_steps(other, [0, 1, 3, 4])[2:]
    expected = full_state(other)
    other.destroy()
    assert losses == expected_losses and all(map(math.isfinite, losses))
    return (
        all(np.array_equal(before[name], after[name]) for name in before),
        all(np.array_equal(later[name], expected[name]) for name in expected),
        any(not np.array_equal(before[name], later[name]) for name in before),
    )


def around_in_all_cells(folder, clip):
    return {cell: around_a_spoiled_step(folder, cell, clip) for cell in CELLS}


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_step_with_nan_changes_nothing_on_all_ranks_and_stages(tmp_path, clip):
    for found in on_ranks(2, around_in_all_cells, tmp_path, clip):
        assert found == {cell: (True, True, True) for cell in CELLS}


def norms(folder, cell, clip):
    engine = new_engine(cell, folder, clip=clip)
    found = []
    for step in range(3):
        train_steps(engine, [step])
        found.append(gradient_norm(engine))
    state = full_state(engine)
    engine.destroy()
    return found, state


def norms_of_all_cells(folder, clip):
    return {cell: norms(folder, cell, clip) for cell in CELLS}


@pytest.mark.parametrize("clip", [0.05, 0.0])
def test_every_stage_finds_the_same_norm_and_clips_alike(tmp_path, clip):
    (found, _) = on_ranks(2, norms_of_all_cells, tmp_path, clip)
    (expected, state) = found["zero2"]
    assert min(expected) > 0.05
    for cell in CELLS:
        assert found[cell][0] == pytest.approx(expected, rel=1e-5)
        assert all(np.allclose(found[cell][1][name], state[name], atol=1e-6) for name in state)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, tiny_encoder):
    return embed_text(write_config(tmp_path_factory.mktemp("run"), tiny_encoder))


def spoil_and_train(path, overrides, spoiled):
    """A CKD run in which the last rank's loss is NaN in some steps: its results, or what it raised."""
    forward = TeacherKeysModule.forward

    def spoiling(module, micro, context):
        loss, logged = forward(module, micro, context)
        return loss * (math.nan if rank() == 1 and context.step in spoiled else 1.0), logged

    TeacherKeysModule.forward = spoiling
    try:
        return train_stage(path, "ckd", overrides)
    except FloatingPointError as error:
        return str(error)


def new_run(embedded, name, stage):
    run = embedded.parent / "runs" / name
    engine = [f"engine.deepspeed=configs/deepspeed/zero{stage}.json", "engine.max_skipped=3"]
    return run, [f"name={name}", "shards_from=tiny", *engine]


@pytest.mark.parametrize("stage", [0, 2])
def test_a_run_continues_after_steps_that_are_skipped_and_counts_them(embedded, stage, capfd):
    run, overrides = new_run(embedded, f"skips{stage}", stage)
    first, second = on_ranks(2, spoil_and_train, embedded, overrides, [2, 3, 7])
    assert first == second and first["steps"] == 12
    complete = json.loads((run / "ckd/checkpoints/step-00000012/COMPLETE.json").read_text())
    assert complete["adam_steps"] == 9
    assert complete["state"]["skipped"] == 3 and complete["state"]["skipped_in_row"] == 0
    points = EventAccumulator(str(run / "tensorboard/ckd")).Reload()
    assert [(event.step, event.value) for event in points.Scalars("skipped")] == [(3, 1), (4, 2), (8, 3)]
    losses = points.Scalars("loss")
    assert [event.step for event in losses] == [step for step in range(1, 13) if step not in (3, 4, 8)]
    assert all(math.isfinite(event.value) for event in losses)
    assert "ckd: step 3/12 is skipped: the gradient is not finite (loss nan)" in capfd.readouterr().err


@pytest.mark.parametrize("stage", [0, 3])
def test_too_many_skipped_steps_in_a_row_end_the_run_on_all_ranks_with_a_fix(embedded, stage):
    run, overrides = new_run(embedded, f"hopeless{stage}", stage)
    first, second = on_ranks(2, spoil_and_train, embedded, overrides, [2, 3, 5, 6, 7, 8])
    assert first == second
    assert first.startswith("ckd: the gradient is not finite in 3 steps in a row, the last is 8 (loss nan): use another")
    assert not (run / "ckd/DONE.json").exists()


def test_a_run_without_a_held_out_set_of_which_every_step_is_skipped_is_not_done(tmp_path, tiny_encoder):
    path = write_config(tmp_path, tiny_encoder)
    path.write_text(path.read_text().replace("text: {", "text: {held_out: 0, "))
    embed_text(path)
    overrides = ["ckd.max_steps=3"]  # fewer than engine.max_skipped
    first, second = on_ranks(2, spoil_and_train, path, overrides, range(3))
    assert first == second and first.startswith("ckd: the gradient is not finite in 3 steps in a row, the last is 3")
    assert not list((tmp_path / "runs/tiny/ckd").glob("DONE.json"))


def finite_with_nan_in(folder, where):
    """Whether the weights are finite after NaN was written into the padding of ZeRO 3's parts, or into a last own value."""
    engine, last = new_engine("zero3", folder), world_size() - 1
    written = 0
    for parameter in engine.module.parameters():
        part = parameter.ds_tensor
        end = min(part.numel(), parameter.ds_numel - rank() * part.numel())
        spoiled = part[max(0, end) :] if where == "padding" else part[max(0, end - 1) : max(0, end)]
        if rank() == last:
            spoiled.fill_(torch.nan)
            written += spoiled.numel()
    found = has_finite_weights(engine), written
    engine.destroy()
    return found


def test_the_padding_of_a_part_that_deepspeed_leaves_uninitialised_is_no_weight(tmp_path):
    (first, _), (last, written) = on_ranks(2, finite_with_nan_in, tmp_path, "padding")
    assert written and first and last
    (first, _), (last, written) = on_ranks(2, finite_with_nan_in, tmp_path, "values")
    assert written and first and not last


def spoil_the_weights_after_a_step(config, at):
    step = Trainer._step

    def spoiled(trainer, number, *arguments):
        found = step(trainer, number, *arguments)
        if number == at and rank() == 1:
            with torch.no_grad():
                next(trainer.engine.module.parameters()).view(-1)[0] = torch.nan
        return found

    Trainer._step = spoiled
    return train_stage(config, "ckd", ["ckd.dev_every=3"])


def test_weights_that_are_not_finite_on_one_rank_end_the_run_on_all_before_they_are_kept(tmp_path, tiny_encoder):
    config = embed_text(write_config(tmp_path, tiny_encoder))
    message = r"ckd: after step 3 the weights are not finite: use another name= with a lower ckd\.lr"
    with pytest.raises(AssertionError, match=message):
        on_ranks(2, spoil_the_weights_after_a_step, config, 1)
