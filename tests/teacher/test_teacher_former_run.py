"""The shards of a run that an earlier version made can be used, after verification; nothing else of such a run is continued.

former_run/ is the run directory of commit 2611097: 40 texts, precomputed vectors of 8 dimensions, shards of 20 rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.config import load_config, stage_of
from distill.shards import ShardReader, verify_all

CPU = torch.device("cpu")
FORMER = Path(__file__).with_name("former_run")


@pytest.fixture
def former(tmp_path):
    return Path(shutil.copytree(FORMER, tmp_path / "runs/former_run"))


def config_of(tmp_path, *overrides, name="new", shards_from="former_run"):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"name: {name}\nruns_dir: {tmp_path}/runs\ntext: {{sources: [text.txt], min_chars: 12, max_chars: 1000}}\n"
        "teacher: {vectors: vectors.npy}\nshards: {rows: 20, block_rows: 8}\nstudent: {init: owner/encoder}\n"
    )
    return load_config(path, [*([f"shards_from={shards_from}"] if shards_from else []), *overrides])


def content_of(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_byte_of_former_shards_is_still_read_as_it_was_written():
    training, held_out = ShardReader(FORMER / "shards"), ShardReader(FORMER / "shards/held_out")
    assert verify_all(FORMER / "shards") == [] == verify_all(FORMER / "shards/held_out")
    assert len(training) + len(held_out) == 40 and training.dim == 8
    assert np.allclose(np.linalg.norm(training.vectors(np.arange(len(training))).astype(np.float32), axis=1), 1, atol=1e-3)


@pytest.mark.parametrize("by_path", [False, True])
def test_former_shards_are_verified_once_and_used_by_name_or_directory(former, tmp_path, by_path):
    before = content_of(former)
    config = config_of(tmp_path, shards_from=str(former) if by_path else "former_run")
    stage = stage_of(config, "precompute")
    assert stage.reason_to_run() == "its shards are of an earlier version: to be verified"
    assert stage.run(CPU)
    assert stage.reason_to_run() is None
    assert (
        stage_of(config, "ckd").inputs()["shards"] == hashlib.sha256((former / "shards/manifest.json").read_bytes()).hexdigest()
    )
    assert content_of(former) == before


def test_changed_text_settings_are_a_warning(former, tmp_path, caplog):
    for overrides, warnings in (((), 0), (("text.min_chars=20",), 1)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert stage_of(config_of(tmp_path, *overrides), "precompute").run(CPU)
        assert len(caplog.records) == warnings
    assert "text.min_chars: 12 -> 20" in caplog.text


def test_the_pipelines_first_step_verifies_former_shards(former, tmp_path):
    """The pipeline calls `prepare` in a process of its own, and then `run` in others."""
    before = content_of(former)
    stage = stage_of(config_of(tmp_path), "precompute")
    stage.prepare()
    assert stage.reason_to_run() is None and content_of(former) == before


def test_former_shards_that_changed_after_they_were_verified_are_verified_again(former, tmp_path):
    stage = stage_of(config_of(tmp_path), "precompute")
    assert stage.run(CPU)
    verified = tmp_path / "runs/new/shards_verified.json"
    verified.write_text(json.dumps({"manifest": "another"}))
    assert "to be verified" in stage.reason_to_run()


@pytest.mark.parametrize("name", ["shards/000001.tar", "shards/held_out/000000.tar"])
def test_damaged_former_shards_are_refused_by_name(former, tmp_path, name):
    data = bytearray((former / name).read_bytes())
    data[700] ^= 1
    (former / name).write_bytes(data)
    config = config_of(tmp_path)
    with pytest.raises(ValueError, match=rf"former_run/shards cannot be used: {Path(name).name}: block 0"):
        stage_of(config, "precompute").run(CPU)
    assert stage_of(config, "precompute").reason_to_run() is not None


def test_former_shards_of_another_teacher_are_refused(former, tmp_path):
    config = config_of(tmp_path, "teacher.vectors=other.npy")
    with pytest.raises(
        ValueError, match=r"another teacher \(teacher\.vectors: 'vectors\.npy' in the shards, 'other\.npy' in the config"
    ):
        stage_of(config, "precompute").run(CPU)


def test_a_former_precompute_is_not_continued_under_its_own_name(former, tmp_path):
    before = content_of(former)
    config = config_of(tmp_path, name="former_run", shards_from=None)
    assert (
        stage_of(config, "precompute").reason_to_run().endswith("precompute was written by an earlier version of this program")
    )
    with pytest.raises(
        ValueError, match=r"precompute was written by an earlier version.*under another name= with shards_from=former_run"
    ):
        stage_of(config, "precompute").run(CPU)
    assert before.items() <= content_of(former).items()


def test_an_unfinished_former_precompute_is_refused(former, tmp_path):
    (former / "precompute/DONE.json").unlink()
    before = content_of(former)
    with pytest.raises(ValueError, match=r"precompute was written by an earlier version"):
        stage_of(config_of(tmp_path), "precompute").run(CPU)
    assert before.items() <= content_of(former).items()


def test_an_unfinished_former_training_stage_is_refused(former, tmp_path):
    shutil.copytree(former / "precompute", former / "ckd")
    (former / "ckd/DONE.json").unlink()
    (former / "ckd/checkpoints/step-00000001").mkdir(parents=True)
    (former / "ckd/checkpoints/step-00000001/COMPLETE.json").touch()
    with pytest.raises(ValueError, match=r"former_run/ckd holds an unfinished ckd .*written by an earlier version"):
        stage_of(config_of(tmp_path, name="former_run", shards_from=None), "ckd").begin()
