"""The loop's small parts: the learning rate of a step, prefetched batches; and how a stage ends."""

from __future__ import annotations

import math
import threading
import time
from itertools import pairwise

import pytest
from conftest import write_config
from distributed_ranks import on_ranks
from engines import embed_text, train_stage

from distill.run.files import read_json
from distill.training.batches import prefetch
from distill.training.engine import learning_rate
from distill.training.loop import Trainer
from distill.training.train_config import TrainConfig


@pytest.mark.parametrize("num_steps, warmup", [(100, 0.1), (7, 0.3), (1000, 0.05), (3, 0.9)])
def test_the_rate_rises_to_its_peak_once_and_falls_to_nothing(num_steps, warmup):
    train = TrainConfig(lr=0.5, warmup=warmup)
    rates = [learning_rate(step, num_steps, train) for step in range(num_steps)]
    peak = math.ceil(warmup * num_steps) - 1
    assert 0 < rates[0] <= 0.5 and rates[peak] == pytest.approx(0.5)
    assert all(a < b for a, b in pairwise(rates[: peak + 1]))
    assert all(a >= b for a, b in pairwise(rates[peak:]))
    assert min(rates) > 0
    if peak + 1 < num_steps:
        assert learning_rate(num_steps, num_steps, train) == pytest.approx(0)


def test_without_warmup_the_first_step_has_the_whole_rate_and_the_middle_half():
    train = TrainConfig(lr=0.5, warmup=0)
    assert learning_rate(0, 10, train) == 0.5
    assert learning_rate(5, 10, train) == pytest.approx(0.25)
    assert learning_rate(0, 1, train) == 0.5


def batches_threads():
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_batches_come_in_order_and_at_most_depth_ahead():
    loaded, seen = [], []

    def load(step):
        loaded.append(step)
        return [step]

    for (step,) in prefetch(load, range(3, 20), depth=2):
        seen.append(step)
        time.sleep(0.002)
        assert len(loaded) - len(seen) <= 3  # two wait, one is being made
    assert seen == loaded == list(range(3, 20)) and not batches_threads()


def test_an_error_while_loading_is_raised_where_the_batch_is_asked_for_and_the_thread_ends():
    def load(step):
        if step == 2:
            raise OSError("the shard is gone")
        return [step]

    seen = []
    with pytest.raises(OSError, match="the shard is gone"):
        for (step,) in prefetch(load, range(10)):
            seen.append(step)
    assert seen == [0, 1] and not batches_threads()


def test_a_loop_that_is_left_early_stops_the_thread():
    loaded = []

    def load(step):
        loaded.append(step)
        return [step]

    batches = prefetch(load, range(1000))
    assert next(batches) == [0]
    batches.close()
    assert len(loaded) <= 4 and not batches_threads()


def test_no_steps_are_no_batches():
    assert list(prefetch(lambda step: [step], range(5, 5))) == []


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, tiny_encoder):
    return embed_text(write_config(tmp_path_factory.mktemp("run"), tiny_encoder))


def train(config, overrides, stop_at=None):
    return train_stage(config, "ckd", overrides, lambda step: step == stop_at)


def test_a_stage_that_stopped_early_and_was_killed_before_done_json_ends_where_it_stopped(embedded):
    """A rate of nearly 0 changes no score, so that patience ends the stage at its third evaluation after step 0."""
    overrides = ["name=patient", "ckd.lr=1e-12", "ckd.patience=3", "ckd.dev_every=2", "ckd.save_every=100"]
    run = embedded.parent / "runs"
    (run / "patient").mkdir()
    (run / "patient/shards").symlink_to(run / "tiny/shards")
    (results,) = on_ranks(1, train, embedded, overrides)
    assert results["steps"] == 6 and results["best_step"] == 0
    (run / "patient/ckd/DONE.json").unlink()
    (again,) = on_ranks(1, train, embedded, overrides)
    assert again == results
    assert read_json(run / "patient/ckd/DONE.json")["results"]["steps"] == 6


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_deferred_evaluation_may_end_the_stage_and_report_the_merged_student(embedded, num_ranks):
    name = f"deferred-{num_ranks}"
    overrides = [f"name={name}", "ckd.lr=1e-12", "ckd.patience=3", "ckd.dev_every=2", "ckd.save_every=100", "ckd.merge=0.5"]
    run = embedded.parent / "runs"
    (run / name).mkdir()
    (run / name / "shards").symlink_to(run / "tiny/shards")
    stopped = ["ckd: stopped on request at step 6 of 12"] * num_ranks
    assert on_ranks(num_ranks, train, embedded, overrides, 6) == stopped
    found = []
    for _ in range(2):  # the second time its points are in TensorBoard already
        found += on_ranks(num_ranks, train, embedded, overrides)
        (run / name / "ckd/DONE.json").unlink()
    assert all(results["steps"] == 6 and results["best_step"] == 0 for results in found)
    assert {results["best_score"] for results in found} == {found[0]["best_score"]}


def test_how_often_the_student_is_evaluated_may_change_while_the_stage_is_unfinished(embedded):
    run = ["name=often", "shards_from=tiny", "ckd.save_every=100"]
    assert on_ranks(1, train, embedded, [*run, "ckd.dev_every=4"], 6) == ["ckd: stopped on request at step 6 of 12"]
    with pytest.raises(AssertionError, match=r"ckd\.lr: 0\.001 -> 0\.1"):
        on_ranks(1, train, embedded, [*run, "ckd.dev_every=3", "ckd.lr=0.1"])
    (results,) = on_ranks(1, train, embedded, [*run, "ckd.dev_every=3"])
    done = read_json(embedded.parent / "runs/often/ckd/DONE.json")
    assert results["steps"] == 12 and done["selection"]["ckd"]["dev_every"] == 3


def test_a_stage_returns_no_student_worse_than_it_began_with(embedded, capfd):
    run = ["name=worse", "shards_from=tiny", "ckd.lr=1.0", "ckd.dev_every=4", "ckd.warmup=0"]
    (results,) = on_ranks(1, train, embedded, run)
    assert results["best_step"] == 0 and results["best_score"] == results["initial_score"]
    assert "+0.0000" in capfd.readouterr().err


def kill_after(config, overrides, num_steps):
    """A run that is killed after so many steps, or ends."""
    step, taken = Trainer._step, []

    def counted(trainer, *arguments):
        if len(taken) == num_steps:
            trainer.checkpoints.wait()
            raise InterruptedError("killed")
        taken.append(None)
        return step(trainer, *arguments)

    Trainer._step = counted
    return train_stage(config, "ckd", overrides)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_whose_newest_checkpoint_is_damaged_before_every_restart_finishes(embedded, keep):
    name = f"damaged-{keep}"
    overrides = [f"name={name}", "shards_from=tiny", f"ckd.keep={keep}", "ckd.save_every=1", "ckd.dev_every=6"]
    checkpoints, starts = embedded.parent / "runs" / name / "ckd/checkpoints", 0
    while not (checkpoints.parent / "DONE.json").exists():
        starts += 1
        try:
            on_ranks(1, kill_after, embedded, overrides, 6)
        except AssertionError as killed:
            assert "killed" in str(killed)
            newest = max(checkpoints.glob("step-????????")) / "rank-00000.safetensors"
            newest.write_bytes(newest.read_bytes()[:-1])
    assert starts <= 6
