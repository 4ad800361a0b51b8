"""The teacher's own line on STS-B's dev set, which no stage depends on."""

from __future__ import annotations

import json

import numpy as np
import torch
from conftest import write_config, write_pairs

from distill.config import load_config
from distill.teacher.dev import TEACHER_DEV, keep_dev_score

CPU = torch.device("cpu")


def config_with(sts, folder, encoder):
    config = load_config(write_config(folder, encoder), [f"evaluate.sts={sts}"])
    config.precompute_dir.mkdir(parents=True, exist_ok=True)
    return config


def draw(sentences):
    return np.random.default_rng(len(sentences)).normal(size=(len(sentences), 8)).astype(np.float32)


def test_a_score_is_kept_once_for_each_set(tmp_path, tiny_encoder):
    calls = []

    def encode(sentences):
        calls.append(len(sentences))
        return draw(sentences)

    for name in ("one", "other"):
        config = config_with(write_pairs(tmp_path / name, "stsb_dev"), tmp_path, tiny_encoder)
        for _ in range(2):
            keep_dev_score(config, encode, CPU)
        assert json.loads((config.precompute_dir / TEACHER_DEV).read_text())["sts"] == config.evaluate.sts
    assert len(calls) == 2


def test_a_set_that_cannot_be_read_costs_a_line_and_no_stage(tmp_path, tiny_encoder, capsys):
    (tmp_path / "sts").mkdir()
    (tmp_path / "sts/stsb_dev.tsv.gz").write_bytes(b"not gzip")
    config = config_with(tmp_path / "sts", tmp_path, tiny_encoder)
    keep_dev_score(config, draw, CPU)
    assert "without the teacher's own line" in capsys.readouterr().err
    assert not (config.precompute_dir / TEACHER_DEV).exists()
