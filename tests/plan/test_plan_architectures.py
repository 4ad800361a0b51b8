"""Architectures of hub names come from the hub's cache; the hub is never contacted."""

from __future__ import annotations

import json
import shutil

import pytest
from huggingface_hub import constants

from distill.plan.architectures import architecture_of

NAME = "nobody/has-a-dense-layer"


@pytest.fixture
def snapshot(tmp_path, tiny_encoder, monkeypatch):
    """A sentence-transformers model in the hub's cache, without weights."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--nobody--has-a-dense-layer"
    folder = model / "snapshots/abc"
    (folder / "2_Dense").mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs/main").write_text("abc")
    shutil.copy(tiny_encoder / "config.json", folder)
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules.append({"path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Dense/config.json").write_text(json.dumps({"in_features": 32, "out_features": 20}))
    return folder


def test_the_dense_module_of_a_cached_model_sets_the_width_of_its_vectors(snapshot):
    found = architecture_of(NAME)
    assert (found.dim, found.config.hidden_size) == (20, 32)


def test_the_width_of_a_cached_model_without_its_dense_module_is_not_guessed(snapshot):
    (snapshot / "2_Dense/config.json").unlink()
    with pytest.raises(ValueError, match=r"encoders\.yaml"):
        architecture_of(NAME)


def test_vectors_of_a_plain_cached_encoder_have_its_hidden_size(snapshot):
    (snapshot / "modules.json").unlink()
    assert architecture_of(NAME).dim == 32


def test_texts_are_truncated_where_the_model_says_and_its_positions_allow(snapshot):
    lengths = []
    for stated in (16, 1 << 30, None):
        (snapshot / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": stated}))
        lengths.append(architecture_of(NAME).max_length)
    (snapshot / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1e30}))
    lengths.append(architecture_of(NAME).max_length)
    (snapshot / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 48}))
    assert [*lengths, architecture_of(NAME).max_length] == [16, 64, 64, 64, 48]
    assert architecture_of("sentence-transformers/sentence-t5-xxl").max_length == 256


def test_the_hub_is_not_contacted(snapshot, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    with pytest.raises(ValueError, match="hf download nobody/else"):
        architecture_of("nobody/else")
