"""A model card is valid front matter and carries what the student was made from, what it reaches and how to load it."""

from __future__ import annotations

import json

import pytest
import yaml
from conftest import write_config

from distill.config import TRAINING_STAGES, load_config
from distill.export.card import NAMES, model_card

TEXT = {"counts": {"read": 1234, "too_short": 10, "kept": 1200}}
RESULTS = {
    "dim": 16,
    "params": 22_700_000,
    "bytes_per_vector": 64,
    "sentences_per_second": 400.0,
    "fidelity": {"spearman": 0.912345, "top10": 0.65, "sentences": 2000},
    "sts": {"STS12": 72.371, "AVG": 72.371, "AVG_OF": ["STS12"]},
    "sts_ci": {"STS12": [70.912, 73.848], "AVG": [70.9, 73.8]},
    "retrieval": {"scifact": {"ndcg@10": 0.6412, "recall@10": 0.7, "int8": {"ndcg@10": 0.6}}},
    "retrieval_ci": {"scifact": {"ndcg@10": [0.6, 0.68]}},
    "transfer": {"sst2": {"accuracy": 0.87, "majority": 0.5}},
}
PLAIN = {"dim": 8, "params": 22_700_000, "bytes_per_vector": 32}
ABOUT = {
    "dim": 16,
    "parameters": 123_456,
    "max_length": 32,
    "checked_on": 1000,
    "cosines": {"onnx-int8": {"worst": 0.998765, "mean": 0.9997, "sentence": 3}},
}


@pytest.fixture
def config(tmp_path, tiny_encoder):
    return load_config(write_config(tmp_path, tiny_encoder))


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "made"
    for file, size in (
        ("model.safetensors", 2_000_000),
        ("onnx/model_int8.onnx", 500_000),
        ("modules.json", 400),
        ("README.md", 9),
    ):
        (made / file).parent.mkdir(parents=True, exist_ok=True)
        (made / file).write_bytes(b"x" * size)
    (made / "export.json").write_text(json.dumps(ABOUT))
    return made


def front_of(card):
    return yaml.safe_load(card.split("---\n", 2)[1])


@pytest.mark.parametrize("stage", NAMES)
@pytest.mark.parametrize("results", [None, RESULTS, PLAIN])
def test_the_front_matter_is_yaml_and_the_recipe_is_the_config(config, stage, results):
    card = model_card(config, stage, TEXT, results)
    front = front_of(card)
    assert (front["library_name"], front["pipeline_tag"]) == ("sentence-transformers", "sentence-similarity")
    assert front["license"] == "other" and "onnx" not in front["tags"] and "sentence-transformers" in front["tags"]
    recipe = yaml.safe_load(card.split("## Recipe\n\n```yaml\n")[1].split("```")[0])
    assert recipe == {stage: getattr(config, stage).model_dump(mode="json")}
    assert ("## Results" in card) == (results is not None)


@pytest.mark.parametrize(
    "init, base", [("teacher", "tiny"), ("owner/name", "owner/name"), ("/models/mine-6", "mine-6"), ("package:abc/x", "abc")]
)
def test_the_base_model_is_what_the_student_began_as_and_no_path_of_this_machine(tmp_path, tiny_encoder, init, base):
    assert tiny_encoder.name == "tiny"
    card = model_card(load_config(write_config(tmp_path, tiny_encoder), [f"student.init={init}"]), "ckd", TEXT, None)
    assert front_of(card)["base_model"] == base
    assert str(tiny_encoder) not in card and str(tmp_path) not in card
    assert "A student of `tiny`, trained by distill on 1,200 sentences from text.txt." in card
    assert "Its weights descend from its teacher's and its text's: their licences apply." in card


def test_every_stage_of_training_has_a_name():
    assert set(NAMES) == set(TRAINING_STAGES)


def test_results_are_a_row_a_figure_with_its_interval(config):
    card = model_card(config, "hpd", TEXT, RESULTS)
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert rows == [
        "| | hpd |",
        "| parameters | 22,700,000 |",
        "| dimensions | 16 |",
        "| bytes a vector | 64 |",
        "| fidelity: Spearman, all pairs | 0.912 |",
        "| fidelity: 10 nearest shared | 0.650 |",
        "| STS: STS12 | 72.37 [70.91, 73.85] |",
        "| STS: average | 72.37 [70.90, 73.80] |",
        "| retrieval: scifact, ndcg@10 | 0.641 [0.600, 0.680] |",
        "| transfer: sst2, accuracy | 0.870 |",
    ]
    assert "on 2,000 held-out sentences. STS is Spearman x 100; the average is of STS12. In brackets: 95%" in card


def test_the_teacher_and_the_nested_sizes_stand_beside_and_no_other_model_does(config):
    everything = {"teacher": {**PLAIN, "sts": {"STSB": 83.0, "AVG_OF": ["STSB"]}}, "ckd": PLAIN, "hpd": RESULTS, "hpd-8": PLAIN}
    rows = [line for line in model_card(config, "hpd", TEXT, RESULTS, beside=everything).splitlines() if line.startswith("| ")]
    assert rows[0] == "| | hpd | hpd-8 | teacher |"
    assert "| dimensions | 16 | 8 | 8 |" in rows and "| STS: STSB | - | - | 83.00 |" in rows
    assert "| STS: STS12 | 72.37 [70.91, 73.85] | - | - |" in rows


def test_files_sizes_and_how_near_they_came_are_those_of_the_folder(config, folder):
    card = model_card(config, "hpd", TEXT, None, folder)
    lines = card.splitlines()
    assert "| `model.safetensors` | 2.0 MB | the encoder's weights, float32 |" in lines
    assert any(line.startswith("| `onnx/model_int8.onnx` | 0.5 MB |") for line in lines)
    assert any(line.startswith("| the rest | 0.4 kB |") for line in lines) and "On disk: 2.5 MB." in lines
    assert "on 1,000 sentences: onnx-int8 0.99877 (mean 0.99970)." in card and "README.md`" not in card
    assert "- dimensions: 16, L2-normalised; similarity function: cosine" in lines and "- parameters: 123,456" in lines
    assert "onnx" in front_of(card)["tags"] and 'f"{folder}/onnx/model_int8.onnx"' in card


def test_a_card_of_a_run_describes_the_runs_own_folder(config, folder):
    place = config.run_dir / "export"
    place.mkdir(parents=True)
    folder.rename(place / "hpd")
    assert "onnx/model_int8.onnx" in model_card(config, "hpd", TEXT, RESULTS)
    assert "## With onnxruntime" not in model_card(config, "ckd", TEXT, RESULTS)


def test_text_is_counted_and_nested_sizes_are_named_where_there_are_any(config):
    card = model_card(config, "hpd", TEXT, None)
    assert "- too short: 10" in card.splitlines() and "truncate_dim=8" in card
    assert "truncate_dim" not in model_card(config, "ckd", TEXT, None)
