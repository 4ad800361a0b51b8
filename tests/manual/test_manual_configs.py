"""The papers' recipes hold the papers' values; every config is in the table of configs."""

from __future__ import annotations

import pytest
from commands import ROOT

from distill.config import load_config
from distill.study.study_configs import read_study

CKD = {"weights": {"ckd": 1.0}, "projection": "linear", "global_batch": 4096, "micro_batch": 512, "queue": 65_536, "epochs": 20,
       "lr": 2e-4, "betas": (0.9, 0.98), "eps": 1e-8, "clip": 1.0, "warmup": 0.1 / 20, "dev_every": 125}  # fmt: skip
NLI = {"limit": 275_601, "global_batch": 512, "lr": 5e-5, "epochs": 5, "warmup": 0.1 / 5}
HPD = {"weights": {"pca": 1.0}, "dim": 128, "head": "tanh", "global_batch": 256, "lr": 1e-4, "epochs": 5, "init": "student"}
SIMCSE = {"global_batch": 128, "lr": 1e-5, "max_steps": 20_000}
RECIPES = [
    ("distilcse_bert_base", "ckd", CKD),
    ("distilcse_bert_base", "finetune", NLI),
    ("distilcse_tinybert", "ckd", CKD),
    ("distilcse_tinybert", "finetune", NLI),
    ("hpd_minilm_128", "hpd", HPD),
    ("distilface", "simcse", SIMCSE),
]


@pytest.mark.parametrize("name, stage, values", RECIPES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_recipe_has_the_papers_values(name, stage, values):
    config = load_config(ROOT / f"configs/{name}.yaml")
    section = getattr(config, stage)
    assert stage in config.stages
    assert {key: getattr(section, key) for key in values} == values


def test_temperatures_and_lengths_are_the_papers():
    distilcse = load_config(ROOT / "configs/distilcse_bert_base.yaml")
    assert distilcse.ckd.temperature.scale == pytest.approx(2.718281828) and distilcse.ckd.temperature.learnable
    assert distilcse.finetune.temperature.scale == 20 and distilcse.finetune.temperature.learnable
    assert distilcse.student.max_length == distilcse.teacher.max_length == 64
    steps_an_epoch = 5_000_000 * 49 // 50 // 4096
    assert distilcse.ckd.patience == round(3 * steps_an_epoch / distilcse.ckd.dev_every)
    hpd = load_config(ROOT / "configs/hpd_minilm_128.yaml")
    steps = hpd.hpd.epochs * (3_000_000 * 49 // 50 // hpd.hpd.global_batch)
    assert round(hpd.hpd.warmup * steps) == pytest.approx(1000, abs=2) and hpd.evaluate.dev_sentences == 5000
    distilface = load_config(ROOT / "configs/distilface.yaml")
    assert distilface.simcse.temperature.scale == 20 and distilface.student.max_length == 32
    assert distilface.student.pooling == "last4_mean"


def test_every_config_is_in_the_table():
    table = (ROOT / "configs/README.md").read_text()
    for path in sorted((ROOT / "configs").glob("*.yaml")) + sorted((ROOT / "configs/deepspeed").glob("*.json")):
        assert path.name in table, path


STUDIES = [("study", None), ("study", "files"), ("study/large", None), ("study/large", "files-large")]


@pytest.mark.parametrize("folder, over", STUDIES)
def test_a_study_is_whole_from_the_hub_and_from_files(folder, over):
    path = ROOT / f"configs/study/over/{over}.yaml" if over else None
    students = read_study(ROOT / "configs" / folder, path)
    assert {"minilm", "mpnet-3-layers", "mpnet-6-layers"} <= {student.name for student in students}
    kinds = {str(source.type) for student in students for source in student.text.sources}
    assert kinds == ({"file"} if over else {"huggingface"})
    assert all("hpd" in student.stages for student in students if student.name in ("minilm", "mpnet-6-layers"))
