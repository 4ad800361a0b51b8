"""Any encoder as a SentenceTransformer in eval mode: from safetensors, never with remote code."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from distill.run.files import LFS_POINTER, is_lfs_pointer
from distill.run.model_folders import check_one_route, model_files, resolve_model
from distill.run.precision import has_bf16
from distill.student.encoder import (
    NO_LIMIT,
    check_weights_complete,
    load_encoder,
    longest_input,
    set_pad_token,
    set_padding_side,
)
from distill.teacher.teacher_config import ModelConfig

logger = logging.getLogger(__name__)


def load_model(
    config: ModelConfig, device: torch.device, amp: torch.dtype | None, *, zero3: bool = False, **placement: Any
) -> SentenceTransformer:
    """`amp` bfloat16: the matrices of linear layers are kept in it, all else in float32, to be run under autocast.

    `placement` goes to from_pretrained (device_map and the like), and zero3 splits the weights over the ranks: the model then
    stays where that puts it, all of it in `amp`. A folder without modules.json is a plain encoder: `pooling` must say how it
    pools; in another folder it replaces the pooling alone. Raises ValueError.
    """
    path = _checked_path(config)
    placed = zero3 or bool(placement)
    dtype = amp or torch.float32 if placed else _stored_dtype(path, config.revision, amp)
    arguments = {"use_safetensors": True, "dtype": dtype} | placement
    if device.type == "cpu":
        arguments["attn_implementation"] = "eager"  # for short texts; `set_cpu_attention` chooses for each batch
    with _split_over_ranks(dtype) if zero3 else nullcontext() as settings:
        model = _load(path, config, arguments, None if placed else "cpu")
    if settings is not None:
        _start_engine(model, settings)
    elif not placed:
        _set_precision(model, amp)
        model.to(device)
        if device.type == "cpu" and amp is not None and has_bf16(device):
            pack_linears(model)
    _set_up(model, path, config)
    return model.eval().requires_grad_(False)


def load_without_weights(config: ModelConfig) -> SentenceTransformer:
    """The model on the meta device: it tokenises, has prompts and a longest input, and cannot encode. Raises ValueError."""
    path = _checked_path(config)
    if config.pooling == "pooler":  # read from the weights, and of no consequence for what the model reads
        config = config.model_copy(update={"pooling": "cls"})
    model = _load(path, config, {"use_safetensors": True, "dtype": torch.float32, "device_map": "meta"}, "meta")
    _set_up(model, path, config)
    return model


def _checked_path(config: ModelConfig) -> str:
    """The model's folder or hub name. Raises ValueError for files that lack weights."""
    path = resolve_model(config.model or "")
    if pointers := [file for file in model_files(Path(path)) if is_lfs_pointer(file)]:
        raise ValueError(f"{pointers[0]} {LFS_POINTER}")
    check_weights_complete(path, config.revision)
    return path


def _set_up(model: SentenceTransformer, path: str, config: ModelConfig) -> None:
    """Sets the padding and the limits of a model that was loaded. Raises ValueError for those that it cannot have."""
    if model.tokenizer is not None and isinstance(model[0], Transformer):
        set_pad_token(model.tokenizer)
        set_padding_side(model.tokenizer, model[0].model.config)
    _check_tokens(model, path)
    _limit_length(model, path, config.max_length)
    _limit_dimensions(model, path, config.dimensions)


def _check_tokens(model: SentenceTransformer, path: str) -> None:
    """Raises ValueError for a tokenizer that gives ids for which the encoder has no embedding."""
    encoder = getattr(model[0], "model", None)
    if not isinstance(encoder, PreTrainedModel) or model.tokenizer is None:
        return
    table = getattr(encoder.get_input_embeddings(), "num_embeddings", None)
    if table is not None and len(model.tokenizer) > table:
        raise ValueError(
            f"{path}: its tokenizer has {len(model.tokenizer):,} tokens, and its encoder embeds {table:,}:"
            " they are not of one model; put its own tokenizer files there"
        )


def _limit_length(model: SentenceTransformer, path: str, max_length: int | None) -> None:
    """Sets the length that texts are cut to: `max_length`, or the model's own, which never exceeds its positions.

    Raises ValueError for a `max_length` that the model cannot have.
    """
    positions = longest_input(model[0].model.config) if isinstance(model[0], Transformer) else NO_LIMIT
    if max_length is None:
        if positions < NO_LIMIT and (model.max_seq_length or NO_LIMIT) > positions:
            model.max_seq_length = positions
    elif not isinstance(model[0], Transformer):
        raise ValueError(f"teacher.max_length {max_length}: {path} reads whole texts, of any length; leave it out")
    elif max_length > positions:
        raise ValueError(
            f"teacher.max_length {max_length} is above the {positions} positions of {path}; lower it, or leave it out"
        )
    else:
        model.max_seq_length = max_length


def _limit_dimensions(model: SentenceTransformer, path: str, dimensions: int | None) -> None:
    """Sets the number of first dimensions that are kept, if it is given, instead of the folder's own.

    Raises ValueError if the model has fewer.
    """
    if dimensions is None:
        return
    model.truncate_dim = None
    width = model.get_embedding_dimension()
    if width is not None and dimensions > width:
        raise ValueError(
            f"teacher.dimensions {dimensions} is above the {width} dimensions of {path}; lower it, or leave it out"
        )
    model.truncate_dim = dimensions


def _load(path: str, config: ModelConfig, arguments: dict[str, Any], device: str | None) -> SentenceTransformer:
    is_folder = Path(path).exists()
    if is_folder:
        check_one_route(Path(path))
    has_modules = is_folder and (Path(path) / "modules.json").exists()
    if is_folder and not has_modules:
        if config.pooling is None:
            raise ValueError(f"{path} is a plain encoder (no modules.json): say how it pools, teacher.pooling=cls|pooler|mean")
        return SentenceTransformer(modules=_pooled(path, config, arguments), device=device)
    if config.pooling == "pooler" and not is_folder:
        return SentenceTransformer(modules=_pooled(path, config, arguments), device=device)
    placed = None if "device_map" in arguments else device
    model = SentenceTransformer(path, device=placed, trust_remote_code=False, revision=config.revision, model_kwargs=arguments)
    if config.pooling is not None:
        _replace_pooling(model, path, config.pooling)
    return model


def _replace_pooling(model: SentenceTransformer, path: str, mode: str) -> None:
    """Another pooling mode in a model that names its own; all other modules stay. Raises ValueError where it has none."""
    pooling = next((module for module in model if isinstance(module, Pooling)), None)
    if mode == "pooler" or pooling is None or not isinstance(pooling.pooling_mode, str):
        own = "no pooling" if pooling is None else f"the pooling {pooling.pooling_mode}"
        raise ValueError(f"teacher.pooling {mode}: {path} is a sentence-transformers model with {own}; leave it out")
    if pooling.pooling_mode != mode:
        words = "teacher.pooling %s replaces the pooling of %s, which is %s; its other modules stay"
        logger.warning(words, mode, path, pooling.pooling_mode)
        pooling.pooling_mode = mode


@contextmanager
def _split_over_ranks(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """While it lasts, from_pretrained keeps a W-th of every weight on each of W ranks."""
    from transformers.integrations import HfDeepSpeedConfig

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "stage3_max_reuse_distance": 0,  # a layer's weights are given up after their turn: there is no backward pass
            "stage3_max_live_parameters": 10_000_000,
            "stage3_prefetch_bucket_size": 10_000_000,
            "stage3_param_persistence_threshold": 10_000,
            "reduce_bucket_size": 1,
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    living = HfDeepSpeedConfig(settings)  # transformers looks for one that is alive
    yield settings
    del living


def _start_engine(model: SentenceTransformer, settings: dict[str, Any]) -> None:
    """Lets ZeRO-3 gather each layer's weights for its turn in a forward pass, and give them up after it."""
    import deepspeed

    engine = deepspeed.initialize(model=model, config=settings)[0]
    engine.eval()


def _stored_dtype(path: str, revision: str | None, amp: torch.dtype | None) -> torch.dtype:
    """A model stored in 16 bits is loaded in bfloat16 where it will run in it: an 11B teacher has no room for float32."""
    if amp is None:
        return torch.float32
    inner = Path(path)
    if inner.is_dir() and not (inner / "config.json").exists():
        return torch.float32  # not a transformer
    stored = getattr(AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False), "dtype", None)
    return amp if stored in (torch.float16, torch.bfloat16) else torch.float32


def _set_precision(model: nn.Module, amp: torch.dtype | None) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(amp or torch.float32)
        else:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()


class PackedLinear(nn.Module):
    """A linear layer in bfloat16 on a CPU, for inference: its matrix is laid out once as oneDNN's kernels read it, which
    `nn.Linear` does again at every call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs.to(self.weight.dtype), self.weight, self.bias, "none", [], "")


def packed_flops(inputs: torch.Size, weight: torch.Size, *rest: Any, out_shape: torch.Size, **options: Any) -> int:
    """Operations of PackedLinear, for torch's FlopCounterMode."""
    return 2 * inputs.numel() * weight[0]


def pack_linears(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))


def _pooled(path: str, config: ModelConfig, arguments: dict[str, Any]) -> list[nn.Module]:
    where = {"revision": config.revision, "trust_remote_code": False}
    transformer = Transformer(
        path,
        model_kwargs=arguments | where,
        processor_kwargs=dict(where),
        config_kwargs=dict(where),
        max_seq_length=config.max_length,
    )
    width = transformer.get_embedding_dimension()
    if config.pooling != "pooler":
        return [transformer, Pooling(width, pooling_mode=config.pooling)]
    pooler: Any = load_encoder(path, revision=config.revision, needs_pooler=True).get_submodule("pooler")
    dense = Dense(width, width, activation_function=nn.Tanh(), init_weight=pooler.dense.weight, init_bias=pooler.dense.bias)
    return [transformer, Pooling(width, pooling_mode="cls"), dense]
