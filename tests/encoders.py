"""Tiny encoders with random weights, one per tested architecture, with the vocabulary of the fixture `tiny_encoder`."""

from __future__ import annotations

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2Model,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

from distill.student.initial import build_student
from distill.student.student_config import StudentConfig

FAMILIES = ("bert", "roberta", "mpnet", "distilbert", "t5")
ROTARY = ("qwen2", "llama", "modernbert")
POSITIONS = 40


def encoder_and_tokenizer(
    config: StudentConfig, teacher: str | None, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Those of the student that a config describes."""
    student = build_student(config, teacher, seed)
    return student.encoder, student.tokenizer


def make_family(family: str, *, layers: int = 3, vocabulary: int = 120, seed: int = 0) -> PreTrainedModel:
    """An encoder of width 16 with room for POSITIONS tokens (T5 has no limit), in eval mode."""
    torch.manual_seed(seed)
    heads = {"num_hidden_layers": layers, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    common = {"vocab_size": vocabulary, "pad_token_id": padding_of(family)}
    if family == "bert":
        model = BertModel(BertConfig(**heads, **common, max_position_embeddings=POSITIONS))
    elif family == "roberta":
        model = RobertaModel(RobertaConfig(**heads, **common, max_position_embeddings=POSITIONS + 2, type_vocab_size=1))
    elif family == "mpnet":
        model = MPNetModel(MPNetConfig(**heads, **common, max_position_embeddings=POSITIONS + 2))
    elif family == "distilbert":
        model = DistilBertModel(
            DistilBertConfig(dim=16, hidden_dim=32, n_layers=layers, n_heads=2, max_position_embeddings=POSITIONS, **common)
        )
    elif family == "t5":
        model = T5EncoderModel(
            T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=layers, num_heads=2, relative_attention_num_buckets=8, **common)
        )
    elif family == "modernbert":
        rope = {"full_attention": {"rope_type": "default", "rope_theta": 500.0}}
        model = ModernBertModel(
            ModernBertConfig(**heads, **common, max_position_embeddings=POSITIONS, local_attention=8, rope_parameters=rope)
        )
    else:
        config, kind = {"qwen2": (Qwen2Config, Qwen2Model), "llama": (LlamaConfig, LlamaModel)}[family]
        rope = {"rope_type": "default", "rope_theta": 500.0}
        model = kind(config(**heads, **common, num_key_value_heads=1, max_position_embeddings=POSITIONS, rope_parameters=rope))
    for parameter in model.parameters():  # the default initial weights are too small for a wrong one to show
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def padding_of(family: str) -> int:
    """The padding token's id; RoBERTa and MPNet number positions from it."""
    return 1 if family in ("roberta", "mpnet") else 0


def save_family(family: str, tiny_encoder: Path, folder: Path, **options: int) -> Path:
    """The encoder as an ordinary folder with a tokenizer of tiny_encoder's words."""
    make_family(family, **options).save_pretrained(folder)
    words = (tiny_encoder / "vocab.txt").read_text().split()
    if padding_of(family) == 1:
        words[:2] = words[1], words[0]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def save_sentence_transformer(encoder: Path, folder: Path, **options: object) -> Path:
    """The encoder with mean pooling as a sentence-transformers folder; options: prompts, default_prompt_name, truncate_dim."""
    transformer = Transformer(str(encoder))
    modules = [transformer, Pooling(transformer.get_embedding_dimension())]
    SentenceTransformer(modules=modules, device="cpu", **options).save(str(folder))
    return folder
