"""A student gives the same vectors after it was saved and loaded; its tokens keep to the given length."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import make_encoder, sentences
from encoders import FAMILIES, encoder_and_tokenizer, save_family
from transformers import AutoTokenizer

from distill.student import Student
from distill.student.encoder import set_dropout
from distill.student.student import PooledVectors, load_extra
from distill.student.student_config import StudentConfig


def build(encoder, *, pooling="mean", max_length=32, layers=None):
    config = StudentConfig(init=str(encoder), pooling=pooling, layers=layers)
    return Student(*encoder_and_tokenizer(config, None, 0), pooling=pooling, max_length=max_length).eval()


def whole_state(student):
    """What `training` passes to save: parameters and buffers by name."""
    return dict(student.named_parameters()) | dict(student.named_buffers())


@pytest.mark.parametrize("head", [None, "tanh", "linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_gives_the_same_vectors_bit_for_bit(family, head, tiny_encoder, tmp_path):
    student = build(save_family(family, tiny_encoder, tmp_path / "base"), layers=[0, 2])
    if head:
        student.add_head(8, head, seed=3)
    set_dropout(student.encoder, 0.0)
    student.save(tmp_path / "student", whole_state(student))
    loaded = Student.load(tmp_path / "student").eval()
    texts = sentences(20)
    assert np.array_equal(loaded.encode(texts), student.encode(texts))
    assert loaded.dim == student.dim == (8 if head else 16)
    assert (loaded.pooling, loaded.max_length) == ("mean", 32)
    assert not [path.name for path in (tmp_path / "student").iterdir() if path.suffix in {".bin", ".pkl", ".pt"}]


def test_what_training_needs_again_is_kept_beside_the_head(tiny_encoder, tmp_path):
    student = build(tiny_encoder)
    student.add_head(8, "tanh", seed=0)
    extra = {"projection.weight": torch.randn(8, 32), "temperature.logit_scale": torch.ones(1)}
    student.save(tmp_path / "student", whole_state(student), extra)
    kept = load_extra(tmp_path / "student")
    assert kept.keys() == extra.keys() and all(torch.equal(kept[name], extra[name]) for name in extra)
    student.head = None
    student.save(tmp_path / "headless", whole_state(student))
    assert load_extra(tmp_path / "headless") == {}


def test_dropout_that_was_off_in_training_is_in_the_saved_config_as_it_was(tiny_encoder, tmp_path):
    student = build(tiny_encoder)
    set_dropout(student.encoder, 0.0)
    student.save(tmp_path / "student", whole_state(student))
    assert json.loads((tmp_path / "student/config.json").read_text())["hidden_dropout_prob"] == 0.1


def test_a_head_depends_on_its_seed_alone(tiny_encoder):
    heads = []
    for noise, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(noise)
        student = build(tiny_encoder)
        student.add_head(8, "tanh", seed)
        heads.append(student.head[0].weight.clone())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_folder_without_a_student_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no student at .*student\.json; run the stage"):
        Student.load(tmp_path)


def test_vectors_are_in_the_order_of_the_texts(tiny_encoder):
    student = build(tiny_encoder)
    texts = sentences(30)
    vectors = student.encode(texts, batch_size=4)
    assert np.allclose(vectors, np.concatenate([student.encode([text]) for text in texts]), atol=1e-6)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("max_length", [3, 8, 13, 30, 64])
def test_a_text_keeps_at_most_max_length_tokens(tiny_encoder, max_length):
    student = build(tiny_encoder, max_length=max_length)
    tokens = student.tokenize(["the model " * 100, "a query"])
    assert tokens["attention_mask"].sum(dim=1).tolist() == [max_length, min(4, max_length)]
    assert tokens["input_ids"].shape[1] % 4 == 0
    assert tokens["attention_mask"][1].tolist() == sorted(tokens["attention_mask"][1].tolist(), reverse=True)


def test_padding_never_reaches_beyond_the_encoders_positions(tmp_path):
    encoder = make_encoder(tmp_path / "odd")
    description = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(description | {"max_position_embeddings": 61}))
    config = StudentConfig(init=str(encoder), from_scratch=True)
    student = Student(*encoder_and_tokenizer(config, None, 0), pooling="mean", max_length=64).eval()
    assert student.tokenize(["the model " * 100])["input_ids"].shape == (1, 61)
    assert np.isfinite(student.encode(["the model " * 100, "a query"])).all()


def test_a_tokenizer_that_pads_on_the_left_is_made_to_pad_on_the_right(tiny_encoder):
    student = build(tiny_encoder)
    expected = student.encode(sentences(5))
    student.tokenizer.padding_side = "left"
    assert np.array_equal(student.encode(sentences(5)), expected)


def test_a_tokenizer_that_truncates_and_pads_on_the_left_is_saved_as_the_student_uses_it(tiny_encoder, tmp_path):
    shutil.copytree(tiny_encoder, tmp_path / "left")
    path = tmp_path / "left/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation_side": "left", "padding_side": "left"}))
    student = build(tmp_path / "left", max_length=8)
    student.save(tmp_path / "student", whole_state(student))
    texts = ["the model reads a tensor and " * 5, "a query"]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "student")(texts, truncation=True, max_length=8, padding=True)
    assert tokens["input_ids"] == student.tokenize(texts)["input_ids"].tolist()
    assert student.token_ids(texts) == build(tiny_encoder, max_length=8).token_ids(texts)


def test_the_tokenizer_is_called_from_several_threads_without_being_configured_again(tiny_encoder):
    student = build(tiny_encoder, max_length=8)
    batches = [sentences(200, seed=seed) for seed in range(8)]
    expected = [student.token_ids(texts) for texts in batches]
    before = student.tokenizer.backend_tokenizer.truncation, student.tokenizer.backend_tokenizer.padding
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(student.token_ids, batches * 4)) == expected * 4
    assert before == (student.tokenizer.backend_tokenizer.truncation, student.tokenizer.backend_tokenizer.padding)
    assert before[0]["max_length"] == 8 and before[1] is None


def test_precomputed_vectors_go_to_the_head_as_those_of_the_encoder_do(tiny_encoder):
    student = build(tiny_encoder)
    chunks = [student.tokenize(texts) for texts in (sentences(5), sentences(3, seed=1))]
    vectors = [PooledVectors(student(chunk)) for chunk in chunks]
    assert torch.equal(student(*vectors), torch.cat([each.vectors for each in vectors]))
    student.add_head(8, "tanh", seed=0)
    assert torch.allclose(student(*vectors), student(*chunks), atol=1e-6)


def test_a_student_that_does_not_say_whether_it_is_aligned_is_not(tiny_encoder, tmp_path):
    student = build(tiny_encoder)
    student.is_aligned = True
    student.save(tmp_path / "student", whole_state(student))
    assert Student.load(tmp_path / "student").is_aligned
    description = json.loads((tmp_path / "student/student.json").read_text())
    del description["is_aligned"]
    (tmp_path / "student/student.json").write_text(json.dumps(description))
    assert not Student.load(tmp_path / "student").is_aligned
