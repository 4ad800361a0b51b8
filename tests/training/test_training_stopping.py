"""Stopping: at the same step on every rank, with a checkpoint from which the same command makes the same student."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import time
from functools import cache

import pytest
from commands import command
from conftest import make_encoder, sentences, write_config
from distributed_ranks import on_ranks
from engines import train_stage
from reference_times import starts
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_processes import TrainingProcesses, start_training

from distill.run.collectives import rank
from distill.run.files import read_json
from distill.shards import verify_all

STEPS = ["ckd.max_steps=30", "ckd.epochs=30", "ckd.dev_every=2", "ckd.save_every=10"]


def outcome(directory):
    """The digests of the student's files, and the results in DONE.json without the time."""
    student = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.glob("ckd/student/*.safetensors"))]
    results = read_json(directory / "ckd/DONE.json")["results"]
    assert len(student) == 2
    return student, {name: value for name, value in results.items() if name != "seconds"}


def logged(directory, name):
    """The steps at which TensorBoard has a point."""
    events = EventAccumulator(str(directory / "tensorboard/ckd")).Reload()
    return [event.step for event in events.Scalars(name)]


def train(config, asked_at, by_rank):
    steps = ["ckd.max_steps=12", "ckd.dev_every=4", "ckd.save_every=5"]
    return train_stage(config, "ckd", steps, lambda step: step == asked_at and rank() == by_rank)


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.soak)])
def test_all_ranks_stop_after_the_step_of_a_request_even_if_an_evaluation_is_due(embedded_copy, embedded_once, tmp_path, size):
    config, directory = embedded_copy
    (tmp_path / "whole").mkdir()
    shutil.copytree(embedded_once / "runs", tmp_path / "whole/runs")
    whole = tmp_path / "whole/run.yaml"
    whole.write_text(config.read_text().replace(str(tmp_path / "runs"), str(tmp_path / "whole/runs")))
    on_ranks(size, train, whole, None, 0)

    for asked_at in (7, 8):
        assert on_ranks(size, train, config, asked_at, size - 1) == [f"ckd: stopped on request at step {asked_at} of 12"] * size
        newest = max((directory / "ckd/checkpoints").glob("step-????????"))
        described = json.loads((newest / "COMPLETE.json").read_text())
        assert described["step"] == asked_at and len(described["files"]) == size
        assert described["state"]["evaluated"] == 4, "a stop waits for no evaluation"
    on_ranks(size, train, config, None, 0)
    assert outcome(directory) == outcome(tmp_path / "whole/runs/tiny")
    assert logged(directory, "dev/score") == [0, 4, 8, 12], "the evaluation that the stop did not wait for was deferred"


def test_a_stop_requested_in_the_last_step_finishes_the_stage(embedded_copy):
    (results,) = on_ranks(1, train, embedded_copy[0], 12, 0)
    assert results["steps"] == 12 and (embedded_copy[1] / "ckd/DONE.json").exists()


@pytest.fixture(scope="module")
def whole(embedded_once, tmp_path_factory, tiny_encoder):
    """whole(size): the results of so many ranks that nobody stops."""

    @cache
    def train_whole(size):
        folder = tmp_path_factory.mktemp("whole")
        shutil.copytree(embedded_once / "runs", folder / "runs")
        shutil.copy(embedded_once / "text.txt", folder)
        with start_training("none", size, write_config(folder, tiny_encoder), *STEPS) as started:
            assert started.wait() == [0] * size, started.printed
        return outcome(folder / "runs/tiny")

    return train_whole


def stop(started: TrainingProcesses, how: str, directory) -> None:
    if how == "file":
        (directory / "STOP").touch()
    elif how.startswith("rank"):
        os.kill(started.ranks()[int(how[5])], getattr(signal, how[7:]))
    else:
        os.kill(started.main, getattr(signal, how))


@pytest.mark.serial
@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, size, how",
    [
        ("pipeline", 2, "SIGTERM"),
        pytest.param("deepspeed", 2, "rank 1 SIGUSR1", marks=pytest.mark.soak),
        pytest.param("none", 3, "rank 2 SIGUSR2", marks=pytest.mark.soak),
        pytest.param("none", 2, "file", marks=pytest.mark.soak),
    ],
)
def test_stopped_and_started_again_it_makes_the_same_student(embedded_copy, whole, launcher, size, how):
    config, directory = embedded_copy
    with start_training(launcher, size, config, *STEPS) as started:
        started.wait_for(directory / "ckd/checkpoints", "step-00000010")
        stop(started, how, directory)
        assert set(started.wait(starts(5))) == {75}, started.printed
        (step,) = re.findall(r"^ckd: stopped on request at step (\d+) of 30; the same command continues", started.printed, re.M)
        assert "error:" not in started.printed and "Traceback" not in started.printed, started.printed
    newest = max((directory / "ckd/checkpoints").glob("step-????????"))
    assert newest.name == f"step-{int(step):08d}" and int(step) < 30
    assert len(json.loads((newest / "COMPLETE.json").read_text())["files"]) == size
    assert not (directory / "STOP").exists() and not (directory / "ckd/DONE.json").exists()

    with start_training(launcher, size, config, *STEPS) as started:
        assert set(started.wait()) == {0}, started.printed
        assert f"ckd: continuing after step {int(step)} of 30" in started.printed
    assert outcome(directory) == whole(size)
    assert logged(directory, "loss") == list(range(1, 31)) and logged(directory, "dev/score") == list(range(0, 31, 2))


@pytest.mark.slow
def test_a_stop_requested_while_the_ranks_still_load_ends_them_before_or_after_a_step(embedded_copy):
    config, directory = embedded_copy
    with start_training("pipeline", 2, config, *STEPS) as started:
        while len(started.ranks()) < 2:
            time.sleep(0.01)
        for _ in range(3):  # the first one counts, the others do nothing more
            os.kill(started.main, signal.SIGTERM)
            time.sleep(0.1)
        assert started.wait() == [75]
        stopped = re.search(r"ckd: stopped on request (before its first step|at step 1 of 30)", started.printed)
        assert stopped is not None, started.printed
    is_saved = (directory / "ckd/checkpoints/step-00000001/COMPLETE.json").exists()
    assert is_saved == ("at step 1" in stopped[0]) and not (directory / "STOP").exists()


@pytest.mark.serial
@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(embedded_copy):
    """One rank is stopped, so that the others wait for it, and the first Ctrl-C has no effect."""
    config, directory = embedded_copy
    with start_training("pipeline", 2, config, *STEPS) as started:
        started.wait_for(directory / "ckd/checkpoints", "step-00000010")
        os.kill(started.ranks()[1], signal.SIGSTOP)
        os.killpg(started.main, signal.SIGINT)
        time.sleep(2)
        assert len(started.ranks()) == 2
        os.killpg(started.main, signal.SIGINT)
        assert started.wait(starts(1)) == [130]


@pytest.mark.serial
@pytest.mark.soak
@pytest.mark.parametrize("how", ["SIGTERM", "file"])
def test_precompute_stops_soon_leaves_nothing_half_written_and_continues(tmp_path, how):
    encoder = make_encoder(tmp_path / "encoder", layers=6, width=64)
    (tmp_path / "text.txt").write_text("\n".join(sentences(8000)) + "\n")
    teacher = f"{{model: {encoder}, pooling: mean, max_length: 32, precision: fp32, tokens_per_batch: 64, tasks: 2}}"
    config = write_config(tmp_path, encoder, teacher=teacher, shards="{rows: 40, block_rows: 16}")
    directory = tmp_path / "runs/tiny"
    pipeline = command("pipeline.py", "--config", config, "stages=[precompute]")
    with TrainingProcesses([pipeline], [{}], config) as started:
        started.wait_for(directory / "shards", "*.tar")
        stop(started, how, directory)
        assert started.wait(starts(5)) == [75], started.printed
        printed = started.printed
    assert "Traceback" not in printed and "error:" not in printed, printed
    assert not (directory / "precompute/DONE.json").exists() and not (directory / "STOP").exists()
    assert not list(directory.rglob("*.part")) and not list(directory.rglob(".*.claim")), printed
    with TrainingProcesses([pipeline], [{}], config) as started:
        assert started.wait() == [0], started.printed
    assert verify_all(directory / "shards") == []
