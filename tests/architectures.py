"""Tiny models with random weights of architectures that no other helper makes, as sentence-transformers folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from torch import nn

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
DECODER = {"num_key_value_heads": 1, "head_dim": 16, "bos_token_id": 2, "eos_token_id": 3}
ARCHITECTURES = {
    "electra": ("Electra", SIZES | {"embedding_size": 16}, "cls"),  # narrower embeddings
    "eurobert": ("EuroBert", SIZES | {"num_key_value_heads": 2}, "mean"),  # a bidirectional Llama
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 4, "n_head": 2}, "weightedmean"),  # SGPT: absolute positions, padded on the left
    "longformer": ("Longformer", SIZES | {"attention_window": 8}, "mean"),  # takes no embedded tokens
    "mistral": ("Mistral", SIZES | DECODER | {"sliding_window": 8}, "lasttoken"),
    "nomic-bert": ("NomicBert", SIZES, "mean"),  # rotary positions in an encoder
    "umt5": ("UMT5", {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 4, "num_heads": 2}, "mean"),  # the half of one
}


def make_architecture(name: str, tokenizer_folder: Path, folder: Path) -> Path:
    """A model of ARCHITECTURES with a Dense of its own, prompts and, for decoders, padding on the left."""
    family, sizes, pooling = ARCHITECTURES[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    common = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": tokenizer.pad_token_id}
    config = getattr(transformers, f"{family}Config")(**sizes, **common)
    torch.manual_seed(0)
    encoder = getattr(transformers, f"{family}EncoderModel" if name == "umt5" else f"{family}Model")(config).eval()
    for module in encoder.modules():  # with the usual deviation of 0.02, all vectors are nearly the same
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
    encoder.save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    side = "left" if pooling in ("weightedmean", "lasttoken") else "right"
    path = folder / "plain/tokenizer_config.json"
    keys = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | keys | {"padding_side": side}), "utf-8")
    transformer = Transformer(str(folder / "plain"), max_seq_length=48)
    dense = Dense(32, 24, activation_function=nn.Tanh())
    modules = [transformer, Pooling(32, pooling_mode=pooling), dense, Normalize()]
    prompts = {"query": "find the model of: ", "document": "title: none text: "}
    SentenceTransformer(modules=modules, device="cpu", prompts=prompts).save(str(folder / name), create_model_card=False)
    return folder / name
