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
from distill.student.encoder import hidden_size
from distill.student.pooling import NEEDS_HIDDEN_STATES, OVER_TOKENS, modes_of
from distill.student.settings import layer_weights

TOKEN_POOLING = {
    **{mode: mode for mode in OVER_TOKENS},
    "pooler": "cls",  # and its dense + tanh after
    "first_last_mean": "mean",
    "last2_mean": "mean",
    "last4_mean": "mean",
    "all_mean": "mean",
    "last4_max": "max",
}
"""sentence-transformers' pooling over tokens for each of the student's; WeightedLayerPooling before it selects the layers."""


def check_pooling(pooling: str) -> None:
    """Raises ValueError if sentence-transformers has no modules for a student's pooling."""
    modes = modes_of(pooling)
    if modes and modes != (ordered := [mode for mode in OVER_TOKENS if mode in modes]):
        raise ValueError(
            f"the pooling {pooling} cannot be exported: sentence-transformers before 6 has these modes in another order; use"
            f" {'+'.join(ordered)}"
        )
    if not modes and pooling not in TOKEN_POOLING:
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
    model = SentenceTransformer(
        modules=modules,
        device="cpu",
        similarity_fn_name="cosine",
        prompts={**student.settings.prompts, "query": student.prompt("query"), "document": student.prompt("document")},
        default_prompt_name=student.settings.default_prompt_name,
    )
    model.save(str(folder), create_model_card=False)
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    own = student.tokenizer
    tokenizer.enable_truncation(student.max_length, direction=own.truncation_side)
    tokenizer.enable_padding(direction=own.padding_side, pad_id=own.pad_token_id, pad_token=own.pad_token)
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
    width = hidden_size(student.encoder.config)
    if hidden:
        depth = student.encoder.config.num_hidden_layers
        weights = nn.Parameter(layer_weights(student.pooling, depth))
        modules.append(WeightedLayerPooling(width, num_hidden_layers=depth, layer_start=1, layer_weights=weights))
    modes = modes_of(student.pooling) or [TOKEN_POOLING[student.pooling]]
    modules.append(Pooling(width, pooling_mode=tuple(modes), include_prompt=student.settings.include_prompt))
    if student.pooling == "pooler":
        pooler = student.encoder.get_submodule("pooler.dense")
        assert isinstance(pooler, nn.Linear)
        modules.append(_dense(pooler, nn.Tanh()))
    modules += student.dense
    last: nn.Linear | None = None
    activation: nn.Module = nn.Identity()
    if student.head is not None:
        last = student.head[0]  # type: ignore[assignment]
        activation = nn.Tanh() if len(student.head) > 1 else activation
    elif student.width < student.full_width:
        last = nn.Linear(student.width, student.width, bias=False)
        nn.init.eye_(last.weight)
    if last is not None:
        modules.append(_dense(_of_all_dimensions(last, student.full_width), activation))
    return [*modules, Normalize()]


def _of_all_dimensions(linear: nn.Linear, width: int) -> nn.Linear:
    """A layer of the first dimensions as one of all: sentence-transformers cuts vectors only after they were normalised, and
    other clients not at all."""
    whole = nn.Linear(width, linear.out_features, bias=linear.bias is not None)
    with torch.no_grad():
        whole.weight.zero_()[:, : linear.in_features] = linear.weight
        if linear.bias is not None:
            whole.bias.copy_(linear.bias)
    return whole


def _dense(linear: nn.Linear, activation: nn.Module) -> Dense:
    return Dense(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        activation_function=activation,
        init_weight=linear.weight,
        init_bias=linear.bias,
    )
