"""Law 3: kill -9 at any moment, then the same command: the result is that of the run that was never interrupted."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
from commands import command, kill_group_when, launch
from conftest import write_config
from engines import CPU, start_deepspeed
from ranks import on_ranks, start_ranks

from distill.config import load_config
from distill.objectives.queue import KeyQueue
from distill.teacher.precompute import run_precompute
from distill.training import checkpoint
from distill.training.distributed import rank
from distill.training.stage import run_stage

pytestmark = pytest.mark.slow
OVERRIDES = ["stages=[precompute, ckd]", "ckd.max_steps=40", "ckd.epochs=10", "ckd.dev_every=8", "ckd.save_every=8"]


def student_digest(run: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((run / "ckd/student").glob("*.safetensors"))
    }


def shard_digests(run: Path) -> dict[str, str]:
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(run.glob("shards/**/*.tar"))}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_encoder):
    folder = tmp_path_factory.mktemp("whole")
    done = launch("pipeline.py", "--config", write_config(folder, tiny_encoder), *OVERRIDES)
    assert done.returncode == 0, done.stdout
    return folder / "runs/tiny"


def test_killed_in_precompute_and_twice_in_ckd_ends_bit_for_bit_the_same(tmp_path, tiny_encoder, uninterrupted):
    config, run = write_config(tmp_path, tiny_encoder), tmp_path / "runs/tiny"
    pipeline = command("pipeline.py", "--config", config, *OVERRIDES)
    kill_group_when(pipeline, lambda: (run / "shards/000000.tar").exists())
    assert not (run / "precompute/DONE.json").exists()
    for step in (8, 24):
        kill_group_when(pipeline, lambda step=step: (run / f"ckd/checkpoints/step-{step:08d}").exists())
        assert not (run / "ckd/DONE.json").exists()
    finished = launch("pipeline.py", "--config", config, *OVERRIDES)
    assert finished.returncode == 0, finished.stdout
    assert "continuing after step" in finished.stdout
    assert shard_digests(run) == shard_digests(uninterrupted)
    assert student_digest(run) == student_digest(uninterrupted) and student_digest(run)


MOMENTS = {
    "at any time": None,
    "in the push": (KeyQueue, "push"),
    "in the writing": (checkpoint, "write_tensors"),
    "in the commit": (checkpoint, "_delete"),
}


def train(config, overrides, moment="at any time", victim=0, calls=1):
    """A CKD run on this rank; the victim kills itself in the so-manieth call of what the moment names, a file half-written."""
    start_deepspeed()
    place = MOMENTS[moment]
    if place is not None and rank() == victim:
        done = getattr(*place)
        left = iter(range(calls - 1, -1, -1))

        def fatal(*arguments):
            if next(left, 1) == 0:
                if moment == "in the writing":
                    file, tensors = arguments
                    done(file, dict(list(tensors.items())[: len(tensors) // 2]))
                    file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return done(*arguments)

        setattr(*place, fatal)
    run_stage(load_config(config, overrides), "ckd", CPU)


def kill_once(config, overrides, run, moment, draw):
    """Starts two ranks and kills them: both at once, or one and then the other. Returns whether they lived to be killed."""
    victim = 0 if moment == "in the commit" else draw.randrange(2)
    logs = len(list((run / "tensorboard/ckd").glob("*")))
    processes, pipes = start_ranks(2, train, config, overrides, moment, victim, draw.randint(1, 2))
    deadline = time.monotonic() + 60
    if moment == "at any time":
        while len(list((run / "tensorboard/ckd").glob("*"))) == logs and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.3))
        processes[victim].kill()
    else:
        processes[victim].join(deadline - time.monotonic())
    time.sleep(draw.choice([0, 0, draw.uniform(0, 0.05)]))
    for process in processes:
        process.kill()
        process.join()
    for pipe in pipes:
        pipe.close()
    return processes[victim].exitcode == -signal.SIGKILL


def test_killed_in_a_step_a_push_or_a_checkpoint_it_ends_bit_for_bit_the_same(tmp_path, tiny_encoder, full):
    kills = 30 if full else 5
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    draw = random.Random(seed)
    config = write_config(tmp_path, tiny_encoder)
    assert run_precompute(load_config(config), CPU, None)
    overrides = [f"ckd.max_steps={24 + 10 * kills}", "ckd.epochs=100", "ckd.dev_every=16", "ckd.save_every=4"]
    overrides.append("shards_from=tiny")
    killed, straight = tmp_path / "runs/killed", tmp_path / "runs/straight"
    on_ranks(2, train, config, [*overrides, "name=straight"])
    for number in range(kills):
        if number % len(MOMENTS) == 0:
            moments = draw.sample(list(MOMENTS), len(MOMENTS))
        moment = moments[number % len(MOMENTS)]
        assert kill_once(config, [*overrides, "name=killed"], killed, moment, draw), moment
    on_ranks(2, train, config, [*overrides, "name=killed"])
    assert student_digest(killed) == student_digest(straight) and student_digest(killed)
    assert not list(killed.rglob("*.part"))
