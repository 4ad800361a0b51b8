"""The loop's small parts: the rate of a step, who is held out for what, batches ahead of time; and how a stage ends."""

from __future__ import annotations

import math
import threading
import time
from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import write_config
from distributed_ranks import on_ranks

from distill.config import TrainConfig, load_config
from distill.stages import read_json
from distill.teacher.precompute import run_precompute
from distill.training.batches import prefetch
from distill.training.dev import SMALLEST_DEV, split_held_out
from distill.training.engine import learning_rate
from distill.training.stopping import Stopped

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("held_out, test, dev", [(3000, 2000, 1000), (5000, 2000, 1000), (2500, 2000, 1000), (120, 100, 1000)])
def test_dev_and_test_are_apart_where_there_are_enough(held_out, test, dev):
    for_test, for_dev = split_held_out(held_out, test, dev)
    assert len(for_test) == test and len(for_dev) == min(dev, held_out - test)
    assert not set(for_test.tolist()) & set(for_dev.tolist())
    assert max(for_dev) < held_out


@pytest.mark.parametrize("held_out", [0, 5, SMALLEST_DEV, 110])
def test_too_small_a_held_out_set_serves_both(held_out):
    for_test, for_dev = split_held_out(held_out, 100, 50)
    assert for_test.tolist() == list(range(min(100, held_out)))
    assert for_dev.tolist() == for_test.tolist()[:50]


def batches_threads():
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_batches_come_in_order_and_never_more_than_so_many_ahead():
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
    folder = tmp_path_factory.mktemp("run")
    config = write_config(folder, tiny_encoder)
    assert run_precompute(load_config(config), CPU, None)
    return config


def train_stage(path, *overrides, stop_at=None):
    import deepspeed

    from distill.training.stage import run_stage

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    try:
        return run_stage(load_config(path, list(overrides)), "ckd", CPU, lambda step: step == stop_at)
    except Stopped:
        return None


def test_a_stage_that_stopped_early_and_was_killed_before_it_said_so_ends_where_it_stopped(embedded):
    """A rate of nearly 0 changes no score, so that patience ends the stage at its third evaluation."""
    overrides = ["name=patient", "ckd.lr=1e-12", "ckd.patience=2", "ckd.dev_every=2", "ckd.save_every=100"]
    run = embedded.parent / "runs"
    (run / "patient").mkdir()
    (run / "patient/shards").symlink_to(run / "tiny/shards")
    (results,) = on_ranks(1, train_stage, embedded, *overrides)
    assert results["steps"] == 6 and results["best_step"] == 2
    (run / "patient/ckd/DONE.json").unlink()
    (again,) = on_ranks(1, train_stage, embedded, *overrides)
    assert again == results
    assert read_json(run / "patient/ckd/DONE.json")["results"]["steps"] == 6


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_evaluation_that_a_stop_did_not_wait_for_may_end_the_stage_and_report_the_merged_student(embedded, num_ranks):
    name = f"owed-{num_ranks}"
    overrides = [f"name={name}", "ckd.lr=1e-12", "ckd.patience=2", "ckd.dev_every=2", "ckd.save_every=100", "ckd.merge=0.5"]
    run = embedded.parent / "runs"
    (run / name).mkdir()
    (run / name / "shards").symlink_to(run / "tiny/shards")
    assert on_ranks(num_ranks, partial(train_stage, stop_at=6), embedded, *overrides) == [None] * num_ranks
    found = []
    for _ in range(2):  # the second time its figures are in the record already
        found += on_ranks(num_ranks, train_stage, embedded, *overrides)
        (run / name / "ckd/DONE.json").unlink()
    assert all(results["steps"] == 6 and results["best_step"] == 2 for results in found)
    assert {results["best_score"] for results in found} == {found[0]["best_score"]}
