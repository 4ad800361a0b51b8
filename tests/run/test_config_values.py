"""Values of a config that cannot work are refused by key, before anything is run; a leading ~ is the home folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.config import load_config
from distill.run.config import ConfigError
from launcher import command

MINIMAL = "name: x\ntext: {sources: [text.txt]}\nteacher: {model: some/teacher}\n"


@pytest.fixture
def path(tmp_path):
    (tmp_path / "run.yaml").write_text(MINIMAL)
    return tmp_path / "run.yaml"


@pytest.mark.parametrize(
    "override, message",
    [
        ("name=123", r"name: Input should be a valid string \(got 123\); quote it: name: \"123\", or on the command line"),
        ("name=on", r"quote it: name: \"on\", or on the command line 'name=\"on\"'"),
        ("name=2024-13-45", "name=2024-13-45.*month must be in"),
        ("ckd.lr=.inf", "ckd.lr: Input should be a finite number"),
        ("ckd.epochs=.inf", "ckd.epochs: Input should be a finite number"),
        ("ckd.weights={ckd: .nan}", "ckd.weights.ckd: Input should be a finite number"),
        ("engine.timeout=.inf", "engine.timeout: Input should be a finite number"),
        ("ckd.betas=[1.5, 2]", r"ckd.betas.0: Input should be less than 1 \(got 1.5\)"),
        ("finetune.positive_range=[0.9, 0.1]", r"finetune.positive_range \[0.9, 0.1\] must be two cosines"),
        ("finetune.positive_range=[0.9, 1.1]", r"finetune.positive_range \[0.9, 1.1\] must be two cosines"),
        ("finetune={triplets: a.tsv, dataset: b/c}", "finetune.triplets and finetune.dataset are both given"),
        ("stages=[hpd, finetune, ckd]", "hpd needs finetune, which is listed after it"),
        ("stages=[ckd, precompute]", "ckd needs precompute, which is listed after it"),
        ("stages=[evaluate, export]", "evaluate needs export, which is listed after it"),
        ("stages=[ckd, ckd]", "ckd is listed 2 times"),
        ("runs_dir=~nobody-of-this-name/x", "runs_dir: ~nobody-of-this-name/x: .*write the whole path"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_its_key(path, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(path, [override])


def test_brackets_nested_too_deeply_are_one_line_in_a_file_and_in_an_override(path):
    with pytest.raises(ConfigError, match=r"^override 'ckd.lr=\[+\.\.\.': the value is not YAML: its brackets are nested"):
        load_config(path, ["ckd.lr=" + "[" * 3000])
    path.write_text(MINIMAL + "ckd: " + "[" * 3000)
    with pytest.raises(ConfigError, match=r"^.*run\.yaml is not YAML: its brackets are nested too deeply$"):
        load_config(path)


def test_a_quoted_override_stays_text(path):
    assert load_config(path, ['name="1e-4"']).name == "1e-4"


def test_stages_that_follow_their_inputs_are_accepted_also_without_them(path):
    for stages in ("[hpd]", "[export, evaluate]", "[precompute, ckd, simcse, finetune, hpd, export, evaluate]"):
        assert load_config(path, [f"stages={stages}"])


def test_a_leading_tilde_is_the_home_folder(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "child.yaml").write_text("base: ~/run.yaml\n")
    config = load_config(
        "~/child.yaml",
        [
            "runs_dir=~/runs",
            "shards_from=~/runs/other",
            "text.sources=[~/a.txt, {type: huggingface, name: ~/data, field: text}]",
            "teacher={vectors: ~/v.npy}",
            "student.init=some/model",
            "finetune.triplets=~/t.tsv",
            "engine.deepspeed=~/zero.json",
            "evaluate={sts: ~/sts, retrieval: [~/r, hub:a/b], transfer: [~/t]}",
        ],
    )
    evaluate = config.evaluate
    texts = [config.shards_from, config.text.sources[0].path, config.text.sources[1].name, config.teacher.vectors]
    texts += [config.finetune.triplets, evaluate.sts, evaluate.retrieval[0], evaluate.transfer[0]]
    inside = ["runs/other", "a.txt", "data", "v.npy", "t.tsv", "sts", "r", "t"]
    assert texts == [str(tmp_path / name) for name in inside] and evaluate.retrieval[1] == "hub:a/b"
    assert (config.runs_dir, config.engine.deepspeed) == (tmp_path / "runs", tmp_path / "zero.json")
    assert command.path("~/x") == tmp_path / "x" and command.name("~/x") == str(tmp_path / "x")
    assert command.name("hub:a/b") == "hub:a/b" and command.path("x") == Path("x")
