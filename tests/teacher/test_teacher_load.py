"""A teacher that cannot encode every text is refused when it is loaded; architectures that need care encode."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from conftest import sentences
from encoders import POSITIONS, save_family
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from tokenizers import Tokenizer
from transformers import BertTokenizerFast, DebertaV2Config, DebertaV2Model, MT5Config, MT5EncoderModel

from distill.teacher.encoder import Teacher
from distill.teacher.teacher_config import TeacherConfig

LONG = " ".join(["the model reads a tensor from a queue of keys"] * 20)


def vectors_of(texts, **config):
    return Teacher(TeacherConfig(**config), torch.device("cpu"), None)(texts)


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
def test_a_text_longer_than_the_positions_is_cut_to_them_and_a_longer_max_length_is_refused(tiny_encoder, tmp_path, family):
    folder = save_family(family, tiny_encoder, tmp_path / family)  # its tokenizer names no limit
    assert np.isfinite(vectors_of([LONG], model=str(folder), pooling="mean")).all()
    assert np.isfinite(vectors_of([LONG], model=str(folder), pooling="mean", max_length=POSITIONS)).all()
    with pytest.raises(ValueError, match=rf"max_length {POSITIONS + 1} is above the {POSITIONS} positions of {folder}"):
        vectors_of([LONG], model=str(folder), pooling="mean", max_length=POSITIONS + 1)


def test_a_static_model_has_no_max_length(tiny_encoder, tmp_path):
    tokenizer = Tokenizer.from_file(str(tiny_encoder / "tokenizer.json"))
    module = StaticEmbedding(tokenizer, embedding_weights=np.ones((tokenizer.get_vocab_size(), 4), np.float32))
    SentenceTransformer(modules=[module], device="cpu").save(str(tmp_path / "static"))
    assert vectors_of(["the model"], model=str(tmp_path / "static")).shape == (1, 4)
    with pytest.raises(ValueError, match=r"teacher\.max_length 8: .*static reads whole texts, of any length; leave it out"):
        vectors_of(["the model"], model=str(tmp_path / "static"), max_length=8)


def test_a_tokenizer_with_more_tokens_than_the_encoder_embeds_is_refused(tiny_encoder, tmp_path):
    folder = shutil.copytree(tiny_encoder, tmp_path / "model")
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens([f"word{number}" for number in range(9)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"its tokenizer has \d+ tokens, and its encoder embeds \d+: they are not of one model"
    ):
        vectors_of(["a"], model=str(folder), pooling="mean")


@pytest.mark.parametrize("has_modules", [True, False])
def test_a_layer_without_weights_is_refused_and_never_initialised_at_random(tiny_encoder, tmp_path, has_modules):
    folder = shutil.copytree(tiny_encoder, tmp_path / "model")
    if has_modules:
        encoder = Transformer(str(tiny_encoder))
        SentenceTransformer(modules=[encoder, Pooling(32, "mean")], device="cpu").save_pretrained(str(folder))
    weights = {name: value for name, value in load_file(folder / "model.safetensors").items() if ".layer.1." not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no weights for 16 parts of its encoder, the first is encoder\.layer\.1\."):
        vectors_of(["a"], model=str(folder), pooling=None if has_modules else "mean")


def test_git_lfs_pointers_instead_of_weights_are_named(tiny_encoder, tmp_path):
    folder = shutil.copytree(tiny_encoder, tmp_path / "model")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match=rf"{folder}/model.safetensors is a git-lfs pointer.*git lfs pull"):
        vectors_of(["a"], model=str(folder), pooling="mean")


def test_an_encoder_whose_decoder_has_no_weights_encodes(tiny_encoder, tmp_path):
    folder = shutil.copytree(tiny_encoder, tmp_path / "mt5")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 120, "pad_token_id": 0}
    MT5EncoderModel(MT5Config(**sizes)).save_pretrained(folder)
    assert vectors_of(sentences(3), model=str(folder), pooling="mean").shape == (3, 16)
    weights = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in weights.items() if ".block.1." not in name}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no weights for \d+ parts of its encoder, the first is encoder\.block\.1\."):
        vectors_of(["a"], model=str(folder), pooling="mean")


def test_deberta_encodes(tiny_encoder, tmp_path):
    folder = shutil.copytree(tiny_encoder, tmp_path / "deberta")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 120}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    DebertaV2Model(DebertaV2Config(**sizes, **relative, pad_token_id=0)).save_pretrained(folder)
    assert vectors_of(sentences(3), model=str(folder), pooling="mean").shape == (3, 16)
