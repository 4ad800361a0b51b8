"""An invalid config is refused before anything is loaded, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.config import RunConfig, check_task_names, load_config, load_run, open_run
from distill.run.config import ConfigError, Section, dump_config, effects_of, result
from distill.run.stage import write_run_config

ENDPOINT = "teacher={endpoint: {url: https://example.com/v1, model: m}}"
MINIMAL = "name: x\ntext: {sources: [text.txt]}\nteacher: {model: some/teacher}\n"


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL)
    return file


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["ckd.lrr=1"], "unknown key ckd.lrr; did you mean lr?"),
        (["ckd.temperature.scael=1"], "unknown key ckd.temperature.scael; did you mean scale?"),
        (["studnet.pooling=cls"], "unknown key studnet; did you mean student?"),
        (["ckd.epochs=many"], "ckd.epochs: Input should be a valid number"),
        (["ckd.queue=256"], "queue 256 is not larger than global_batch 256"),
        (["engine.num_ranks=512"], "ckd.global_batch 256 is smaller than engine.num_ranks 512"),
        (["teacher.vectors=a.npy"], "one of `model`, `vectors` and `endpoint`, not model and vectors"),
        (["teacher={prompt: x}"], "one of `model`, `vectors` and `endpoint`, not none"),
        ([ENDPOINT], "student.init is teacher, but the teacher is behind an endpoint; name an encoder in student.init"),
        (
            [ENDPOINT, "teacher.pooling=cls", "teacher.precision=fp32"],
            "teacher.pooling, teacher.precision: an endpoint's server",
        ),
        ([ENDPOINT, "teacher.concat=[{model: a/b}]"], "teacher.concat: an endpoint's server decides this; leave it out"),
        ([ENDPOINT, "teacher.endpoint.url=example.com/v1"], "teacher.endpoint: url is not an address such as https://HOST/v1"),
        ([ENDPOINT, "teacher.endpoint.url=https://h/v1/embeddings"], "to which /embeddings is appended"),
        ([ENDPOINT, "teacher.endpoint.url=https://h:port/v1"], "url is not an address"),
        (["teacher={vectors: a.npy}"], "name an encoder in student.init"),
        (["finetune.init=hpd"], "finetune.init is hpd, hpd.init is finetune: each waits for the other"),
        (["finetune.init=finetune"], "finetune.init is finetune: each waits for the other"),
        (["simcse.init=hpd", "hpd.init=finetune", "finetune.init=hpd"], "each waits for the other"),
        (["hpd.nested=[256]"], "must lie between 0 and hpd.dim 128"),
        (["hpd.whitening=0.5"], "changes the relational term alone"),
        (["ckd.weights={ckd: 0}"], "at least one above 0"),
        (["student.layers=[1, 1]"], "distinct"),
        (["student.layers=0"], "1 or more"),
        (["student.layers=[]"], "at least one"),
        (["text.min_chars=2000", "text.max_chars=1000"], "no text can pass"),
        (["text.sources=[{type: python-docs}]"], "run `python launcher/quickstart_text.py` and name the file"),
        (["text.sources=[{type: file}]"], "needs `path`"),
        (["nonsense"], "is not key=value"),
        (["ckd.lr=[1"], "not YAML"),
        (["name=../escape"], "name"),
    ],
)
def test_an_invalid_config_is_refused_with_its_key(path, overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "secret",
    [
        "teacher.endpoint.url=https://me:sk-secret@example.com/v1",
        "teacher.endpoint.url=https://example.com/v1?key=sk-secret",
        "teacher.endpoint.url=https://me:sk-secret/1@example.com/v1",
        "teacher.endpoint.api_key_env=sk-secret",
    ],
)
def test_a_key_in_a_config_is_refused_and_not_shown(path, secret):
    with pytest.raises(ConfigError, match=r"teacher\.endpoint: (url has credentials|api_key_env is not the name)") as error:
        load_config(path, [ENDPOINT, "student.init=a/b", secret])
    assert "secret" not in str(error.value) and error.value.__cause__ is None


def test_an_endpoints_config_is_dumped_and_loaded_to_the_same(path):
    config = load_config(path, [ENDPOINT, "student.init=a/b", "teacher.dimensions=64"])
    path.write_text(dump_config(config))
    assert load_config(path) == config and config.teacher.names == ["m"]


@pytest.mark.parametrize("name", ["engine", "evaluate", "run_dir"])
def test_a_task_of_a_name_that_has_another_meaning_is_refused(name):
    with pytest.raises(ValueError, match=f"no training task may be called {name}"):
        check_task_names(["align", name])


def test_a_source_may_be_a_plain_path(path):
    config = load_config(path, ["text.sources=data/*.txt"])
    assert config == load_config(path, ["text.sources=[{type: file, path: data/*.txt}]"])
    assert load_config(path, ["text.sources=[a.txt, {type: file, path: b.txt}]"]).text.sources[0].path == "a.txt"


def test_a_base_that_is_no_file_name_is_refused(path):
    path.write_text(MINIMAL + "base: 3\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: base is 3; it must be the name of another config file"):
        load_config(path)


def test_no_such_config_names_the_nearest(path):
    with pytest.raises(ConfigError, match=r"did you mean .*run\.yaml"):
        load_config(path.with_name("rum.yaml"))


def test_a_dumped_config_loads_to_the_same(path):
    config = load_config(path, ["ckd.lr=1e-4", "hpd.nested=[16]", "ckd.weights={cosine: 2}"])
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert config.ckd.lr == 1e-4 and config.ckd.weights == {"cosine": 2.0}


@pytest.mark.parametrize("name", ["2024", "on", "1e-4", "a run", "a #run"])
def test_a_run_has_the_place_and_name_of_its_directory(tmp_path, monkeypatch, name):
    run = tmp_path / "moved" / name
    (run / "ckd").mkdir(parents=True)
    (run / "config.yaml").write_text(MINIMAL + "runs_dir: elsewhere\nseed: 3\n")
    monkeypatch.chdir(run / "ckd")
    for directory in (run, Path("..")):
        config = load_run(directory)
        assert (config.runs_dir, config.name, config.seed) == (tmp_path / "moved", name, 3)
    monkeypatch.chdir(run)
    assert load_run(Path()).run_dir == run
    with pytest.raises(ConfigError, match=f"no run at {tmp_path}: it has no config.yaml"):
        load_run(tmp_path)


def test_a_config_that_changed_after_the_run_wrote_it_is_refused(tmp_path, path):
    config = load_config(path, [f"runs_dir={tmp_path}", "name=a", "seed=3"])
    open_run(config)
    written = config.run_dir / "config.yaml"
    write_run_config(config.run_dir, config)
    assert load_run(written.parent) == config
    written.write_text(written.read_text().replace("seed: 3", "seed: 7"))
    with pytest.raises(ConfigError, match=f"{written} was changed after the run wrote it: start the run's command again"):
        load_run(written.parent)
    write_run_config(config.run_dir, config)
    assert load_run(written.parent) == config


def test_base_gives_defaults_and_overrides_win(path):
    child = path.with_name("child.yaml")
    child.write_text("base: run.yaml\nname: y\nckd: {lr: 1.0e-3, epochs: 2}\n")
    config = load_config(child, ["ckd.epochs=3"])
    assert (config.name, config.ckd.lr, config.ckd.epochs, config.teacher.model) == ("y", 1e-3, 3.0, "some/teacher")


def test_a_base_that_leads_back_is_an_error(path):
    path.write_text(MINIMAL + "base: run.yaml\n")
    with pytest.raises(ConfigError, match="leads back"):
        load_config(path)


def test_shipped_configs_are_valid():
    from commands import ROOT

    configs = sorted((ROOT / "configs").glob("*.yaml"))
    assert configs
    for config in configs:
        load_config(config)


def test_every_field_declares_its_effect():
    effects = effects_of(RunConfig)
    assert [path for path, effect in effects.items() if effect not in ("result", "selection", "speed")] == []
    assert effects["ckd.lr"] == "result" and effects["ckd.dev_every"] == "selection" and effects["ckd.log_every"] == "speed"


def test_a_field_without_an_effect_is_found():
    class Inner(Section):
        declared: int = result(1)
        forgotten: int = 1

    class Outer(Section):
        inner: Inner = Inner()

    assert effects_of(Outer) == {"inner.declared": "result", "inner.forgotten": None}
