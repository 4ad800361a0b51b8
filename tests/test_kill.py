"""Law 3: kill -9 at any moment, then the same command: the result is that of the run that was never interrupted."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from commands import command, kill_group_when, launch
from conftest import write_config

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
