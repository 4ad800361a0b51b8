"""The JSON files of an export have the keys that older sentence-transformers, vLLM, TEI and fastembed read."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from encoders import ROTARY, save_family
from sentence_transformers import SentenceTransformer
from students import MAX_LENGTH, TEXTS, export, make_student
from transformers import AutoTokenizer

MODES = {f"pooling_mode_{mode}": False for mode in ("mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")}


def read(folder, *names):
    return [json.loads((folder / name).read_text()) for name in names]


@pytest.fixture(scope="module")
def pooler(tmp_path_factory, tiny_encoder):
    """The export of a student with the encoder's own pooler and a head: Pooling and two Dense modules."""
    work = tmp_path_factory.mktemp("pooler")
    make_student(work / "student", tiny_encoder, pooling="pooler", head="linear")
    export(work / "student", work / "export")
    return work / "export"


def test_modules_have_the_names_of_versions_3_to_5(pooler):
    (modules,) = read(pooler, "modules.json")
    assert [module["type"] for module in modules] == [
        f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Dense", "Dense", "Normalize")
    ]


def test_pooling_has_a_boolean_for_each_mode_and_dense_its_sizes_and_activation(pooler):
    pooling, first, second = read(pooler, "1_Pooling/config.json", "2_Dense/config.json", "3_Dense/config.json")
    assert pooling == MODES | {
        "word_embedding_dimension": 32,
        "pooling_mode_cls_token": True,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_max_tokens": False,
        "include_prompt": True,
    }
    sizes = {"in_features": 32, "out_features": 32, "bias": True}
    assert first == sizes | {"activation_function": "torch.nn.modules.activation.Tanh"}
    assert second == sizes | {"out_features": 8, "activation_function": "torch.nn.modules.linear.Identity"}


def test_layer_pooling_precedes_pooling_with_the_older_name_of_its_width(tiny_encoder, tmp_path):
    make_student(tmp_path / "student", tiny_encoder, pooling="last4_max")
    export(tmp_path / "student", tmp_path / "export")
    layers, pooling = read(tmp_path / "export", "1_WeightedLayerPooling/config.json", "2_Pooling/config.json")
    assert layers == {"word_embedding_dimension": 32, "layer_start": 1, "num_hidden_layers": 3}
    assert [key for key, value in pooling.items() if value is True] == ["pooling_mode_max_tokens", "include_prompt"]


def test_the_tokenizer_of_every_version_is_tokenizer_json_as_it_is(pooler):
    sentence, config, special = read(pooler, "sentence_bert_config.json", "tokenizer_config.json", "special_tokens_map.json")
    assert sentence == {"max_seq_length": MAX_LENGTH, "do_lower_case": False}
    assert special == {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    expected = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right", "truncation_side": "right"}
    assert config == config | special | expected | {"model_max_length": MAX_LENGTH}
    assert list(AutoTokenizer.from_pretrained(pooler)(TEXTS[:2])) == config["model_input_names"]


def test_a_tokenizer_that_truncates_on_the_left_keeps_the_end_in_training_and_in_the_export(tiny_encoder, tmp_path):
    shutil.copytree(tiny_encoder, tmp_path / "left")
    path = tmp_path / "left/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation_side": "left", "padding_side": "left"}))
    student = make_student(tmp_path / "student", tmp_path / "left")
    long, end = TEXTS[-1], " ".join(TEXTS[-1].split()[-8:])
    assert student.token_ids([long])[0][-9:] == student.token_ids([end])[0][-9:]
    export(tmp_path / "student", tmp_path / "export")
    loaded = SentenceTransformer(str(tmp_path / "export"), device="cpu")
    assert np.allclose(loaded.encode(TEXTS), student.encode(TEXTS), atol=1e-5)
    assert loaded.tokenizer.truncation_side == "left"
    assert loaded.tokenizer.padding_side == "right"  # with absolute positions, a vector would depend on the texts beside it


@pytest.mark.parametrize("family", ROTARY)
def test_rotary_positions_have_their_names_of_transformers_4_as_well(family, tiny_encoder, tmp_path):
    make_student(tmp_path / "student", save_family(family, tiny_encoder, tmp_path / family))
    (before,) = read(tmp_path / "student", "config.json")
    (tmp_path / "student/config.json").write_text(json.dumps(before | {"pad_token_id": None}))
    assert export(tmp_path / "student", tmp_path / "export")["sentence-transformers"].worst > 0.99999
    (after,) = read(tmp_path / "export", "config.json")
    assert after["rope_parameters"] == before["rope_parameters"] and after["pad_token_id"] == 0
    older = {key: after[key] for key in ("rope_theta", "global_rope_theta", "local_rope_theta") if key in after}
    assert older == ({"global_rope_theta": 500, "local_rope_theta": 10000} if family == "modernbert" else {"rope_theta": 500})
