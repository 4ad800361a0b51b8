"""A model card is valid front matter and carries what the student was made from and how to load it; the report adds results."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml
from conftest import write_config
from encoders import save_sentence_transformer
from huggingface_hub import ModelCard

from distill.config import TRAINING_STAGES, load_config, stage_of
from distill.export.card import Provenance, model_card
from distill.export.export_stage import ExportStage
from distill.metrics.results import ModelResults
from distill.report.model_cards import model_index, results_section, write_model_cards
from distill.run.files import write_json
from distill.training.tasks import training_tasks

TEXT = {"counts": {"read": 1234, "too_short": 10, "kept": 1200}}
RESULTS = ModelResults(
    dim=16,
    params=22_700_000,
    bytes_per_vector=64,
    texts_per_second=400.0,
    fidelity={"spearman": 0.912345, "spearman_top50": 0.8, "top10": 0.65, "texts": 2000},
    sts={"STS12": 72.371, "AVG": 72.371, "AVG_OF": ["STS12"]},
    sts_ci={"STS12": (70.912, 73.848), "AVG": (70.9, 73.8)},
    retrieval={"scifact": {"ndcg@10": 0.6412, "recall@10": 0.7, "int8": {"ndcg@10": 0.6}}},
    retrieval_ci={"scifact": {"ndcg@10": (0.6, 0.68)}},
    transfer={"sst2": {"accuracy": 0.87, "majority": 0.5}},
)
PLAIN = ModelResults(dim=8, params=22_700_000, bytes_per_vector=32)
ABOUT = {
    "dim": 16,
    "parameters": 123_456,
    "max_length": 32,
    "checked_on": 1000,
    "cosines": {"onnx-int8": {"worst": 0.998765, "mean": 0.9997, "text": 3}},
}


@pytest.fixture
def provenance(tmp_path, tiny_encoder):
    """The provenance of a finished stage, as the export stage finds it with config overrides."""

    def found(stage: str, *overrides: str) -> Provenance:
        config = load_config(write_config(tmp_path, tiny_encoder), list(overrides))
        settings = {stage: config.train(stage).model_dump(mode="json")}
        (config.run_dir / stage).mkdir(parents=True, exist_ok=True)
        (config.precompute_dir / "text").mkdir(parents=True, exist_ok=True)
        results = {"nested_sizes": [8] if stage == "hpd" else []}
        write_json(config.run_dir / stage / "DONE.json", {"settings": settings, "results": results, "fingerprint": "0"})
        write_json(config.precompute_dir / "text/manifest.json", TEXT)
        export = stage_of(config, "export")
        assert isinstance(export, ExportStage)
        return export.provenance(stage)

    return found


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "made"
    for file, size in (
        ("model.safetensors", 2_000_000),
        ("onnx/model_quantized.onnx", 500_000),
        ("modules.json", 400),
        ("README.md", 9),
    ):
        (made / file).parent.mkdir(parents=True, exist_ok=True)
        (made / file).write_bytes(b"x" * size)
    (made / "export.json").write_text(json.dumps(ABOUT))
    return made


def front_of(card):
    return yaml.safe_load(card.split("---\n", 2)[1])


@pytest.mark.parametrize("stage", TRAINING_STAGES)
def test_the_front_matter_is_yaml_and_the_recipe_is_the_settings_of_the_stage(tmp_path, provenance, stage):
    made_from = provenance(stage)
    card = model_card(tmp_path / "none", made_from)
    front = front_of(card)
    assert (front["library_name"], front["pipeline_tag"]) == ("sentence-transformers", "sentence-similarity")
    assert front["license"] == "other" and "onnx" not in front["tags"] and "sentence-transformers" in front["tags"]
    recipe = yaml.safe_load(card.split("## Recipe\n\n```yaml\n")[1].split("```")[0])
    assert (
        list(recipe) == [*made_from.earlier, stage]
        and recipe[stage] == made_from.recipe
        and made_from.recipe["global_batch"] > 0
    )
    assert training_tasks()[stage].title in card and "## Results" not in card


def test_the_languages_of_the_config_are_in_the_card_and_no_language_is_guessed(provenance, tmp_path):
    assert "language" not in front_of(model_card(tmp_path, provenance("ckd")))
    assert front_of(model_card(tmp_path, provenance("ckd", "export.language=[en, de]")))["language"] == ["en", "de"]
    with pytest.raises(ValueError, match=r"export\.language"):
        provenance("ckd", "export.language=[English]")


@pytest.mark.parametrize(
    "init, base", [("teacher", None), ("owner/name", "owner/name"), ("/models/mine-6", None), ("package:abc/x", None)]
)
def test_the_base_model_is_a_name_on_the_hub_or_left_out_and_no_path_of_this_machine_is_shown(
    tmp_path, tiny_encoder, provenance, init, base
):
    assert tiny_encoder.name == "tiny"
    card = model_card(tmp_path / "none", provenance("ckd", f"student.init={init}"))
    assert front_of(card).get("base_model") == base
    assert str(tiny_encoder) not in card and str(tmp_path) not in card
    assert "A student of `tiny`, trained by distill on 1,200 texts from text.txt." in card
    assert "Its weights descend from its teacher's and its text's: their licences apply." in card


@pytest.mark.parametrize(
    "options, encode",
    [({}, '""'), ({"default_prompt_name": "query"}, '"find:\\n"')],
)
def test_prompts_are_named_and_the_snippet_uses_them(tmp_path, tiny_encoder, provenance, options, encode):
    prompts = {"query": "find:\n", "document": "a `text`: "}
    save_sentence_transformer(tiny_encoder, tmp_path / "model", prompts=prompts, **options)
    card = model_card(tmp_path / "model", provenance("ckd"))
    assert "model.encode_query(" in card and "needs no prompts" not in card
    for name, text in (("encode_query", '"find:\\n"'), ("encode_document", '"a \\u0060text\\u0060: "'), ("encode", encode)):
        assert f"- `{name}` puts `{text}` before a text." in card
    save_sentence_transformer(tiny_encoder, tmp_path / "plain")
    plain = model_card(tmp_path / "plain", provenance("ckd"))
    assert "It needs no prompts" in plain and "encode_query" not in plain


def test_the_stages_before_are_named_with_their_settings_and_data_and_no_path_of_the_users_files(tmp_path, provenance):
    provenance("ckd", "ckd.lr=0.5")
    provenance("finetune", "finetune.init=ckd", f"finetune.triplets={tmp_path}/pairs.jsonl")
    made_from = provenance("hpd", "hpd.init=finetune")
    card = model_card(tmp_path / "none", made_from)
    assert "Stages: `ckd`, then `finetune`, then `hpd`; their settings" in card and str(tmp_path) not in card
    recipe = yaml.safe_load(card.split("## Recipe\n\n```yaml\n")[1].split("```")[0])
    assert list(recipe) == ["ckd", "finetune", "hpd"]
    assert recipe["ckd"]["lr"] == 0.5 and recipe["finetune"]["triplets"] == "pairs.jsonl"


def test_the_name_of_a_source_is_text_and_no_markup(tmp_path, provenance):
    name = "a [link](http://x) <b>`code`\n# heading.txt"
    card = model_card(tmp_path / "none", replace(provenance("ckd"), sources=[f"/data/{name}"]))
    assert r"from x\) \<b\>\`code\` \# heading.txt." in card  # what follows the last slash


def test_each_client_is_told_which_output_to_take(folder, provenance):
    card = model_card(folder, provenance("hpd"))
    assert 'model.model_card_data.model_name = "tiny/hpd"' in card and "`sentence_embedding` of `AutoModel`" in card
    assert "llama.cpp and txtai" in card and "affine codes" in card and 'backend="onnx"' in card


def test_files_sizes_and_cosines_are_those_of_the_folder(folder, provenance):
    card = model_card(folder, provenance("hpd"))
    lines = card.splitlines()
    assert "| `model.safetensors` | the encoder's weights, float32 | 2 MB |" in lines
    assert any(line.startswith("| `onnx/model_quantized.onnx` |") and line.endswith("| 500 kB |") for line in lines)
    assert any(line.startswith("| the rest |") for line in lines) and "On disk: 2.5 MB." in lines
    assert "on 1,000 texts: onnx-int8 0.99877 (mean 0.99970)." in card and "README.md`" not in card
    assert "- dimensions: 16, L2-normalised; similarity function: cosine" in lines and "- parameters: 123,456" in lines
    assert "onnx" in front_of(card)["tags"] and 'f"{folder}/onnx/model_quantized.onnx"' in card


def test_text_is_counted_and_nested_sizes_are_named_where_there_are_any(tmp_path, provenance):
    card = model_card(tmp_path / "none", provenance("hpd"))
    assert "- too short: 10" in card.splitlines() and "truncate_dim=8" in card
    assert "truncate_dim" not in model_card(tmp_path / "none", provenance("ckd"))


def test_results_are_a_row_for_each_value_with_its_interval():
    section = results_section("hpd", {"ckd": PLAIN, "hpd": RESULTS})
    assert [line for line in section.splitlines() if line.startswith("| ")] == [
        "|  | hpd |",
        "| --- | ---: |",
        "| parameters | 22,700,000 |",
        "| dimensions | 16 |",
        "| bytes per vector | 64 |",
        "| fidelity: Spearman, all pairs | 0.912 |",
        "| fidelity: Spearman, 50 nearest | 0.800 |",
        "| fidelity: 10 nearest shared | 0.650 |",
        "| STS: STS12 | 72.37 [70.91, 73.85] |",
        "| STS: average | 72.37 [70.90, 73.80] |",
        "| retrieval: scifact, ndcg@10 | 0.641 [0.600, 0.680] |",
        "| transfer: sst2, accuracy | 0.870 |",
    ]
    assert "on 2,000 held-out texts. STS is Spearman x 100; the average is of STS12. In brackets: 95%" in section


def test_the_teacher_and_the_nested_sizes_are_in_the_results_and_no_other_model_is():
    teacher = PLAIN.model_copy(update={"sts": {"STSB": 83.0, "AVG": 83.0, "AVG_OF": ["STSB"]}})
    everything = {"teacher": teacher, "ckd": PLAIN, "hpd": RESULTS, "hpd-8": PLAIN, "hpd-pca-4": PLAIN}
    rows = [line for line in results_section("hpd", everything).splitlines() if line.startswith("| ")]
    assert rows[0] == "|  | hpd | hpd-8 | teacher |"
    assert "| dimensions | 16 | 8 | 8 |" in rows and "| STS: STSB | - | - | 83.00 |" in rows
    assert "| STS: STS12 | 72.37 [70.91, 73.85] | - | - |" in rows


def evaluated(tmp_path, tiny_encoder, folder, provenance):
    """The config of a run whose ckd is exported and has its card with RESULTS; hpd is not."""
    provenance("ckd")
    config = load_config(write_config(tmp_path, tiny_encoder), ["stages=[ckd, hpd]"])
    (config.run_dir / "export").mkdir()
    folder.rename(config.run_dir / "export/ckd")
    write_model_cards(config, {"ckd": RESULTS})
    return config


def test_the_report_replaces_the_card_of_each_exported_folder_that_is_there(tmp_path, tiny_encoder, folder, provenance):
    config = evaluated(tmp_path, tiny_encoder, folder, provenance)
    card = (config.run_dir / "export/ckd/README.md").read_text()
    assert card.count("## Results") == 1 and card.index("## Recipe") < card.index("## Results")
    assert "onnx/model_quantized.onnx" in card and "| STS: average | 72.37 [70.90, 73.80] |" in card
    assert not (config.run_dir / "export/hpd").exists()
    write_model_cards(config, {"ckd": RESULTS})
    assert (config.run_dir / "export/ckd/README.md").read_text() == card


def test_the_front_matter_has_the_results_in_the_hubs_own_format(tmp_path, tiny_encoder, folder, provenance):
    config = evaluated(tmp_path, tiny_encoder, folder, provenance)
    found = {
        (result.task_type, result.dataset_name, result.metric_type): result.metric_value
        for result in ModelCard.load(config.run_dir / "export/ckd/README.md").data.eval_results
    }
    assert found == {
        ("semantic-similarity", "STS12", "spearman_cosine"): 0.7237,
        ("information-retrieval", "scifact", "cosine_ndcg@10"): 0.6412,
        ("text-classification", "sst2", "accuracy"): 0.87,
    }
    assert model_index("tiny/ckd", None) == model_index("tiny/ckd", PLAIN) == []


def test_the_samples_of_every_stage_of_the_chain_are_told(tmp_path, provenance):
    made_from = replace(provenance("ckd"), earlier={"ckd": {}}, stage="hpd", samples={"ckd": 102_400, "hpd": 512})
    assert "Stages: `ckd` (102,400 samples), then `hpd` (512 samples);" in model_card(tmp_path / "none", made_from)
