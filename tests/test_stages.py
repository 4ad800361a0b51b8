"""A stage runs when, and only when, what it depends on has changed; the reason is named."""

from __future__ import annotations

import pytest
import torch
from conftest import sentences, write_config

from distill.config import load_config
from distill.files import write_json
from distill.stages import Stage, differences, fingerprint_of, open_run, read_json, source_files, stage_of
from distill.teacher.precompute import run_precompute


def stage(tmp_path, config=None, inputs=None):
    return Stage("ckd", tmp_path / "run/ckd", config or {"ckd": {"lr": 0.1}}, inputs or {"shards": "abc"})


def test_a_stage_says_not_run_yet_then_unfinished_then_nothing(tmp_path):
    ours = stage(tmp_path)
    assert ours.reason_to_run() == "not run yet"
    ours.begin()
    assert ours.reason_to_run() == "unfinished"
    ours.finish({"steps": 3}, "made")
    assert ours.reason_to_run() is None
    assert fingerprint_of(ours.directory) == "made"
    assert read_json(ours.directory / "DONE.json")["results"] == {"steps": 3}


def test_a_changed_config_is_named_by_its_key_and_both_values(tmp_path):
    stage(tmp_path).begin()
    stage(tmp_path).finish({}, "made")
    assert stage(tmp_path, {"ckd": {"lr": 0.2}}).reason_to_run() == "ckd.lr: 0.1 -> 0.2"


def test_a_changed_input_is_named(tmp_path):
    stage(tmp_path).begin()
    stage(tmp_path).finish({}, "made")
    assert stage(tmp_path, inputs={"shards": "xyz"}).reason_to_run() == "input shards changed"


def test_begin_refuses_an_unfinished_stage_of_another_config_and_leaves_it_alone(tmp_path):
    stage(tmp_path).begin()
    (tmp_path / "run/ckd/work").write_text("an hour's")
    with pytest.raises(ValueError, match=r"unfinished ckd of another config \(ckd\.lr: 0\.1 -> 0\.2\)"):
        stage(tmp_path, {"ckd": {"lr": 0.2}}).begin()
    assert (tmp_path / "run/ckd/work").read_text() == "an hour's"


def test_an_unfinished_stage_goes_on_with_other_dev_evaluations_and_a_finished_one_runs_again(tmp_path):
    stage(tmp_path, {"ckd": {"dev_every": 4}}).begin()
    often = stage(tmp_path, {"ckd": {"dev_every": 1}})
    often.begin()
    assert read_json(often.directory / "BEGUN.json")["config"] == {"ckd": {"dev_every": 1}}
    often.finish({}, "made")
    assert stage(tmp_path, {"ckd": {"dev_every": 2}}).reason_to_run() == "ckd.dev_every: 1 -> 2"


def test_begin_keeps_an_unfinished_stage_of_this_config_and_clears_a_finished_one(tmp_path):
    ours = stage(tmp_path)
    ours.begin()
    (ours.directory / "work").write_text("an hour's")
    ours.begin()
    assert (ours.directory / "work").exists()
    ours.finish({}, "made")
    stage(tmp_path, {"ckd": {"lr": 0.2}}).begin()
    assert {path.name for path in (tmp_path / "run").rglob("*")} == {"ckd", "BEGUN.json"}


@pytest.mark.parametrize("left", [["checkpoint"], ["checkpoint", "DONE.json"], []])
def test_a_folder_without_begun_json_is_never_continued(tmp_path, left):
    """It is what is left of a stage whose clearing was killed."""
    ours = stage(tmp_path)
    ours.begin()
    ours.finish({}, "made")
    (ours.directory / "BEGUN.json").unlink()
    (ours.directory / "checkpoint").touch()
    for path in ours.directory.iterdir():
        if path.name not in left:
            path.unlink()
    stage(tmp_path, {"ckd": {"lr": 0.2}}).begin()
    assert [path.name for path in ours.directory.iterdir()] == ["BEGUN.json"]


def test_what_a_killed_clearing_left_is_swept(tmp_path):
    cleared = tmp_path / "run/.ckd.cleared"
    cleared.mkdir(parents=True)
    (cleared / "DONE.json").touch()
    stage(tmp_path).begin()
    assert not cleared.exists()


@pytest.mark.parametrize(
    "old, new, found",
    [
        ({"a": {"b": 1}}, {"a": {"b": 1}}, []),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, ["a.b: 1 -> 2"]),
        ({"a": {"b": 1}}, {"a": {}}, ["a.b: 1 -> null"]),
        ({"a": [1, 2]}, {"a": [1]}, ["a: [1, 2] -> [1]"]),
    ],
)
def test_differences_name_the_path(old, new, found):
    assert differences(old, new) == found


def config_of(tmp_path, tiny_encoder, *overrides):
    return load_config(write_config(tmp_path, tiny_encoder), list(overrides))


@pytest.mark.parametrize("override", ["ckd.log_every=7", "ckd.keep=5", "ckd.save_every=3", "ckd.micro_batch=2", "ckd.tile=17"])
def test_what_changes_no_result_changes_no_stage(tmp_path, tiny_encoder, override):
    ours = stage_of(config_of(tmp_path, tiny_encoder), "ckd")
    assert not stage_of(config_of(tmp_path, tiny_encoder, override), "ckd").changes_since(
        {"config": ours.config, "inputs": ours.inputs}
    )


@pytest.mark.parametrize(
    "stage_name, override, changed",
    [
        ("ckd", "ckd.lr=1.0", "ckd.lr: 0.001 -> 1.0"),
        ("ckd", "seed=1", "seed: 0 -> 1"),
        ("ckd", "student.layers=[1]", "student.layers: [0, 2] -> [1]"),
        ("hpd", "hpd.dim=12", "hpd.dim: 16 -> 12"),
        ("precompute", "teacher.max_length=16", "teacher.max_length: 32 -> 16"),
        ("precompute", "shards.rows=100", "shards.rows: 200 -> 100"),
        ("evaluate", "evaluate.num_held_out=7", "evaluate.num_held_out: 2000 -> 7"),
    ],
)
def test_a_stage_depends_on_its_own_part_of_the_config(tmp_path, tiny_encoder, stage_name, override, changed):
    record = stage_of(config_of(tmp_path, tiny_encoder), stage_name)
    now = stage_of(config_of(tmp_path, tiny_encoder, override), stage_name)
    assert changed in now.changes_since({"config": record.config, "inputs": record.inputs})


def test_a_stage_does_not_depend_on_another_stages_part(tmp_path, tiny_encoder):
    record = stage_of(config_of(tmp_path, tiny_encoder), "ckd")
    now = stage_of(config_of(tmp_path, tiny_encoder, "hpd.dim=12", "finetune.lr=1.0"), "ckd")
    assert now.changes_since({"config": record.config, "inputs": record.inputs}) == []


def test_a_stage_runs_again_when_its_input_stage_made_something_else(tmp_path, tiny_encoder):
    config = config_of(tmp_path, tiny_encoder)
    write_json(open_run(config) / "made.json", {})
    ckd = stage_of(config, "ckd")
    ckd.begin()
    ckd.finish({}, "one")
    finetune = stage_of(config, "finetune")
    finetune.begin()
    finetune.finish({}, "tuned")
    assert stage_of(config, "finetune").reason_to_run() is None
    ckd.finish({}, "another")
    assert stage_of(config, "finetune").reason_to_run() == "input ckd changed"


def test_a_text_of_another_size_makes_a_finished_precompute_run_and_be_refused_before_its_vectors_are_lost(
    tmp_path, tiny_encoder
):
    config = config_of(tmp_path, tiny_encoder)
    assert run_precompute(config, torch.device("cpu"), None)
    assert stage_of(config, "precompute").reason_to_run() is None
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sentences(300, seed=1)) + "\n")
    assert stage_of(config, "precompute").reason_to_run() == f"input {text} changed"
    shards = sorted((config.run_dir / "shards").glob("*.tar"))
    with pytest.raises(ValueError, match="begun with another text or teacher"):
        run_precompute(config, torch.device("cpu"), None)
    assert sorted((config.run_dir / "shards").glob("*.tar")) == shards and shards


def test_runs_that_take_their_shards_from_one_embed_them_once_whatever_their_seed(tmp_path, tiny_encoder):
    first, second = (config_of(tmp_path, tiny_encoder, "shards_from=base", f"name=seed{n}", f"seed={n}") for n in range(2))
    assert stage_of(second, "precompute").reason_to_run() == "not run yet"
    assert run_precompute(first, torch.device("cpu"), None)
    assert stage_of(second, "precompute").reason_to_run() is None
    assert stage_of(first, "ckd").inputs["shards"] == stage_of(second, "ckd").inputs["shards"] != ""
    assert (first.runs_dir / "base/shards/manifest.json").is_file() and not first.run_dir.exists()


def test_a_triplets_file_of_another_size_makes_finetuning_run(tmp_path, tiny_encoder):
    triplets = tmp_path / "triplets.tsv"
    triplets.write_text("anchor\tpositive\thard_negative\na\tb\tc\n")
    config = config_of(tmp_path, tiny_encoder, f"finetune.triplets={triplets}")
    stage_of(config, "finetune").begin()
    stage_of(config, "finetune").finish({}, "made")
    triplets.write_text(triplets.read_text() + "d\te\tf\n")
    assert stage_of(config, "finetune").reason_to_run() == f"input {triplets} changed"


@pytest.mark.parametrize("pattern", ["{folder}/a[1].txt", "{folder}/*.txt", "{folder}/**/*.txt"])
def test_source_files_are_those_that_the_corpus_reads(tmp_path, tiny_encoder, pattern):
    from distill.corpus.sources import _matching_files

    (tmp_path / "texts").mkdir()
    for name in ("a[1].txt", "b.txt", ".hidden.txt"):
        (tmp_path / "texts" / name).write_text("some text\n")
    path = pattern.format(folder=tmp_path / "texts")
    config = config_of(tmp_path, tiny_encoder, f"text.sources=[{{type: file, path: '{path}'}}]")
    assert source_files(config) == [(str(found), 10) for found in _matching_files(config.text.sources[0])]
