"""Fine-tuning reads triplets from a file or a dataset alike."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import write_config

from distill.config import load_config
from distill.shards import ShardReader
from distill.teacher.precompute import run_precompute
from distill.training.rows import load_triplets

ROWS = [{"anchor": f"anchor {i}", "positive": f"positive {i}", "hard_negative": f"negative {i}"} for i in range(5)]


@pytest.fixture(scope="module")
def config_path(tmp_path_factory, tiny_encoder):
    folder = tmp_path_factory.mktemp("run")
    path = write_config(folder, tiny_encoder)
    assert run_precompute(load_config(path), torch.device("cpu"), None)
    (folder / "data").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "triplets.jsonl").write_text(lines)
    (folder / "data" / "train.jsonl").write_text(lines)
    return path


@pytest.mark.parametrize("key, name", [("triplets", "triplets.jsonl"), ("dataset", "data")])
def test_a_file_and_a_dataset_give_the_same_triplets(config_path, tmp_path, key, name):
    config = load_config(config_path, [f"finetune.{key}={config_path.parent / name}"])
    triplets = load_triplets(config, ShardReader(config.run_dir / "shards"), tmp_path)
    assert triplets.sentences == [tuple(row.values()) for row in ROWS]
    assert triplets.views([4, 0])[1] == ["positive 4", "positive 0"]
    fewer = load_config(config_path, [f"finetune.{key}={config_path.parent / name}", "finetune.limit=2"])
    assert load_triplets(fewer, ShardReader(config.shards_dir), tmp_path).sentences == triplets.sentences[:2]


def test_mined_triplets_are_sentences_of_the_shards(config_path, tmp_path):
    config = load_config(config_path)
    reader = ShardReader(config.run_dir / "shards")
    triplets = load_triplets(config, reader, tmp_path)
    known = set(reader.texts(range(len(reader))))
    assert len(triplets.sentences) == 64
    assert all(len(set(triplet)) == 3 and known.issuperset(triplet) for triplet in triplets.sentences)
