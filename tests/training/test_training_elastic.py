"""A checkpoint is the same whoever wrote it: any number of ranks and any ZeRO stage continues from it."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import write_config
from distributed_ranks import on_ranks
from engines import CELLS, CPU, Tiny, embed_text, full_state, new_engine, train_stage, train_steps
from safetensors.numpy import load_file

from distill.run.collectives import gather_rows, world_size
from distill.training.checkpoint import Checkpoints
from distill.training.engine import build_engine
from distill.training.fragments import copy_owned, steps_taken
from distill.training.loop import Trainer
from distill.training.train_config import EngineConfig, TrainConfig

BEFORE, AFTER = range(3), range(3, 6)
ROUND = [(4, "zero1"), (1, "zero0"), (2, "zero3_offload"), (4, "zero3"), (1, "zero2_offload"), (2, "zero2")]


def checkpoints_in(folder):
    return Checkpoints(folder, keep=2, device=CPU, must_match={})


def save_all(folder):
    """A checkpoint of each cell; the whole state in it, and after three further steps of the run that is not interrupted."""
    states = {}
    for cell in CELLS:
        engine = new_engine(cell, folder)
        train_steps(engine, BEFORE)
        checkpoints = checkpoints_in(folder / cell)
        checkpoints.save(engine, 3, {"step": 3})
        saved = full_state(engine)
        train_steps(engine, AFTER)
        checkpoints.wait()
        states[cell] = saved, full_state(engine)
        engine.destroy()
    return states


def load_all(folder, states, cells):
    """What differs from what was saved, and by how much further steps do, of each (saved, loaded) pair of cells."""
    found = {}
    for saved, loaded in cells:
        engine = new_engine(loaded, folder, seed=2)
        train_steps(engine, [9])  # one that has been used: what it holds must all be replaced
        assert checkpoints_in(folder / saved).load(engine) == {"step": 3}
        restored = full_state(engine)
        assert restored.keys() == states[saved][0].keys()
        wrong = [name for name, value in states[saved][0].items() if not np.array_equal(restored[name], value)]
        train_steps(engine, AFTER)
        later = full_state(engine)
        found[saved, loaded] = wrong, max(float(np.abs(later[name] - states[saved][1][name]).max()) for name in later)
        engine.destroy()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, on_ranks(2, save_all, folder)[0]


def test_files_hold_every_element_once_and_no_padding(saved):
    """Read by safetensors itself, put together by the numbers in their names."""
    folder, states = saved
    for cell in CELLS:
        expected = {name: value for name, value in states[cell][0].items() if not name.startswith("used/")}
        expected.pop("master/student.encoder.embedding.weight")  # frozen, and in the model that training began from
        assert "master/projection.weight" in expected and "exp_avg/projection.weight" not in expected
        found = {name: np.full_like(value, np.nan) for name, value in expected.items()}
        for path in (folder / cell / "step-00000003").glob("*.safetensors"):
            for key, values in load_file(path).items():
                kind, start, name = key.split("/")
                place = found[f"{kind}/{name}"][int(start) : int(start) + len(values)]
                assert np.isnan(place).all()
                place[:] = values
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "size, one_in", [(1, 1), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(4, 1, marks=pytest.mark.soak)]
)
def test_any_number_of_ranks_and_any_stage_continues_from_any_other(saved, size, one_in):
    """Parameters, as masters and as the forward pass uses them, and Adam's state to the bit; further steps to rounding."""
    folder, states = saved
    every = [(saved, loaded) for saved in CELLS for loaded in CELLS]
    # four ranks on few cores take their time: each cell is then read by two others
    cells = [pair for number, pair in enumerate(every) if (number + number // 6) % one_in == 0]
    for found in on_ranks(size, load_all, folder, states, cells):
        assert found.keys() == set(cells)
        for (saved, loaded), (wrong, difference) in found.items():
            assert not wrong, f"{saved} to {loaded} on {size} ranks"
            assert difference <= (0 if size == 2 and saved == loaded else 2e-6), f"{saved} to {loaded} on {size} ranks"


def train_with_and_without_a_copy(folder):
    """Whether steps are the same after a copy of the state before the first of them."""
    found = {}
    for cell in CELLS:
        states = []
        for copies in (False, True):
            engine = new_engine(cell, folder)
            if copies:
                assert copy_owned(engine) and steps_taken(engine) == 0
            train_steps(engine, BEFORE)
            states.append(full_state(engine))
            assert steps_taken(engine) == 3
            engine.destroy()
        found[cell] = all(np.array_equal(states[0][name], states[1][name]) for name in states[0])
    return found


def test_a_checkpoint_before_the_first_step_changes_nothing(tmp_path):
    for found in on_ranks(2, train_with_and_without_a_copy, tmp_path):
        assert found == dict.fromkeys(CELLS, True)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "offload_param on nvme; offload to cpu"),
        ({"stage": 2, "round_robin_gradients": True}, "round_robin_gradients reorders; set it to false"),
        ({"stage": 3, "mics_shard_size": 2}, "mics_shard_size spreads over some ranks; leave it out"),
    ],
)
def test_a_layout_that_checkpoints_cannot_read_is_refused_at_the_start(tmp_path, settings, named):
    path = tmp_path / "odd.json"
    path.write_text(json.dumps({"zero_optimization": settings}))
    with pytest.raises(ValueError, match=f"odd.json: checkpoints cannot read .*{named}"):
        build_engine(Tiny(0), TrainConfig(), EngineConfig(deepspeed=path), num_micro=1, temperature_lr=0.1)


def pass_on(folder, number, cell):
    """Loads the last checkpoint and saves it again as the next."""
    engine = new_engine(cell, folder, seed=number)
    checkpoints = checkpoints_in(folder / "zero3")
    state = checkpoints.load(engine)
    checkpoints.save(engine, number, {"step": number})
    checkpoints.wait()
    return state, world_size(), full_state(engine)


@pytest.mark.slow
def test_nothing_is_lost_over_1_2_and_4_ranks_and_all_stages(saved):
    folder, states = saved
    for number, (size, cell) in enumerate(ROUND, start=4):
        for state, found_size, found in on_ranks(size, pass_on, folder, number, cell):
            assert state == {"step": number - 1} and found_size == size
            assert all(np.array_equal(found[name], value) for name, value in states["zero3"][0].items())
        described = json.loads((folder / f"zero3/step-{number:08d}/COMPLETE.json").read_text())
        assert described["world_size"] == size and described["adam_steps"] == 3


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def recorded(path, overrides, stop_at):
    """A CKD run as the loop does it, up to a requested stop: {step: (batch, queue after it, loss)} and whether it stopped."""
    seen = {}
    take_step = Trainer._step

    def step(trainer, number, micro, is_logged):
        context, means = take_step(trainer, number, micro, is_logged)
        order = torch.cat([part.positions for part in micro]).argsort()
        rows = gather_rows(torch.cat([part.hashes for part in micro])[order], trainer.train.global_batch)
        queue = trainer.task.queue
        seen[number] = digest(rows), digest(queue.keys) + digest(queue.ids), means["loss"]
        return context, means

    Trainer._step = step
    stopped = isinstance(train_stage(path, "ckd", overrides, lambda number: number == stop_at), str)
    return seen, stopped


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, tiny_encoder):
    return embed_text(write_config(tmp_path_factory.mktemp("run"), tiny_encoder))


def test_a_run_that_moves_from_2_ranks_to_1_to_4_reads_the_same_batches_and_learns_the_same(embedded):
    def zero(stage, name):
        return [f"name={name}", "shards_from=tiny", f"engine.deepspeed=configs/deepspeed/zero{stage}.json"]

    (expected, stopped), _ = on_ranks(2, recorded, embedded, zero(2, "straight"), None)
    assert not stopped and list(expected) == list(range(12))
    seen = {}
    for size, stage, stop_at in ((2, 2, 5), (1, 3, 9), (4, 1, None)):
        for number, (found, stopped) in enumerate(on_ranks(size, recorded, embedded, zero(stage, "moved"), stop_at)):
            assert list(found) == list(range(len(seen), stop_at or 12)) if number == 0 else found.keys() <= seen.keys()
            assert stopped == (stop_at is not None)
            seen |= found
    for step, (rows, queue, loss) in expected.items():
        assert seen[step][:2] == (rows, queue)
        assert seen[step][2] == pytest.approx(loss, rel=1e-4)
    assert len({rows for rows, _, _ in expected.values()}) == len({queue for _, queue, _ in expected.values()}) == 12
