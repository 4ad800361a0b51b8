"""The commands that a pipeline starts for precompute, and how it waits for tasks that others have started."""

from __future__ import annotations

import argparse
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import write_config

from distill.config import load_config
from distill.run.stopping import StopRequest
from distill.teacher.claims import Claims
from launcher import command
from launcher import pipeline as module
from launcher.pipeline import Pipeline, Signals


@pytest.fixture
def pipeline(tmp_path, tiny_encoder, monkeypatch):
    """Makes a Pipeline that records its commands in `.started` instead of running them."""
    config, started = write_config(tmp_path, tiny_encoder), []

    def make(*overrides: str, srun: bool = False) -> SimpleNamespace:
        def run_all(self, commands, signals, **options) -> int:
            started.append((commands, options.get("environments")))
            return 0

        monkeypatch.setattr(Pipeline, "run_all", run_all)
        loaded = load_config(config, list(overrides))
        arguments = argparse.Namespace(config=str(config), overrides=list(overrides), srun=srun, traceback=False)
        signals = Signals(StopRequest(loaded.run_dir / "STOP"))
        return SimpleNamespace(config=loaded, made=Pipeline(loaded, arguments), signals=signals, started=started)

    return make


@pytest.mark.parametrize(
    "overrides, tasks",
    [
        ([], 4),
        (["teacher.placement=auto"], 1),
        (["teacher.placement=zero3"], 3),
    ],
)
def test_srun_starts_a_task_per_gpu_or_one_per_node_for_a_teacher_over_all_gpus(pipeline, monkeypatch, overrides, tasks):
    monkeypatch.setattr(module, "num_gpus", lambda: 4)
    monkeypatch.setattr(module, "ranks_per_node", lambda config: 3)
    for name, value in {"SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "12"}.items():
        monkeypatch.setenv(name, value)
    run = pipeline(*overrides, srun=True)
    assert run.made.run_tasks(["precompute.py"], 12, run.signals) == 0
    ((words,),) = [commands for commands, _ in run.started]
    assert {"--nodes=2", f"--ntasks={2 * tasks}", f"--ntasks-per-node={tasks}", f"--cpus-per-task={12 // tasks}"} <= set(words)


@pytest.mark.parametrize(
    "overrides, tasks",
    [(["teacher.tasks=3"], 3), (["teacher.tasks=3", "teacher.placement=auto"], 1), (["teacher.placement=zero3"], 2)],
)
def test_without_srun_they_are_started_here(pipeline, overrides, tasks):
    run = pipeline(*overrides)
    assert run.made.run_tasks(["precompute.py"], 12, run.signals) == 0
    ((commands, environments),) = run.started
    assert len(commands) == len(environments) == tasks
    assert all(("WORLD_SIZE" in each) == ("teacher.placement=zero3" in overrides) for each in environments)


@pytest.fixture
def claimed(pipeline):
    """A pipeline whose text is cut, and the claims of a task of another command on all shards."""
    run = pipeline()
    stage = run.config.stage_of("precompute")
    stage.prepare()
    claims = Claims()
    assert all(claims.take(claim) for claim in make_folders(stage.missing_shards()))
    return run, claims, stage


def make_folders(claims):
    for claim in claims:
        claim.parent.mkdir(parents=True, exist_ok=True)
    return claims


def test_it_waits_for_tasks_of_another_command_and_then_continues(claimed, capsys):
    run, claims, stage = claimed
    waits = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        if len(waits) == 3:
            for claim in stage.missing_shards():
                claims.release(claim)
            assert stage.run(torch.device("cpu"))
        return False

    run.signals.stop.wait = wait
    assert run.made.precompute([], 2, run.signals) == 0
    assert len(waits) == 3 and len(run.started) == 2  # the text, and its own tasks, which found nothing to do
    assert capsys.readouterr().out.count("waiting for 4 shards that tasks of another command make") == 1


def test_it_makes_what_they_leave_out_when_they_are_killed(claimed):
    run, claims, stage = claimed
    for claim in stage.missing_shards():
        claims.release(claim)
    held = [claim for claim in stage.missing_shards() if claims.take(claim)][:1]
    for claim in stage.missing_shards()[1:]:
        claims.release(claim)

    def run_all(self, commands, signals, **options) -> int:
        run.started.append((commands, None))
        if len(run.started) == 3:  # the text, tasks that leave the last shard to another one, tasks after its end
            claims.release(held[0])
            assert stage.run(torch.device("cpu"))
        return 0

    run.made.__class__.run_all = run_all
    assert run.made.precompute([], 2, run.signals) == 0 and len(run.started) == 3


def test_a_stop_ends_the_wait(claimed):
    run, *_ = claimed
    run.signals.on_signal(signal.SIGTERM)
    assert run.made.precompute([], 2, run.signals) == command.STOPPED


def test_the_file_of_a_pipeline_that_was_killed_does_not_stop_the_next(pipeline, capsys):
    run = pipeline("stages=[precompute]")
    run.config.run_dir.mkdir(parents=True)
    StopRequest(run.config.run_dir / "STOP").pass_on()
    assert run.config.stage_of("precompute").run(torch.device("cpu"))
    assert run.made.run_stages() == 0
    printed = capsys.readouterr()
    assert "nothing to do" in printed.out and f"removed {run.config.run_dir / 'STOP'}" in printed.err


def test_commands_know_that_a_pipeline_has_started_them(tmp_path, tiny_encoder):
    config = load_config(write_config(tmp_path, tiny_encoder))
    made = Pipeline(config, argparse.Namespace(srun=False))
    signals = Signals(StopRequest())
    assert made.run_all([["sh", "-c", f'test "${command.IN_PIPELINE}" = 1']], signals, threads=1) == 0
    assert command.IN_PIPELINE not in os.environ
