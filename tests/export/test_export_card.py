"""A model card is valid front matter and carries what the student was made from and what it reaches."""

from __future__ import annotations

import pytest
import yaml
from conftest import write_config

from distill.config import load_config
from distill.export.card import model_card

TEXT = {"counts": {"read": 1234, "too_short": 10, "kept": 1200}}
RESULTS = {
    "dim": 16,
    "params": 22_700_000,
    "bytes_per_vector": 64,
    "fidelity": {"spearman": 0.912345, "top10": 0.65, "sentences": 2000},
    "sts": {"STS12": 72.371, "AVG": 72.371, "AVG_OF": ["STS12"]},
}


@pytest.fixture
def config(tmp_path, tiny_encoder):
    return load_config(write_config(tmp_path, tiny_encoder))


@pytest.mark.parametrize("stage", ["ckd", "finetune", "hpd"])
@pytest.mark.parametrize("results", [None, RESULTS, {**RESULTS, "fidelity": {}, "sts": {}}])
def test_the_front_matter_is_yaml_and_the_recipe_is_the_config(config, stage, results):
    card = model_card(config, stage, TEXT, results)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "sentence-transformers"
    assert yaml.safe_load(front)["pipeline_tag"] == "sentence-similarity"
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recipe == {stage: getattr(config, stage).model_dump(mode="json")}
    assert ("## Results" in body) == (results is not None)


def test_results_are_carried_as_figures(config):
    card = model_card(config, "hpd", TEXT, RESULTS)
    for line in (
        "- parameters: 22,700,000",
        "- dimensions: 16 (64 bytes a vector)",
        "- fidelity to the teacher, spearman: 0.912 (2,000 held-out sentences)",
        "- STS12: 72.37",
    ):
        assert line in card.splitlines()
    assert "sentences: 2000" not in card and "AVG_OF" not in card


def test_teacher_text_and_counts_are_named(config):
    card = model_card(config, "ckd", TEXT, None)
    assert f"`{config.teacher.model}`" in card and "1,200 sentences" in card and "- too short: 10" in card
    assert config.text.sources[0].path in card


def test_nested_sizes_are_named_where_there_are_any(config):
    assert "truncate_dim=8" in model_card(config, "hpd", TEXT, None)
    assert "truncate_dim" not in model_card(config, "ckd", TEXT, None)
