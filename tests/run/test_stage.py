"""A stage runs when, and only when, something that it depends on has changed; the reason is named."""

from __future__ import annotations

import pytest
import torch
from conftest import sentences, write_config

from distill.config import load_config, open_run, stage_of
from distill.run.config import Section, result, selection, speed
from distill.run.files import read_json
from distill.run.stage import RunContext, Stage, differences, stage_fingerprint

CPU = torch.device("cpu")


class ExampleConfig(Section):
    lr: float = result(0.1)
    dev_every: int = selection(4)
    log_every: int = speed(10)


class OtherConfig(Section):
    used: int = result(1)
    unused: int = result(1)


class Example(Stage):
    """A stage whose progress is a file `work`."""

    name = "example"
    reads = ("other.used",)

    def __init__(self, context: RunContext, found: dict[str, str]) -> None:
        super().__init__(context)
        self.found = found

    def inputs(self):
        return self.found

    def progress(self):
        work = self.directory / "work"
        return [work] if work.exists() else []

    @property
    def outside(self):
        return (self.context.run_dir / "curves",)

    def run(self, device, stop_requested=lambda step: False):
        return True


def test_what_was_damaged_and_what_is_kept_by_content_outlive_another_begin(tmp_path, monkeypatch):
    ours = stage(tmp_path)
    ours.begin()
    monkeypatch.setattr(Example, "kept_by_content", ("cache",))
    for name in ("cache", "triplets.npy"):
        (ours.directory / name).touch()
    (ours.directory / "BEGUN.json").write_text("{}")
    ours.begin()
    assert sorted(path.name for path in ours.directory.iterdir()) == ["BEGUN.json", "BEGUN.json.damaged", "cache"]


def stage(tmp_path, *, shards="abc", used=1, unused=1, seed=0, **config):
    sections = {"example": ExampleConfig(**config), "other": OtherConfig(used=used, unused=unused)}
    context = RunContext("name", tmp_path / "run", tmp_path / "run/shards", seed, (), sections)
    return Example(context, {"shards": shards})


def finished(tmp_path, **config):
    ours = stage(tmp_path, **config)
    ours.begin()
    ours.finish({"steps": 3}, "made")
    return ours


def test_a_stage_is_not_run_then_unfinished_then_finished(tmp_path):
    ours = stage(tmp_path)
    assert ours.reason_to_run() == "not run yet"
    ours.begin()
    assert ours.reason_to_run() == "unfinished" and stage_fingerprint(ours.directory) == ""
    ours.finish({"steps": 3}, "made")
    assert ours.reason_to_run() is None
    assert stage_fingerprint(ours.directory) == "made"
    assert read_json(ours.directory / "DONE.json")["results"] == {"steps": 3}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"lr": 0.2}, "example.lr: 0.1 -> 0.2"),
        ({"used": 2}, "other.used: 1 -> 2"),
        ({"shards": "xyz"}, "input shards: abc -> xyz"),
        ({"dev_every": 2}, None),
        ({"log_every": 1}, None),
        ({"unused": 2}, None),
        ({"seed": 1}, None),
    ],
)
def test_a_finished_stage_runs_again_for_changes_of_results_and_inputs_alone(tmp_path, change, reason):
    finished(tmp_path)
    assert stage(tmp_path, **change).reason_to_run() == reason


def test_the_seed_counts_where_a_stage_uses_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Example, "uses_seed", True)
    finished(tmp_path)
    assert stage(tmp_path, seed=1).reason_to_run() == "seed: 0 -> 1"


def test_an_effect_may_differ_by_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(Example, "effects", {"example.lr": "speed", "example.log_every": "result"})
    finished(tmp_path)
    assert stage(tmp_path, lr=0.2).reason_to_run() is None
    assert stage(tmp_path, log_every=1).reason_to_run() == "example.log_every: 10 -> 1"


def test_an_unfinished_stage_of_another_config_is_refused_and_kept(tmp_path):
    ours = stage(tmp_path)
    ours.begin()
    (ours.directory / "work").write_text("an hour's")
    with pytest.raises(ValueError, match=r"unfinished example of another config \(example\.lr: 0\.1 -> 0\.2\)"):
        stage(tmp_path, lr=0.2).begin()
    assert (ours.directory / "work").read_text() == "an hour's"


def test_an_unfinished_stage_continues_with_another_selection(tmp_path):
    ours = stage(tmp_path)
    ours.begin()
    (ours.directory / "work").write_text("an hour's")
    often = stage(tmp_path, dev_every=1, log_every=1)
    often.begin()
    assert (ours.directory / "work").exists()
    assert read_json(ours.directory / "BEGUN.json")["selection"] == {"example": {"dev_every": 1}}


def test_begin_keeps_an_unfinished_stage_of_this_config_and_sets_a_finished_one_aside_until_the_next_is_finished(tmp_path):
    ours = stage(tmp_path)
    ours.begin()
    (ours.directory / "work").write_text("an hour's")
    ours.begin()
    assert (ours.directory / "work").exists()
    ours.finish({}, "made")
    (ours.directory / "student").write_text("trained")
    again = stage(tmp_path, lr=0.2)
    again.begin()
    assert [path.name for path in ours.directory.iterdir()] == ["BEGUN.json"]
    assert (again.previous / "student").read_text() == "trained" and (again.previous / "DONE.json").exists()
    again.begin()
    assert (again.previous / "student").exists()
    again.finish({}, "made again")
    assert {path.name for path in (tmp_path / "run").rglob("*")} == {"example", "BEGUN.json", "DONE.json"}


def test_a_refused_start_says_where_the_finished_stage_is(tmp_path):
    finished(tmp_path)
    stage(tmp_path, lr=0.2).begin()
    (tmp_path / "run/example/work").touch()
    with pytest.raises(ValueError, match=r"the finished one before it is kept in .*run/\.example\.previous"):
        stage(tmp_path, lr=0.3).begin()


def test_a_removed_input_is_a_change(tmp_path):
    ours = finished(tmp_path)
    ours.found = {}
    assert ours.reason_to_run() == "input shards: abc -> nothing"


def test_done_records_the_inputs_that_the_stage_began_with(tmp_path):
    ours = stage(tmp_path)
    ours.begin()
    ours.found = {"shards": "changed meanwhile"}
    ours.finish({}, "made")
    assert read_json(ours.directory / "DONE.json")["inputs"] == {"shards": "abc"}
    assert ours.reason_to_run() == "input shards: abc -> changed mean"


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\x00", b"{", "flipped"])
def test_a_damaged_record_is_named_and_set_aside(tmp_path, content, caplog):
    ours = finished(tmp_path)
    done = ours.directory / "DONE.json"
    done.write_bytes(done.read_bytes().replace(b'"steps": 3', b'"steps": 2') if content == "flipped" else content)
    assert ours.reason_to_run() == "unfinished"
    assert "run/example/DONE.json is damaged" in caplog.text
    assert (ours.directory / "DONE.json.damaged").exists()


def test_a_lost_record_loses_no_progress(tmp_path, caplog):
    ours = stage(tmp_path)
    ours.begin()
    (ours.directory / "work").write_text("an hour's")
    (ours.directory / "cache").mkdir()
    (ours.directory / "BEGUN.json").unlink()
    ours.begin()
    assert (ours.directory / "work").read_text() == "an hour's" and not (ours.directory / "cache").exists()
    assert "example has no BEGUN.json: only work is kept" in caplog.text


def test_a_stage_without_progress_begins_again_with_another_config(tmp_path):
    ours = stage(tmp_path)
    ours.begin()
    (ours.directory / "cache").touch()
    stage(tmp_path, lr=0.2).begin()
    assert read_json(ours.directory / "BEGUN.json")["settings"] == {"example": {"lr": 0.2}, "other": {"used": 1}}
    assert not (ours.directory / "cache").exists()


def test_the_former_config_brings_the_finished_stage_back_with_what_lies_outside(tmp_path):
    ours = stage(tmp_path)
    ours.begin()
    curves = tmp_path / "run/curves"
    curves.mkdir()
    (curves / "loss").write_text("0.1")
    ours.finish({"steps": 3}, "made")
    other = stage(tmp_path, lr=0.2)
    other.begin()
    assert not curves.exists()
    curves.mkdir()
    (other.directory / "work").write_text("an hour's")
    assert stage(tmp_path).reason_to_run() == "unfinished", "work on the other config is not lost by it"
    (other.directory / "work").unlink()
    assert stage(tmp_path).reason_to_run() is None
    assert stage_fingerprint(ours.directory) == "made" and (curves / "loss").read_text() == "0.1"
    assert not ours.previous.exists()


def test_a_missing_input_is_no_refusal_as_it_may_be_made_first(tmp_path):
    ours = stage(tmp_path)
    ours.begin()
    (ours.directory / "work").touch()
    ours.found = {"shards": ""}
    assert ours.refusal() is None
    ours.found = {"shards": "xyz"}
    assert "input shards: abc -> xyz" in ours.refusal()


def test_a_refused_start_leaves_the_config_of_the_run_as_it_was(tmp_path, tiny_encoder):
    config = config_of(tmp_path, tiny_encoder)
    open_run(config)
    ckd = stage_of(config, "ckd")
    ckd.begin()
    checkpoint = ckd.directory / "checkpoints/step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE.json").touch()
    before = (config.run_dir / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"ckd\.lr"):
        open_run(config_of(tmp_path, tiny_encoder, "ckd.lr=0.5"), ["ckd"])
    assert (config.run_dir / "config.yaml").read_bytes() == before


def test_stages_only_selects_what_runs_now(tmp_path, tiny_encoder):
    config = config_of(tmp_path, tiny_encoder, "stages=[export]")
    assert config.trained_stages == []
    for name in ("hpd", "ckd"):
        stage_of(config, name).begin()
        stage_of(config, name).finish({}, "made")
    assert config.trained_stages == ["ckd", "hpd"] and config.training_stages == []
    assert set(stage_of(config, "export").inputs()) == {"ckd", "hpd"}


def test_a_stage_that_an_earlier_version_began_is_refused_by_name_and_kept(tmp_path):
    ours = stage(tmp_path)
    ours.directory.mkdir(parents=True)
    (ours.directory / "BEGUN.json").write_text(
        '{"stage": "example", "config": {"example": {"lr": 0.1}}, "inputs": {"shards": "abc"}}'
    )
    (ours.directory / "work").write_text("an hour's")
    with pytest.raises(ValueError, match=r"unfinished example .*run/example was written by an earlier version of this program"):
        ours.begin()
    assert (ours.directory / "work").read_text() == "an hour's"


@pytest.mark.parametrize("left", [["cache"], ["cache", "DONE.json"], []])
def test_a_folder_without_begun_json_is_never_continued(tmp_path, left):
    """Such a folder remains if a clearing is killed."""
    ours = finished(tmp_path)
    (ours.directory / "BEGUN.json").unlink()
    (ours.directory / "cache").touch()
    for path in ours.directory.iterdir():
        if path.name not in left:
            path.unlink()
    stage(tmp_path, lr=0.2).begin()
    assert [path.name for path in ours.directory.iterdir()] == ["BEGUN.json"]


@pytest.mark.parametrize(
    "old, new, found",
    [
        ({"a": {"b": 1}}, {"a": {"b": 1}}, []),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, ["a.b: 1 -> 2"]),
        ({"a": {"b": 1}}, {"a": {}}, ["a.b: 1 -> null"]),
        ({"a": [1, 2]}, {"a": [1]}, ["a: [1, 2] -> [1]"]),
        ({"a": [{"b": 1}]}, {"a": [{"b": 1, "c": None}]}, []),
        ({"a": [{"b": 1}, {}]}, {"a": [{"b": 1}, {"b": 2}]}, ["a[1].b: null -> 2"]),
        ({"a": [{"b": 1}]}, {"a": []}, ['a: [{"b": 1}] -> []']),
    ],
)
def test_differences_name_the_path(old, new, found):
    assert differences(old, new) == found


def config_of(tmp_path, tiny_encoder, *overrides):
    return load_config(write_config(tmp_path, tiny_encoder), list(overrides))


def changes(tmp_path, tiny_encoder, stage_name, *overrides):
    """What changes for a stage with these overrides."""
    before = stage_of(config_of(tmp_path, tiny_encoder), stage_name)
    record = {"settings": before.settings("result"), "inputs": before.inputs()}
    return stage_of(config_of(tmp_path, tiny_encoder, *overrides), stage_name).changes_since(record)


@pytest.mark.parametrize(
    "override",
    [
        "ckd.log_every=7",
        "ckd.keep=5",
        "ckd.save_every=3",
        "ckd.micro_batch=2",
        "ckd.tile=17",
        "ckd.dev_every=1",
        "evaluate.dev_sentences=5",
        "evaluate.num_held_out=7",
        "evaluate.sts=hub",
        "evaluate.retrieval=[hub:mteb/scifact]",
    ],
)
def test_a_change_that_changes_no_result_changes_no_stage(tmp_path, tiny_encoder, override):
    assert changes(tmp_path, tiny_encoder, "ckd", override) == []


@pytest.mark.parametrize("override", ["teacher.tokens_per_batch=17", "teacher.tasks=2", "teacher.placement=auto"])
def test_how_the_teacher_is_run_changes_no_shards(tmp_path, tiny_encoder, override):
    assert changes(tmp_path, tiny_encoder, "precompute", override) == []


@pytest.mark.parametrize("name", ["simcse", "finetune"])
def test_the_micro_batch_is_a_result_where_dropout_masks_depend_on_it(tmp_path, tiny_encoder, name):
    assert changes(tmp_path, tiny_encoder, name, f"{name}.micro_batch=2") != []


def test_a_stage_folder_that_is_a_link_is_begun_again_and_what_it_names_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/example").symlink_to(tmp_path / "disk")
    for lr in (0.1, 0.2, 0.3):
        ours = stage(tmp_path, lr=lr)
        ours.begin()
        ours.finish({}, "made")
    assert read_json(ours.directory / "DONE.json")["settings"]["example"] == {"lr": 0.3}
    assert read_json(tmp_path / "disk/DONE.json")["settings"]["example"] == {"lr": 0.1}


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
    assert changed in changes(tmp_path, tiny_encoder, stage_name, override)


def test_a_stage_does_not_depend_on_another_stages_part(tmp_path, tiny_encoder):
    assert changes(tmp_path, tiny_encoder, "ckd", "hpd.dim=12", "finetune.lr=1.0") == []


def test_a_stage_runs_again_when_its_input_stage_made_something_else(tmp_path, tiny_encoder):
    config = config_of(tmp_path, tiny_encoder)
    open_run(config)
    ckd, finetune = stage_of(config, "ckd"), stage_of(config, "finetune")
    ckd.begin()
    ckd.finish({}, "one")
    finetune.begin()
    finetune.finish({}, "tuned")
    (finetune.directory / "student").mkdir()
    (finetune.directory / "student/student.json").touch()
    assert finetune.reason_to_run() is None
    ckd.finish({}, "another")
    assert stage_of(config, "finetune").reason_to_run() == "input ckd: one -> another"


def test_precompute_runs_again_for_a_changed_text_and_is_refused_before_its_vectors_are_lost(tmp_path, tiny_encoder):
    config = config_of(tmp_path, tiny_encoder)
    assert stage_of(config, "precompute").run(CPU)
    assert stage_of(config, "precompute").reason_to_run() is None
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sentences(300, seed=1)) + "\n")
    assert stage_of(config, "precompute").reason_to_run().startswith(f"input {text}: ")
    shards = sorted((config.run_dir / "shards").glob("*.tar"))
    with pytest.raises(ValueError, match="begun with another text or teacher"):
        stage_of(config, "precompute").run(CPU)
    assert sorted((config.run_dir / "shards").glob("*.tar")) == shards and shards


def test_runs_that_share_their_shards_embed_them_once_whatever_their_seed(tmp_path, tiny_encoder):
    first, second = (config_of(tmp_path, tiny_encoder, "shards_from=base", f"name=seed{n}", f"seed={n}") for n in range(2))
    assert stage_of(second, "precompute").reason_to_run() == "not run yet"
    assert stage_of(first, "precompute").run(CPU)
    assert stage_of(second, "precompute").reason_to_run() is None
    assert stage_of(first, "ckd").inputs()["shards"] == stage_of(second, "ckd").inputs()["shards"] != ""
    assert (first.runs_dir / "base/shards/manifest.json").is_file() and not (first.run_dir / "shards").exists()


def test_a_changed_triplets_file_makes_finetuning_run(tmp_path, tiny_encoder):
    triplets = tmp_path / "triplets.tsv"
    triplets.write_text("anchor\tpositive\thard_negative\na\tb\tc\n")
    config = config_of(tmp_path, tiny_encoder, f"finetune.triplets={triplets}")
    stage_of(config, "finetune").begin()
    stage_of(config, "finetune").finish({}, "made")
    triplets.write_text(triplets.read_text() + "d\te\tf\n")
    assert stage_of(config, "finetune").reason_to_run().startswith(f"input {triplets}: ")
