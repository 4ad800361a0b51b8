"""A student has the settings of the model that it begins with: modules after the pooling, prompts, lengths, lower case."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import sentences
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, Transformer
from students import export, make_student
from torch import nn

from distill.export.sentence_transformers import check_pooling
from distill.student import Student
from distill.student.initial import build_student, describe_initial
from distill.student.settings import ModelSettings, read_settings
from distill.student.student_config import StudentConfig

TEXTS = [*sentences(12), "In Capitals", "key " * 40]
PROMPTS = {"query": "find the: ", "passage": "read: ", "STS": "of: "}


def write_model(encoder, folder, *modules, mode="mean", lowercases=False, include_prompt=True, **options):
    """A sentence-transformers folder around an encoder of width 8."""
    transformer = Transformer(str(encoder), max_seq_length=24, do_lower_case=lowercases)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=mode, include_prompt=include_prompt)
    model = SentenceTransformer(modules=[transformer, pooling, *modules], device="cpu", **options)
    model.save(str(folder), create_model_card=False)
    return folder


def of(folder, **changes):
    return build_student(StudentConfig(init=str(folder), **changes), None, 0).eval()


def expected(folder, prompt=""):
    model = SentenceTransformer(str(folder), device="cpu")
    return model.encode(TEXTS, prompt=prompt, normalize_embeddings=True, show_progress_bar=False)


def width_of(encoder):
    return int(json.loads((encoder / "config.json").read_text())["hidden_size"])


@pytest.mark.parametrize("mode", ["cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens", ("max", "mean")])
def test_every_mode_of_sentence_transformers_is_kept_saved_and_exported(mode, tiny_encoder, tmp_path):
    folder = write_model(tiny_encoder, tmp_path / "model", mode=mode)
    student = of(folder)
    assert np.allclose(student.encode(TEXTS), expected(folder), atol=1e-5)
    (tmp_path / "student").mkdir()
    student.save(tmp_path / "student", student.state_dict())
    assert np.array_equal(Student.load(tmp_path / "student").eval().encode(TEXTS), student.encode(TEXTS))
    export(tmp_path / "student", tmp_path / "export")
    assert np.allclose(expected(tmp_path / "export"), student.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize("truncate_dim", [None, 5])
@pytest.mark.parametrize("head", [None, "tanh"])
def test_dense_layers_and_truncation_are_kept_saved_and_exported(head, truncate_dim, tiny_encoder, tmp_path):
    width = width_of(tiny_encoder)
    wide, narrow = Dense(width, 12, activation_function=nn.GELU()), Dense(12, 6, bias=False, activation_function=nn.Identity())
    folder = write_model(tiny_encoder, tmp_path / "model", wide, Normalize(), narrow, Normalize(), truncate_dim=truncate_dim)
    student = of(folder)
    assert student.width == (truncate_dim or 6)
    assert np.allclose(student.encode(TEXTS), expected(folder), atol=1e-5)
    if head:
        student.add_head(4, head, seed=0)
    (tmp_path / "student").mkdir()
    student.save(tmp_path / "student", student.state_dict())
    loaded = Student.load(tmp_path / "student").eval()
    assert np.array_equal(loaded.encode(TEXTS), student.encode(TEXTS))
    export(tmp_path / "student", tmp_path / "export", "onnx")
    assert np.allclose(expected(tmp_path / "export"), student.encode(TEXTS), atol=1e-5)


def test_dense_layers_are_trained_with_the_encoder(tiny_encoder, tmp_path):
    student = of(write_model(tiny_encoder, tmp_path / "model", Dense(width_of(tiny_encoder), 6)))
    student(student.tokenize(TEXTS)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in student.dense.parameters())


def test_prompts_are_kept_by_role_and_exported_under_the_names_that_clients_take(tiny_encoder, tmp_path):
    folder = write_model(tiny_encoder, tmp_path / "model", prompts=PROMPTS, default_prompt_name="STS")
    student = of(folder)
    assert [student.prompt(role) for role in (None, "query", "document")] == ["of: ", "find the: ", "read: "]
    for role in (None, "query", "document"):
        assert np.allclose(student.encode(TEXTS, roles=[role] * len(TEXTS)), expected(folder, student.prompt(role)), atol=1e-5)
    (tmp_path / "student").mkdir()
    student.save(tmp_path / "student", student.state_dict())
    assert Student.load(tmp_path / "student").settings.prompts == student.settings.prompts
    export(tmp_path / "student", tmp_path / "export")
    exported = SentenceTransformer(str(tmp_path / "export"), device="cpu")
    assert exported.prompts == {**PROMPTS, "document": "read: "} and exported.default_prompt_name == "STS"
    assert np.allclose(exported.encode_query(TEXTS), student.encode(TEXTS, roles=["query"] * len(TEXTS)), atol=1e-5)
    assert np.allclose(exported.encode_document(TEXTS), student.encode(TEXTS, roles=["document"] * len(TEXTS)), atol=1e-5)
    assert np.allclose(exported.encode(TEXTS), student.encode(TEXTS), atol=1e-5)


def test_the_config_replaces_the_prompts(tiny_encoder, tmp_path):
    folder = write_model(tiny_encoder, tmp_path / "model", prompts=PROMPTS, default_prompt_name="STS")
    student = of(folder, prompts={"query": "q: "})
    assert [student.prompt(role) for role in (None, "query", "document")] == ["", "q: ", ""]


@pytest.mark.parametrize("mode", ["mean", "cls", "weightedmean"])
def test_a_prompt_that_the_pooling_leaves_out_is_left_out(mode, tiny_encoder, tmp_path):
    prompts = {"query": "the model reads: ", "document": ""}
    folder = write_model(tiny_encoder, tmp_path / "model", mode=mode, include_prompt=False, prompts=prompts)
    student = of(folder)
    for role in ("query", "document"):
        assert np.allclose(student.encode(TEXTS, roles=[role] * len(TEXTS)), expected(folder, prompts[role]), atol=1e-5)
    assert student.pad(student.token_ids(TEXTS, ["query"] * len(TEXTS)))["input_ids"].min() >= 0
    (tmp_path / "student").mkdir()
    student.save(tmp_path / "student", student.state_dict())
    export(tmp_path / "student", tmp_path / "export")
    exported = SentenceTransformer(str(tmp_path / "export"), device="cpu")
    assert np.allclose(exported.encode_query(TEXTS), student.encode(TEXTS, roles=["query"] * len(TEXTS)), atol=1e-5)
    with pytest.raises(ValueError, match=r"leaves out its prompts .* which a graph of tokens cannot"):
        export(tmp_path / "student", tmp_path / "onnx", "onnx")


def test_text_is_lower_cased_where_the_model_does_so(tiny_encoder, tmp_path):
    student = of(write_model(tiny_encoder, tmp_path / "model", lowercases=True))
    assert student.token_ids(["THE MODEL"]) == student.token_ids(["the model"])
    (tmp_path / "student").mkdir()
    student.save(tmp_path / "student", student.state_dict())
    loaded = Student.load(tmp_path / "student")
    assert loaded.token_ids(["THE MODEL"]) == student.token_ids(["the model"])


def test_the_longest_input_is_the_models_own_unless_the_config_names_one(tiny_encoder, tmp_path):
    folder = write_model(tiny_encoder, tmp_path / "model")
    assert of(folder).max_length == 24 and of(folder, max_length=12).max_length == 12


def test_another_pooling_replaces_the_pooling_alone(tiny_encoder, tmp_path):
    folder = write_model(tiny_encoder, tmp_path / "model", Dense(width_of(tiny_encoder), 6), mode="cls", prompts=PROMPTS)
    student = of(folder, pooling="mean")
    other = SentenceTransformer(str(folder), device="cpu")
    other[1].pooling_mode = "mean"
    assert np.allclose(student.encode(TEXTS), other.encode(TEXTS, normalize_embeddings=True), atol=1e-5)
    shown = describe_initial(StudentConfig(init=str(folder), pooling="mean"), student, folder)
    assert shown == (
        f"pooling mean (student.pooling; the model's own is cls); at most 24 tokens; Dense {width_of(tiny_encoder)} -> 6;"
        " prompts STS 'of: ', passage 'read: ', query 'find the: '"
    )
    with pytest.raises(ValueError, match=r"the pooling gives \d+ dimensions, but the model's Dense takes \d+"):
        of(folder, pooling="concat_last4_mean")


@pytest.mark.parametrize("pooling", ["first_last_mean", "last4_mean", "last4_max", "pooler"])
def test_an_exported_student_is_an_initial_model_again(pooling, tiny_encoder, tmp_path):
    student = make_student(tmp_path / "student", tiny_encoder, pooling=pooling, head="tanh")
    export(tmp_path / "student", tmp_path / "export")
    again = of(tmp_path / "export")
    assert np.allclose(again.encode(TEXTS), student.encode(TEXTS), atol=1e-5) and again.head is None


def test_new_weights_keep_the_settings_and_the_shapes(tiny_encoder, tmp_path):
    folder = write_model(tiny_encoder, tmp_path / "model", Dense(width_of(tiny_encoder), 6), mode="cls", prompts=PROMPTS)
    student, trained = of(folder, from_scratch=True), of(folder)
    assert student.pooling == "cls" and student.dim == 6 and student.prompt("query") == "find the: "
    assert not torch.equal(student.dense[0].linear.weight, trained.dense[0].linear.weight)
    assert torch.equal(student.dense[0].linear.weight, of(folder, from_scratch=True).dense[0].linear.weight)


def test_modes_in_an_order_that_folders_cannot_express_are_refused(tiny_encoder, tmp_path):
    student = of(write_model(tiny_encoder, tmp_path / "model", mode=("mean", "max")))
    assert np.allclose(student.encode(TEXTS), expected(tmp_path / "model"), atol=1e-5)
    with pytest.raises(ValueError, match=r"the pooling mean\+max cannot be exported: .* use max\+mean"):
        check_pooling(student.pooling)


def test_a_plain_encoder_has_no_settings(tiny_encoder):
    assert read_settings(tiny_encoder) == ModelSettings()
    assert of(tiny_encoder).pooling == "mean"


def test_modules_that_a_student_cannot_have_are_named(tiny_encoder, tmp_path):
    folder = write_model(tiny_encoder, tmp_path / "norm", LayerNorm(width_of(tiny_encoder)))
    with pytest.raises(ValueError, match="a student cannot have its module LayerNorm, but Transformer, WeightedLayerPooling"):
        of(folder)
    folder = write_model(tiny_encoder, tmp_path / "code", Dense(width_of(tiny_encoder), 6))
    path = folder / "2_Dense/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"activation_function": "os.system"}))
    with pytest.raises(ValueError, match=r"has the activation os\.system, which is none of torch.nn"):
        of(folder)
    folder = write_model(tiny_encoder, tmp_path / "tokens", Dense(width_of(tiny_encoder), 6))
    path = folder / "2_Dense/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"module_input_name": "token_embeddings"}))
    with pytest.raises(ValueError, match="its layer is of tokens, not of texts, as in a multi-vector model"):
        of(folder)
