"""Fine-tuning reads triplets from a file or a dataset alike, or mines them; and what it refuses before it begins."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import write_config
from engines import CPU, embed_text

from distill.config import load_config, stage_of
from distill.run.files import read_json
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


@pytest.mark.parametrize("key, name", [("triplets", "null/triplets.jsonl"), ("dataset", "null")])
@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_triplet_that_lacks_a_text_is_refused_by_its_line(config_path, tmp_path, key, name, value):
    (tmp_path / "null").mkdir()
    lines = [json.dumps(row) for row in [*ROWS, ROWS[0] | {"hard_negative": value}]]
    (tmp_path / "null/triplets.jsonl").write_text("\n".join(lines) + "\n")
    config = load_config(config_path, [f"finetune.{key}={tmp_path / name}"])
    place = "line 6" if key == "triplets" else "row 6"
    with pytest.raises(ValueError, match=rf"finetune\.{key}: .*{name}, {place}: 'hard_negative' is empty or null"):
        load_triplets(config.finetune, ShardReader(config.shards_dir), tmp_path, 0)


def test_mined_triplets_are_texts_of_the_shards(config_path, tmp_path):
    config = load_config(config_path)
    reader = ShardReader(config.shards_dir)
    triplets = load_triplets(config.finetune, reader, tmp_path, 0)
    known = set(reader.texts(range(len(reader))))
    assert len(triplets.triplets) == 64
    assert all(len(set(triplet)) == 3 and known.issuperset(triplet) for triplet in triplets.triplets)


def test_mined_triplets_are_read_again_and_made_again_where_they_are_damaged(config_path, tmp_path, caplog):
    config = load_config(config_path)
    reader, path = ShardReader(config.shards_dir), tmp_path / "triplets.npy"
    triplets = load_triplets(config.finetune, reader, tmp_path, 0).triplets
    written = path.stat().st_mtime_ns
    load_triplets(config.finetune, reader, tmp_path, 0)
    assert path.stat().st_mtime_ns == written
    rows = np.load(path)
    rows[0, 0] += 1
    np.save(path, rows)
    assert load_triplets(config.finetune, reader, tmp_path, 0).triplets == triplets
    assert f"{path} is damaged (it does not match its checksum)" in caplog.text
    assert np.array_equal(np.load(tmp_path / "triplets.npy.damaged"), rows)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["finetune.triplets=away.jsonl"], "finetune.triplets: no file at away.jsonl"),
        (["finetune.fields=[anchor, positive, negative]"], "line 1: no field 'negative'"),
    ],
)
def test_triplets_that_cannot_be_read_are_refused_before_anything_expensive(config_path, overrides, message):
    given = [f"finetune.triplets={config_path.parent / 'triplets.jsonl'}", "finetune.init=student", *overrides]
    with pytest.raises(ValueError, match=message):
        stage_of(load_config(config_path, given), "finetune").check_inputs()


def test_a_dataset_is_an_input_by_its_name_subset_and_split_and_its_commit_or_content(config_path, monkeypatch):
    def dataset(*overrides):
        return stage_of(load_config(config_path, [*overrides]), "finetune").inputs()["dataset"]

    monkeypatch.setattr("distill.corpus.sources.dataset_commit", {"owner/pairs": "c0ffee"}.get)
    assert dataset("finetune.dataset=owner/pairs") == "owner/pairs@default/train c0ffee"
    other = ("finetune.subset=en", "finetune.split=dev", "finetune.revision=v2")
    assert dataset("finetune.dataset=owner/pairs", *other) == "owner/pairs@en/dev v2"
    folder = config_path.parent / "data"
    before = dataset(f"finetune.dataset={folder}")
    (folder / "train.jsonl").write_text((folder / "train.jsonl").read_text() + "\n")
    assert dataset(f"finetune.dataset={folder}") != before


def test_a_dataset_that_was_read_without_the_hub_is_the_same_input_once_it_is_reached(config_path, monkeypatch):
    overrides = ["name=offline", "shards_from=tiny", "finetune.init=student", "finetune.dataset=owner/pairs"]
    stage, commits = stage_of(load_config(config_path, overrides), "finetune"), {"owner/pairs": ""}
    monkeypatch.setattr("distill.corpus.sources.dataset_commit", commits.get)
    stage.begin()
    commits["owner/pairs"] = "c0ffee"
    assert stage.changes_since(read_json(stage.directory / "BEGUN.json")) == []


def test_a_dataset_that_moves_on_is_read_at_the_commit_at_which_the_stage_began(config_path, monkeypatch):
    config = load_config(
        config_path, ["name=moving", "shards_from=tiny", "finetune.init=student", "finetune.dataset=owner/pairs"]
    )
    stage = stage_of(config, "finetune")
    commits = {"owner/pairs": "c0ffee"}
    monkeypatch.setattr("distill.corpus.sources.dataset_commit", commits.get)
    stage.begin()
    commits["owner/pairs"] = "decade"
    assert stage.changes_since(read_json(stage.directory / "BEGUN.json")) == []
    asked = []

    def read_dataset(name, fields, split, subset, revision):
        asked.append(revision)
        return iter([("a", "b", "c")] * 40)

    monkeypatch.setattr("distill.training.tasks.finetune.read_dataset", read_dataset)
    stage.build(stage.setup(CPU, None))
    assert asked == ["c0ffee"]
