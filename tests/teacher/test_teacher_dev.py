"""The teacher's score on STS-B's dev set, which no stage depends on."""

from __future__ import annotations

import json
import logging

import numpy as np
import torch
from conftest import write_pairs

from distill.teacher.dev_score import TEACHER_DEV, lacks_dev_score, read_dev_score, write_dev_score

CPU = torch.device("cpu")


def draw(texts):
    return np.random.default_rng(len(texts)).normal(size=(len(texts), 8)).astype(np.float32)


def test_a_score_is_computed_once_for_each_set(tmp_path):
    calls = []

    def encode(texts):
        calls.append(len(texts))
        return draw(texts)

    for name in ("one", "other"):
        sts = str(write_pairs(tmp_path / name, "stsb_dev"))
        for _ in range(2):
            write_dev_score(tmp_path, sts, encode, CPU)
        assert json.loads((tmp_path / TEACHER_DEV).read_text())["sts"] == sts
    assert len(calls) == 2


def test_another_content_of_the_set_is_another_score(tmp_path):
    path = write_pairs(tmp_path / "sts", "stsb_dev") / "stsb_dev.tsv.gz"
    sts = str(path.parent)
    write_dev_score(tmp_path, sts, draw, CPU)
    assert read_dev_score(tmp_path, sts) == json.loads((tmp_path / TEACHER_DEV).read_text())["STSB-dev"]
    write_pairs(tmp_path / "sts", "stsb_dev", count=50)
    assert lacks_dev_score(tmp_path, sts) and read_dev_score(tmp_path, sts) is None
    write_dev_score(tmp_path, sts, draw, CPU)
    assert not lacks_dev_score(tmp_path, sts) and lacks_dev_score(tmp_path, str(tmp_path))


def test_a_set_that_cannot_be_read_is_a_warning_and_no_error(tmp_path, caplog):
    (tmp_path / "sts").mkdir()
    (tmp_path / "sts/stsb_dev.tsv.gz").write_bytes(b"not gzip")
    with caplog.at_level(logging.WARNING):
        write_dev_score(tmp_path, str(tmp_path / "sts"), draw, CPU)
    assert "no teacher score on STS-B's dev set" in caplog.text
    assert not (tmp_path / TEACHER_DEV).exists()
