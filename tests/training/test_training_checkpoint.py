"""Checkpoints of a real DeepSpeed engine: complete or absent, verified before they are opened, the newest sound one taken."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from ranks import on_ranks
from torch import nn

from distill.config import EngineConfig, TrainConfig
from distill.training.checkpoint import Checkpoints
from distill.training.engine import build_engine

CPU = torch.device("cpu")


class Line(nn.Module):
    """Something to optimise: its loss pulls the weights towards the step's number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)

    def forward(self, target):
        return (self.linear.weight - target).square().sum() + (self.linear.bias + target).square().sum()


def new_engine(stage):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    config = EngineConfig(deepspeed=f"configs/deepspeed/zero{stage}.json")
    return build_engine(Line(), TrainConfig(lr=0.1, micro_batch=4), config, num_micro=1, temperature_lr=0.1)


def train(engine, steps):
    for step in steps:
        engine.backward(engine(torch.tensor(float(step))))
        engine.step()
    return torch.cat([parameter.detach().flatten() for parameter in engine.module.parameters()]).tolist()


def save_three(directory, stage):
    """Steps 2, 4 and 6, of which the last two are kept; the weights after 4, 6 and 8 steps."""
    engine = new_engine(stage)
    checkpoints = Checkpoints(directory, keep=2, device=CPU)
    weights = {}
    for step in (2, 4, 6):
        weights[step] = train(engine, range(step - 2, step))
        checkpoints.save(engine, step, {"step": step, "best_score": 0.5})
    weights[8] = train(engine, range(6, 8))
    return weights


def resume(directory, stage):
    """What a fresh engine has restored, and its weights after the steps to 8."""
    engine = new_engine(stage)
    state = Checkpoints(directory, keep=2, device=CPU).load(engine)
    return state, train(engine, range(state["step"] if state else 0, 8))


@pytest.fixture(scope="module", params=[0, 2])
def saved(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(f"zero{request.param}")
    (weights,) = on_ranks(1, save_three, directory, request.param)
    return directory, request.param, weights


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    return tmp_path / "checkpoints", saved[1], saved[2]


def test_the_last_two_are_kept_and_nothing_half_written(saved):
    assert sorted(path.name for path in saved[0].iterdir()) == ["step-00000004", "step-00000006"]


def test_a_resumed_engine_goes_on_as_if_it_had_never_stopped(copy):
    directory, stage, weights = copy
    ((state, found),) = on_ranks(1, resume, directory, stage)
    assert state == {"step": 6, "best_score": 0.5} and found == weights[8]


def damaged_file(folder, how):
    files = sorted(path for path in (folder / "state").rglob("*") if path.is_file())
    if how == "flipped":
        for file in files:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
            return
    elif how == "truncated":
        files[-1].write_bytes(files[-1].read_bytes()[:-1])
    elif how == "missing":
        files[0].unlink()
    elif how == "description":
        (folder / "COMPLETE.json").write_text((folder / "COMPLETE.json").read_text()[:-20])
    elif how == "incomplete":
        (folder / "COMPLETE.json").unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "description", "incomplete"])
def test_a_damaged_checkpoint_is_passed_over_for_the_older_one(copy, how):
    directory, stage, weights = copy
    damaged_file(directory / "step-00000006", how)
    ((state, found),) = on_ranks(1, resume, directory, stage)
    assert state["step"] == 4 and found == weights[8]


def test_without_a_sound_checkpoint_the_stage_begins_anew(copy):
    directory, stage, weights = copy
    for folder in directory.iterdir():
        damaged_file(folder, "flipped")
    ((state, found),) = on_ranks(1, resume, directory, stage)
    assert state is None and found == weights[8]


def test_a_checkpoint_that_was_being_written_is_not_one(copy):
    directory, stage, _ = copy
    (directory / "step-00000006").rename(directory / "step-00000006.part")
    ((state, _),) = on_ranks(1, resume, directory, stage)
    assert state["step"] == 4


def test_another_zero_stage_is_named_unless_it_stores_the_same(copy):
    directory, stage, weights = copy
    with pytest.raises(AssertionError, match=r"was taken with ZeRO .* and engine\.deepspeed is of ZeRO 3: put it back"):
        on_ranks(1, resume, directory, 3)
    if stage == 2:
        ((state, found),) = on_ranks(1, resume, directory, 1)
        assert state["step"] == 6 and found == weights[8]


def test_another_world_size_is_named_with_both_remedies(copy):
    directory, stage, _ = copy
    path = directory / "step-00000006/COMPLETE.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"world_size": 3}))
    with pytest.raises(AssertionError, match=r"was taken with 3 ranks and this run has 1: start it with 3, or delete"):
        on_ranks(1, resume, directory, stage)
