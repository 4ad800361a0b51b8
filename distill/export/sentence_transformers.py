"""A student as sentence-transformers' own modules: SentenceTransformer(path).encode gives the student's vectors."""

from __future__ import annotations

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer, WeightedLayerPooling
from tokenizers import Tokenizer
from torch import nn

from distill.export.compatibility import rewrite_for_clients
from distill.student import Student
from distill.student.pooling import NEEDS_HIDDEN_STATES, SLICES

TOKEN_POOLING = {
    "mean": "mean",
    "cls": "cls",
    "pooler": "cls",  # and its dense + tanh after
    "max": "max",
    "first_last_mean": "mean",
    "last2_mean": "mean",
    "last4_mean": "mean",
    "all_mean": "mean",
    "last4_max": "max",
}
"""sentence-transformers' pooling over tokens for each of the student's; WeightedLayerPooling before it selects the layers."""


def check_pooling(pooling: str) -> None:
    """Raises ValueError if sentence-transformers has no modules for a student's pooling."""
    if pooling not in TOKEN_POOLING:
        raise ValueError(
            f"student.pooling {pooling} cannot be exported: sentence-transformers has no module for it;"
            f" it has for {', '.join(TOKEN_POOLING)}"
        )


def save_sentence_transformers(student: Student, student_dir: Path, folder: Path) -> None:
    """Writes the student, which was loaded from `student_dir`, into `folder`, without a README.md.

    tokenizer.json truncates and pads as the student does, so that it also works without sentence-transformers; the other JSON
    files are those of compatibility.py. Raises ValueError if a pooling has no module.
    """
    modules = _modules(student, student_dir)
    model = SentenceTransformer(modules=modules, device="cpu", similarity_fn_name="cosine")
    model.save(str(folder), create_model_card=False)
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.enable_truncation(student.max_length)
    padding = student.tokenizer
    tokenizer.enable_padding(direction="right", pad_id=padding.pad_token_id, pad_token=padding.pad_token)
    tokenizer.save(path)
    rewrite_for_clients(folder, student)


def _modules(student: Student, student_dir: Path) -> list[nn.Module]:
    check_pooling(student.pooling)
    hidden = student.pooling in NEEDS_HIDDEN_STATES
    no_code = {"trust_remote_code": False}
    transformer = Transformer(
        str(student_dir),
        max_seq_length=student.max_length,
        model_kwargs={"use_safetensors": True, "dtype": torch.float32, **no_code},
        processor_kwargs=dict(no_code),
        config_kwargs={**no_code, **({"output_hidden_states": True} if hidden else {})},
    )
    modules: list[nn.Module] = [transformer]
    if hidden:
        depth = student.encoder.config.num_hidden_layers
        weights = layer_weights(student.pooling, depth)
        modules.append(
            WeightedLayerPooling(student.width, num_hidden_layers=depth, layer_start=1, layer_weights=nn.Parameter(weights))
        )
    modules.append(Pooling(student.width, pooling_mode=TOKEN_POOLING[student.pooling]))
    if student.pooling == "pooler":
        pooler = student.encoder.get_submodule("pooler.dense")
        assert isinstance(pooler, nn.Linear)
        modules.append(_dense(pooler, nn.Tanh()))
    if student.head is not None:
        linear = student.head[0]
        assert isinstance(linear, nn.Linear)
        modules.append(_dense(linear, nn.Tanh() if len(student.head) > 1 else nn.Identity()))
    return [*modules, Normalize()]


def _dense(linear: nn.Linear, activation: nn.Module) -> Dense:
    return Dense(
        linear.in_features,
        linear.out_features,
        activation_function=activation,
        init_weight=linear.weight,
        init_bias=linear.bias,
    )


def layer_weights(pooling: str, depth: int) -> torch.Tensor:
    """The weight of each of `depth` layers in a pooling of several layers, [depth]; they need not sum to 1."""
    weights = torch.zeros(depth)
    for layer in SLICES[pooling](list(range(depth))):
        weights[layer] = 1.0
    return weights
