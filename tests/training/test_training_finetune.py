"""Fine-tuning reads triplets from a file or a dataset alike."""

from __future__ import annotations

import json

import pytest
from conftest import write_config
from engines import embed_text

from distill.config import load_config
from distill.shards import ShardReader
from distill.training.tasks.finetune import load_triplets

ROWS = [{"anchor": f"anchor {i}", "positive": f"positive {i}", "hard_negative": f"negative {i}"} for i in range(5)]


@pytest.fixture(scope="module")
def config_path(tmp_path_factory, tiny_encoder):
    folder = tmp_path_factory.mktemp("run")
    path = embed_text(write_config(folder, tiny_encoder))
    (folder / "data").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "triplets.jsonl").write_text(lines)
    (folder / "data" / "train.jsonl").write_text(lines)
    return path


@pytest.mark.parametrize("key, name", [("triplets", "triplets.jsonl"), ("dataset", "data")])
def test_a_file_and_a_dataset_give_the_same_triplets(config_path, tmp_path, key, name):
    config = load_config(config_path, [f"finetune.{key}={config_path.parent / name}"])
    triplets = load_triplets(config.finetune, ShardReader(config.shards_dir), tmp_path, 0)
    assert triplets.triplets == [tuple(row.values()) for row in ROWS]
    assert triplets.views([4, 0])[1] == ["positive 4", "positive 0"]
    fewer = load_config(config_path, [f"finetune.{key}={config_path.parent / name}", "finetune.limit=2"])
    assert load_triplets(fewer.finetune, ShardReader(config.shards_dir), tmp_path, 0).triplets == triplets.triplets[:2]


def test_mined_triplets_are_texts_of_the_shards(config_path, tmp_path):
    config = load_config(config_path)
    reader = ShardReader(config.shards_dir)
    triplets = load_triplets(config.finetune, reader, tmp_path, 0)
    known = set(reader.texts(range(len(reader))))
    assert len(triplets.triplets) == 64
    assert all(len(set(triplet)) == 3 and known.issuperset(triplet) for triplet in triplets.triplets)
