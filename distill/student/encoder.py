"""Initial encoders: a pretrained one, some of its layers, or its architecture with new weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)

from distill.run.model_folders import first_module, resolve_model
from distill.student.student_config import StudentConfig

NO_LIMIT = 1 << 20  # tokens, of an encoder without a table of positions
FROM_PADDING = {  # families that number positions from the padding token's id
    "camembert", "data2vec-text", "ibert", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
}  # fmt: skip


def build_encoder(config: StudentConfig, teacher: str | None, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The student's encoder in float32 and its tokenizer, as `config` says; new weights depend on `seed` alone.

    Raises ValueError if the model does not exist, is no transformer with a fast tokenizer that pads, or lacks a layer that
    `config` names.
    """
    if config.init == "teacher" and teacher is None:
        raise ValueError("student.init is teacher, but the config names no teacher.model; name an encoder in student.init")
    path = transformer_of(resolve_model(teacher if config.init == "teacher" and teacher else config.init))
    encoder = load_encoder(
        path,
        revision=config.revision,
        from_scratch=config.from_scratch,
        seed=seed,
        needs_pooler=config.pooling == "pooler",
    )
    if config.layers is not None:
        keep_layers(encoder, config.kept(encoder.config.num_hidden_layers))
    tokenizer = AutoTokenizer.from_pretrained(path, revision=config.revision, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ValueError(f"student.init: {path} has only a slow tokenizer; name a model with a tokenizer.json")
    lookup = encoder.get_input_embeddings()
    assert isinstance(lookup, nn.Embedding)
    _check_tokenizer(tokenizer, lookup.num_embeddings, path)
    return encoder, tokenizer


def transformer_of(path: str) -> str:
    """The folder of the transformer in a sentence-transformers folder; other folders and hub names as they are.

    Raises ValueError if the first module of modules.json is none.
    """
    if not Path(path).is_dir():
        return path
    folder, is_transformer = first_module(Path(path))
    if not is_transformer:
        raise ValueError(f"student.init: {path} is no transformer (its first module embeds words alone); name an encoder")
    return str(folder)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, num_embeddings: int, path: str) -> None:
    """Raises ValueError for a token without an embedding. A tokenizer without a padding token pads with another special one."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= num_embeddings:
        raise ValueError(
            f"student.init: the tokenizer of {path} has a token {largest}, but its encoder has embeddings for {num_embeddings};"
            " name a model whose tokenizer belongs to it"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ValueError(f"student.init: the tokenizer of {path} has none of pad_token, eos_token and unk_token; set pad_token")


def load_encoder(
    path: str,
    *,
    revision: str | None = None,
    from_scratch: bool = False,
    seed: int = 0,
    needs_pooler: bool = False,
) -> PreTrainedModel:
    """An encoder from a folder or hub name, float32, safetensors only, never with remote code.

    Raises ValueError if weights of a part are missing: transformers would initialise them at random, and only warn.
    """
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    cls = encoder_class(config)
    if from_scratch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = cls.from_config(config) if cls is AutoModel else cls(config)
        absent = []
    else:
        encoder, about = cls.from_pretrained(
            path,
            revision=revision,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        absent = [name for name in sorted(about["missing_keys"]) if needs_pooler or not name.startswith("pooler.")]
    if needs_pooler and getattr(encoder, "pooler", None) is None:
        raise ValueError(f"pooling is pooler, but the {encoder.config.model_type} encoder of {path} has none; use cls or mean")
    if absent:
        raise ValueError(f"{path} has no weights for {len(absent)} parts of its encoder, the first is {absent[0]}")
    encoder.config.use_cache = False  # of keys and values, which nothing reads: a text is encoded at once
    return encoder


def encoder_class(config: PretrainedConfig) -> Any:
    """The class that builds an encoder of this config; for T5, without the decoder."""
    return T5EncoderModel if isinstance(config, T5Config) else AutoModel


def longest_input(config: PretrainedConfig) -> int:
    """The number of tokens that an encoder of this config has positions for."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return NO_LIMIT
    return int(positions) - ((config.pad_token_id or 0) + 1 if config.model_type in FROM_PADDING else 0)


def keep_layers(encoder: PreTrainedModel, layers: list[int]) -> None:
    """Keeps these layers of the encoder, in this order, and updates its config.

    Raises ValueError if the encoder does not have exactly one list of layers, or if its config cannot describe what is left.
    """
    depth = encoder.config.num_hidden_layers
    stacks = [
        (parent, name, child)
        for parent in encoder.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    inside = {id(module) for _, _, child in stacks for module in child.modules() if module is not child}
    stacks = [stack for stack in stacks if id(stack[2]) not in inside]  # T5 keeps a list of sublayers in every layer
    if len(stacks) != 1:
        raise ValueError(
            f"student.layers: found {len(stacks)} stacks of {depth} layers in a {encoder.config.model_type}, not one"
        )
    parent, name, stack = stacks[0]
    _carry_relative_position_bias(stack, layers)
    kept = nn.ModuleList([stack[index] for index in layers])
    setattr(parent, name, kept)
    for number, layer in enumerate(kept):
        modules: Iterator[Any] = layer.modules()
        for module in modules:
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    _cut_config(encoder.config, layers)
    _check_cut(encoder, layers)


def _cut_config(config: Any, layers: list[int]) -> None:
    """Keeps the entries of these layers in every list of one entry per layer, such as layer_types, and in per_layer_config."""
    depth, described = config.num_hidden_layers, config.to_dict()
    config.num_hidden_layers = len(layers)
    for key, value in described.items():
        if isinstance(value, list) and len(value) == depth and key != "architectures" and not key.endswith("token_id"):
            setattr(config, key, [value[index] for index in layers])
    if getattr(config, "is_heterogeneous", False):
        overrides = {int(index): values for index, values in described["per_layer_config"].items()}
        config.per_layer_config = None
        config.per_layer_config = {new: overrides[old] for new, old in enumerate(layers) if old in overrides}


def _check_cut(encoder: PreTrainedModel, layers: list[int]) -> None:
    """Raises ValueError unless an encoder that is built from the config has the same weights: the student is loaded so."""
    cls = encoder_class(encoder.config)
    with torch.device("meta"):
        loaded = cls.from_config(encoder.config) if cls is AutoModel else cls(encoder.config)
    needed, found = ({name: value.shape for name, value in each.state_dict().items()} for each in (loaded, encoder))
    if different := sorted(name for name, _ in needed.items() ^ found.items()):
        raise ValueError(
            f"student.layers {layers}: a {encoder.config.model_type} of these layers cannot be saved, since its layers are not"
            f" alike (the first difference is {different[0]}); begin with layer 0, or keep all"
        )


def _carry_relative_position_bias(stack: nn.ModuleList, layers: list[int]) -> None:
    """T5 stores the bias of all layers in its first block: moves it to the new first block."""
    modules: Iterator[Any] = stack[0].modules()
    for old in modules:
        if getattr(old, "has_relative_attention_bias", False) and layers[0] != 0:
            new: Any = next(m for m in stack[layers[0]].modules() if hasattr(m, "has_relative_attention_bias"))
            new.relative_attention_bias = old.relative_attention_bias
            new.has_relative_attention_bias = True
            del old.relative_attention_bias
            old.has_relative_attention_bias = False


def set_dropout(encoder: PreTrainedModel, probability: float) -> None:
    """Sets every dropout of the encoder, modules and plain attributes alike. The saved config keeps the model's own."""
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name in ("dropout", "dropout_prob", "dropout_rate", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)


def save_encoder(
    encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: dict[str, torch.Tensor], folder: Path
) -> None:
    """An ordinary transformers folder: config.json, model.safetensors, tokenizer."""
    encoder.save_pretrained(folder, state_dict=state, safe_serialization=True)
    for side in ("padding_side", "truncation_side"):  # those of Student.tokenize
        setattr(tokenizer, side, "right")
        tokenizer.init_kwargs[side] = "right"  # without it, an attribute is not saved
    tokenizer.save_pretrained(folder)
