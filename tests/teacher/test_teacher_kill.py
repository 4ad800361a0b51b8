"""Invariant 3 for precompute: any number of tasks, killed at any moment, leave the set that one task makes without a kill."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import time

import pytest
from commands import ROOT, command, environment, launch
from conftest import make_encoder, sentences, write_config
from reference_times import hang_limit

from distill.config import load_config
from distill.shards import verify_all


def set_of(config):
    shards = config.run_dir / "shards"
    files = [path for path in sorted(shards.rglob("*")) if path.is_file() and path.name[0] != "."]
    return {str(path.relative_to(shards)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def begin(path, count):
    """Starts `count` tasks of one thread each, each in its own process group."""
    return [
        subprocess.Popen(
            command("precompute.py", "--config", path),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
            cwd=ROOT,
            start_new_session=True,
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("wanted", [pytest.param(5, marks=pytest.mark.slow), pytest.param(30, marks=pytest.mark.soak)])
def test_tasks_killed_at_random_moments_leave_the_same_set(tmp_path, wanted):
    encoder = make_encoder(tmp_path / "encoder", layers=6, width=64)
    draw = random.Random(7)
    configs = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text("\n".join(sentences(4000)) + "\n")
        configs.append(
            write_config(
                tmp_path / name,
                encoder,
                teacher=f"{{model: {encoder}, pooling: mean, max_length: 32, precision: fp32, tokens_per_batch: 64}}",
                shards="{rows: 40, block_rows: 16}",
            )
        )
    whole, killed = map(load_config, configs)
    assert launch("precompute.py", "--config", configs[0]).returncode == 0

    kills, moments = 0, []
    while kills < wanted:
        assert not (killed.run_dir / "precompute/DONE.json").exists(), f"done after {kills} kills; the text is too short"
        made = len(list(killed.run_dir.glob("shards/*.tar")))
        tasks = begin(configs[1], draw.randint(1, 3))
        if draw.random() < 0.8:  # else in the first seconds: while loading, or cutting the text
            deadline = time.monotonic() + hang_limit()
            while not list(killed.run_dir.glob("shards/.*.claim")) or len(list(killed.run_dir.glob("shards/*.tar"))) == made:
                assert time.monotonic() < deadline and any(task.poll() is None for task in tasks)
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.15))
        else:
            time.sleep(draw.uniform(0, 4))
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, signal.SIGKILL)
                kills += 1
            task.wait()
        moments.append(len(list(killed.run_dir.glob("shards/*.tar"))))
    assert len(set(moments)) > 1, "every round of kills found the same number of finished shards"
    assert list(killed.run_dir.glob("shards/.*.claim")) or list(killed.run_dir.glob("shards/.*.part")), (
        "the last kill interrupted no task"
    )
    survivors = begin(configs[1], 2)
    assert [task.wait(hang_limit()) for task in survivors] == [0, 0]
    if not (killed.run_dir / "precompute/DONE.json").exists():  # both may leave the last shard to the other
        assert launch("precompute.py", "--config", configs[1]).returncode == 0
    assert set_of(killed) == set_of(whole)
    assert verify_all(killed.run_dir / "shards") == []
