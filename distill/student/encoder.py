"""Initial encoders: a pretrained one, some of its layers, or its architecture with new weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distill.run.model_folders import first_module
from distill.student.student_config import StudentConfig

EAGER_TOKENS = 1024  # up to this length, eager attention is the faster one on a CPU
NO_LIMIT = 1 << 20  # tokens, of an encoder without a table of positions
FROM_PADDING = {  # families that number positions from the padding token's id
    "camembert", "data2vec-text", "ibert", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
}  # fmt: skip


def build_encoder(config: StudentConfig, folder: Path, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The student's encoder in float32 and its tokenizer from a model's folder, as `config` says; new weights depend on `seed`
    alone.

    Raises ValueError if the model is no transformer with a fast tokenizer that pads, or lacks a layer that `config` names.
    """
    path, is_transformer = first_module(folder)
    if not is_transformer:
        raise ValueError(f"student.init: {folder} is no transformer (its first module embeds words alone); name an encoder")
    options: dict[str, Any] = {"needs_pooler": config.pooling == "pooler", "is_causal": config.is_causal}
    encoder = load_encoder(path, from_scratch=config.from_scratch, seed=seed, **options)
    if config.layers is not None:
        keep_layers(encoder, config.kept(encoder.config.num_hidden_layers))
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ValueError(f"student.init: {path} has only a slow tokenizer; name a model with a tokenizer.json")
    try:
        lookup = encoder.get_input_embeddings()
    except NotImplementedError:
        lookup = None
    if not isinstance(lookup, nn.Embedding):
        raise ValueError(f"student.init: a {encoder.config.model_type} has no table of token embeddings; name another encoder")
    _check_tokenizer(tokenizer, lookup.num_embeddings, path)
    set_padding_side(tokenizer, encoder.config)
    return encoder, tokenizer


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, num_embeddings: int, path: Path) -> None:
    """Raises ValueError for a token without an embedding. A tokenizer without a padding token pads with another special one."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= num_embeddings:
        raise ValueError(
            f"student.init: the tokenizer of {path} has a token {largest}, but its encoder has embeddings for {num_embeddings};"
            " name a model whose tokenizer belongs to it"
        )
    set_pad_token(tokenizer)
    if tokenizer.pad_token is None:
        raise ValueError(f"student.init: the tokenizer of {path} has none of pad_token, eos_token and unk_token; set pad_token")


def set_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer without a padding token, as those of many decoders, pads with another special one."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token


def load_encoder(
    path: str | Path,
    *,
    revision: str | None = None,
    from_scratch: bool = False,
    seed: int = 0,
    needs_pooler: bool = False,
    is_causal: bool | None = None,
) -> PreTrainedModel:
    """An encoder from a folder or hub name, float32, safetensors only, never with remote code.

    is_causal: False lets the tokens of a decoder attend to those after them; None leaves it as its config says.

    Raises ValueError if weights of a part are missing: transformers would initialise them at random, and only warn.
    """
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    if is_causal is not None:
        config.is_causal = is_causal
    cls = encoder_class(config)
    if cls is not AutoModel:
        config.is_encoder_decoder = False
    if from_scratch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = cls.from_config(config) if cls is AutoModel else cls(config)
        absent = []
    else:
        encoder, about = cls.from_pretrained(
            path,
            config=config,
            revision=revision,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        absent = _absent(about, needs_pooler)
    if needs_pooler and getattr(encoder, "pooler", None) is None:
        raise ValueError(f"pooling is pooler, but the {encoder.config.model_type} encoder of {path} has none; use cls or mean")
    _raise_absent(path, absent)
    encoder.config.use_cache = False  # of keys and values, which nothing reads: a text is encoded at once
    return encoder


def check_weights_complete(path: str | Path, revision: str | None = None, *, local_files_only: bool = False) -> None:
    """Raises ValueError if a folder or hub model lacks weights of its encoder other than the pooler's: transformers, and so
    sentence-transformers, would initialise them at random, and only warn. Only headers of files are read."""
    is_folder = Path(path).is_dir()
    place, is_transformer = first_module(Path(path)) if is_folder else (path, True)
    if not is_transformer:
        return
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False, "local_files_only": local_files_only}
    try:
        config = AutoConfig.from_pretrained(place, **options)
    except (OSError, ValueError):
        if is_folder:
            raise
        return  # a hub model without a transformer, or with one in a folder of its own
    options |= {"use_safetensors": True, "device_map": "meta", "output_loading_info": True}
    try:
        model, about = encoder_class(config).from_pretrained(place, **options)
    except FileNotFoundError as error:
        missing = re.search(r"[^/\s]+\.safetensors", str(error))
        raise ValueError(f"{path}: a file of its weights is missing ({missing[0] if missing else error})") from None
    except RuntimeError:  # of its shapes
        raise ValueError(f"{path}: its weights do not fit its config.json: put back the files of one model") from None
    except ValueError:  # AutoModel does not know it, as the encoders of some encoder-decoder models
        return
    absent = _absent(about, needs_pooler=False)
    if any(name.startswith("encoder.") for name, _ in model.named_parameters()):  # a decoder beside it is not loaded
        absent = [name for name in absent if not name.startswith("decoder.")]
    _raise_absent(path, absent)


def _absent(about: dict[str, Any], needs_pooler: bool) -> list[str]:
    return [name for name in sorted(about["missing_keys"]) if needs_pooler or not name.startswith("pooler.")]


def _raise_absent(path: str | Path, absent: list[str]) -> None:
    if absent:
        raise ValueError(f"{path} has no weights for {len(absent)} parts of its encoder, the first is {absent[0]}")


def encoder_class(config: PretrainedConfig) -> Any:
    """The class that builds an encoder of this config; for T5 and its like, without the decoder."""
    whole = MODEL_MAPPING.get(type(config), None)
    name = whole.__name__.removesuffix("Model") + "EncoderModel" if isinstance(whole, type) else ""
    return getattr(transformers, name, AutoModel)


@torch.no_grad()
def is_same_of_embeddings(encoder: PreTrainedModel) -> bool:
    """Whether an encoder in eval mode gives the same for embedded tokens as for their ids: some scale, mask or number tokens in
    between."""
    lookup: Any = encoder.get_input_embeddings()
    ids_1l = torch.tensor([[token for token in range(lookup.num_embeddings) if token != encoder.config.pad_token_id][:8]])
    mask_1l = torch.ones_like(ids_1l)
    expected = encoder(input_ids=ids_1l, attention_mask=mask_1l).last_hidden_state
    try:
        found = encoder(inputs_embeds=lookup(ids_1l), attention_mask=mask_1l).last_hidden_state
    except Exception:  # whatever an encoder raises that takes ids alone
        return False
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def hidden_size(config: Any) -> int:
    """The width of an encoder's token states."""
    return int(getattr(config, "hidden_size", 0) or config.d_model)


def longest_input(config: PretrainedConfig) -> int:
    """The number of tokens that an encoder of this config has positions for."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return NO_LIMIT
    return int(positions) - ((config.pad_token_id or 0) + 1 if config.model_type in FROM_PADDING else 0)


def set_cpu_attention(encoder: PreTrainedModel, num_tokens: int) -> None:
    """The attention of an encoder on a CPU for inputs of this length: eager for short ones.

    Eager attention holds a score for each pair of tokens, in every head. For long inputs it is the fused one, as for all on a
    GPU, where the architecture has it and the encoder can be switched to it.
    """
    can_be_fused = encoder._supports_sdpa and encoder._can_set_attn_implementation()
    chosen = "sdpa" if num_tokens > EAGER_TOKENS and can_be_fused else "eager"
    if encoder.config._attn_implementation != chosen:
        encoder.set_attn_implementation(chosen)


def set_padding_side(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Padding is on the right unless positions are relative, by rotation: with others, a text's positions, and so its vector,
    would depend on the texts beside it."""
    if not (getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)):
        tokenizer.padding_side = "right"


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
            f"student.layers: a {encoder.config.model_type} has {len(stacks)} lists of {depth} layers, not one;"
            " leave it out, or name another encoder"
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
    if different := unlike_its_config(encoder):
        raise ValueError(
            f"student.layers {layers}: a {encoder.config.model_type} of these layers cannot be saved, since its layers are not"
            f" alike (the first difference is {different[0]}); begin with layer 0, or keep all"
        )


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


def unlike_its_config(encoder: PreTrainedModel) -> list[str]:
    """The names of weights that an encoder built from its config does not have in this shape: the student is loaded so."""
    cls = encoder_class(encoder.config)
    with torch.device("meta"):
        loaded = cls.from_config(encoder.config) if cls is AutoModel else cls(encoder.config)
    needed, found = ({name: value.shape for name, value in each.state_dict().items()} for each in (loaded, encoder))
    return sorted({name for name, _ in needed.items() ^ found.items()})


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
    for side in ("padding_side", "truncation_side"):
        tokenizer.init_kwargs[side] = getattr(tokenizer, side)  # without it, an attribute is not saved
    tokenizer.save_pretrained(folder)
