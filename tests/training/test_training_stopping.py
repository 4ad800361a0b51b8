"""Stopping: at the same step on every rank, with a checkpoint from which the same command makes the same student."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import time

import pytest
import torch
from commands import command
from conftest import make_encoder, sentences, write_config
from distributed_ranks import on_ranks
from reference_times import hang_limit, starts
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_processes import TrainingProcesses, start_training

from distill.config import load_config
from distill.process import this_process
from distill.shards import verify_all
from distill.stages import read_json
from distill.training.distributed import rank
from distill.training.stopping import Stopped, StopRequest
from distill.training.watch import PATIENCE, SILENCE, Watch

CPU = torch.device("cpu")
STEPS = ["ckd.max_steps=30", "ckd.epochs=30", "ckd.dev_every=2", "ckd.save_every=10"]


def outcome(directory):
    """The student's bytes and what DONE.json says of it, but for the time it took."""
    student = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.glob("ckd/student/*.safetensors"))]
    results = read_json(directory / "ckd/DONE.json")["results"]
    assert len(student) == 2
    return student, {name: value for name, value in results.items() if name != "seconds"}


def logged(directory, name):
    """The steps at which TensorBoard has a point."""
    events = EventAccumulator(str(directory / "tensorboard/ckd")).Reload()
    return [event.step for event in events.Scalars(name)]


def test_a_request_is_a_call_or_a_file_that_is_removed_once_obeyed(tmp_path):
    assert not StopRequest().is_asked
    of_rank_0 = StopRequest(tmp_path / "STOP")
    assert not of_rank_0.is_asked
    (tmp_path / "STOP").touch()
    assert of_rank_0.is_asked
    of_rank_0.obeyed()
    assert not of_rank_0.is_asked and not (tmp_path / "STOP").exists()
    of_rank_0.ask()
    assert of_rank_0.is_asked
    of_rank_0.obeyed()  # nothing to remove


def train(path, asked_at, by_rank):
    """The stage in this process group; the message if it was stopped, else its results."""
    import deepspeed

    from distill.training.stage import run_stage

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    config = load_config(path, ["ckd.max_steps=12", "ckd.dev_every=4", "ckd.save_every=5"])
    try:
        return run_stage(config, "ckd", CPU, lambda step: step == asked_at and rank() == by_rank)
    except Stopped as stopped:
        return str(stopped)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_one_rank_asks_and_all_stop_after_that_step_even_if_an_evaluation_is_due(embedded_copy, embedded_once, tmp_path, size):
    config, directory = embedded_copy
    (tmp_path / "whole").mkdir()
    shutil.copytree(embedded_once / "runs", tmp_path / "whole/runs")
    whole = tmp_path / "whole/run.yaml"
    whole.write_text(config.read_text().replace(str(tmp_path / "runs"), str(tmp_path / "whole/runs")))
    on_ranks(size, train, whole, None, 0)

    for asked_at in (7, 8):
        assert on_ranks(size, train, config, asked_at, size - 1) == [f"ckd: stopped as asked at step {asked_at} of 12"] * size
        newest = max((directory / "ckd/checkpoints").glob("step-????????"))
        described = json.loads((newest / "COMPLETE.json").read_text())
        assert described["step"] == asked_at and len(described["files"]) == size
        assert described["state"]["evaluated"] == 4, "a stop waits for no evaluation"
    on_ranks(size, train, config, None, 0)
    assert outcome(directory) == outcome(tmp_path / "whole/runs/tiny")
    assert logged(directory, "dev/score") == [4, 8, 12], "the evaluation that the stop did not wait for was made up for"


def test_asked_in_the_last_step_the_stage_is_done(embedded_copy):
    (results,) = on_ranks(1, train, embedded_copy[0], 12, 0)
    assert results["steps"] == 12 and (embedded_copy[1] / "ckd/DONE.json").exists()


@pytest.fixture(scope="module")
def whole(embedded_once, tmp_path_factory, tiny_encoder):
    """What two and three ranks make of the stage when nobody stops them."""
    outcomes = {}
    for size in (2, 3):
        folder = tmp_path_factory.mktemp("whole")
        shutil.copytree(embedded_once / "runs", folder / "runs")
        shutil.copy(embedded_once / "text.txt", folder)
        with start_training("none", size, write_config(folder, tiny_encoder), *STEPS) as started:
            assert started.wait() == [0] * size, started.printed
        outcomes[size] = outcome(folder / "runs/tiny")
    return outcomes


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
    [("pipeline", 2, "SIGTERM"), ("deepspeed", 2, "rank 1 SIGUSR1"), ("none", 3, "rank 2 SIGUSR2"), ("none", 2, "file")],
)
def test_stopped_and_started_again_it_makes_the_same_student(embedded_copy, whole, launcher, size, how):
    config, directory = embedded_copy
    with start_training(launcher, size, config, *STEPS) as started:
        started.wait_for(directory / "ckd/checkpoints", "step-00000010")
        stop(started, how, directory)
        assert set(started.wait(starts(5))) == {75}, started.printed
        (step,) = re.findall(r"^ckd: stopped as asked at step (\d+) of 30; the same command goes on", started.printed, re.M)
        assert "error:" not in started.printed and "Traceback" not in started.printed, started.printed
    newest = max((directory / "ckd/checkpoints").glob("step-????????"))
    assert newest.name == f"step-{int(step):08d}" and int(step) < 30
    assert len(json.loads((newest / "COMPLETE.json").read_text())["files"]) == size
    assert not (directory / "STOP").exists() and not (directory / "ckd/DONE.json").exists()

    with start_training(launcher, size, config, *STEPS) as started:
        assert set(started.wait()) == {0}, started.printed
        assert f"ckd: continuing after step {int(step)} of 30" in started.printed
    assert outcome(directory) == whole[size]
    assert logged(directory, "loss") == list(range(1, 31)) and logged(directory, "dev/score") == list(range(2, 31, 2))


@pytest.mark.slow
def test_asked_while_the_ranks_still_load_they_stop_after_a_step(embedded_copy):
    config, directory = embedded_copy
    with start_training("pipeline", 2, config, *STEPS) as started:
        while len(started.ranks()) < 2:
            time.sleep(0.01)
        for _ in range(3):  # the first one counts, the others do nothing more
            os.kill(started.main, signal.SIGTERM)
            time.sleep(0.1)
        assert started.wait() == [75]
        assert "ckd: stopped as asked at step 1 of 30" in started.printed, started.printed
    assert (directory / "ckd/checkpoints/step-00000001/COMPLETE.json").exists() and not (directory / "STOP").exists()


@pytest.mark.serial
@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(embedded_copy):
    """One rank is stopped, so that the others wait for it, and the first Ctrl-C cannot be obeyed."""
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
@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "file"])
def test_precompute_stops_soon_leaves_nothing_half_written_and_goes_on(tmp_path, how):
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


def take_part(folder, number, size, act, results):
    watch = Watch(folder, number, size)
    results.put((number, act(watch)))


def in_processes(folder, *acts):
    """The results of `acts`, of one rank each, which run side by side in processes of their own."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=take_part, args=(folder, n, len(acts), act, results)) for n, act in enumerate(acts)]
    for process in processes:
        process.start()
    return processes, results


def test_of_many_ranks_one_says_what_happened(tmp_path):
    _, results = in_processes(tmp_path, *[lambda watch: (watch.say(watch.rank + 3), watch.said)] * 8)
    found = dict(results.get(timeout=hang_limit()) for _ in range(8))
    assert sorted(said for said, _ in found.values()) == [False] * 7 + [True]
    (speaker,) = [number for number, (said, _) in found.items() if said]
    assert {code for _, code in found.values()} == {speaker + 3}


def test_of_many_ranks_that_find_one_stopped_one_says_so_and_none_that_it_was_killed(tmp_path):
    def stop_or_diagnose(watch: Watch) -> str:
        if watch.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        return watch.diagnose("Timed out waiting", 60)

    (stopped, *_), results = in_processes(tmp_path, *[stop_or_diagnose] * 8)
    said = sorted(message for _, message in (results.get(timeout=SILENCE + starts(1)) for _ in range(7)))
    assert said[:6] == [""] * 6 and "lost rank 0" in said[6] and "stopped (SIGSTOP)" in said[6], said
    stopped.join(starts(1))
    assert stopped.exitcode == -signal.SIGKILL


def test_a_rank_that_works_longer_than_the_timeout_is_told_from_one_that_hangs(tmp_path):
    processes, results = in_processes(
        tmp_path, lambda watch: time.sleep(60), lambda watch: watch.diagnose("Timed out waiting", 60)
    )
    number, message = results.get(timeout=SILENCE + starts(1))
    assert number == 1 and f"rank 1 has waited 60 s (engine.timeout) for rank 0 (pid {processes[0].pid}" in message
    assert "still runs" in message and processes[0].is_alive()
    processes[0].kill()


def test_a_rank_on_another_machine_whose_heart_has_stopped_is_named(tmp_path):
    elsewhere = this_process() | {"host": "node7", "pid": 4711, "rank": 1, "is_left": False, "beat": 1}
    (tmp_path / "1.json").write_text(json.dumps(elsewhere))
    watch = Watch(tmp_path, 0, 2)
    message = watch.diagnose("Timed out waiting", 60)
    watch.close()
    assert "lost rank 1 (pid 4711 on node7): no heartbeat" in message


def test_a_rank_that_hangs_ends_once_another_has_said_why(tmp_path):
    (hanging, _), results = in_processes(tmp_path, lambda watch: time.sleep(60), lambda watch: watch.say(7))
    assert results.get(timeout=hang_limit()) == (1, True)
    hanging.join(PATIENCE + starts(1))
    assert hanging.exitcode == 7
