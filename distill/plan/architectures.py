"""Architectures of encoders, without their weights: from a folder's config.json, the table of known encoders, or the hub cache.
The hub is never contacted."""

from __future__ import annotations

import copy
import json
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from distill.plan.devices import TABLES
from distill.run.model_folders import first_module, resolve_model
from distill.student.encoder import NO_LIMIT, encoder_class, longest_input
from distill.student.settings import ModelSettings, read_settings

ENCODERS = TABLES / "encoders.yaml"


@dataclass(frozen=True)
class Architecture:
    """An encoder's config, width of its vectors, precision of its stored weights, folder if its files are local, the number of
    tokens that it truncates its input to by itself, and the settings that a student preserves."""

    config: PretrainedConfig
    dim: int
    is_16_bit: bool
    folder: Path | None = None
    max_length: int = NO_LIMIT
    settings: ModelSettings = field(default_factory=ModelSettings)

    def with_vocabulary(self, size: int) -> Architecture:
        """The same with at most this number of tokens."""
        config = copy.deepcopy(self.config)
        config.vocab_size = min(size, config.vocab_size)
        if config.pad_token_id is not None:
            config.pad_token_id = min(config.pad_token_id, config.vocab_size - 1)
        return replace(self, config=config)

    def build(self) -> PreTrainedModel:
        """The encoder, its weights not initialised; under FakeTensorMode it takes no memory."""
        config = copy.deepcopy(self.config)  # keep_layers changes it
        cls: Any = encoder_class(config)
        with no_init_weights():  # ModernBERT's initialisation looks at values, which fake tensors do not have
            encoder = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
        encoder.tie_weights()
        return encoder


def architecture_of(name: str, revision: str | None = None, dimensions: int | None = None) -> Architecture:
    """The architecture of a folder, package:NAME/FOLDER or hub name, dimensions: as for `vector_width`. Raises ValueError with
    the fix where it is not known."""
    known = yaml.safe_load(ENCODERS.read_text(encoding="utf-8")).get(name)
    if known is not None:
        options = {key: value for key, value in known.items() if key not in ("dim", "stored", "max_length")}
        config = AutoConfig.for_model(**options)
        is_16_bit, length = known.get("stored", "float32") != "float32", known.get("max_length", NO_LIMIT)
        dim = min(known.get("dim", config.hidden_size), dimensions or sys.maxsize)
        return Architecture(config, dim, is_16_bit, None, min(length, longest_input(config)))
    path = resolve_model(name)
    folder = Path(path) if Path(path).is_dir() else None
    files = folder or cached_folder(path, revision)
    try:
        if files is None:
            raise FileNotFoundError("it is not downloaded")
        config = AutoConfig.from_pretrained(first_module(files)[0], local_files_only=True, trust_remote_code=False)
        dim = vector_width(files, config.hidden_size, dimensions)
        length = min(_stated_length(files), longest_input(config))
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two of JSON that is no model's
        raise ValueError(
            f"the shape of {name} is not known here: {ENCODERS.name} has no line for it. Add one to {ENCODERS}, or download it"
            f" (hf download {name}), or name a local folder ({str(error).splitlines()[0]})"
        ) from None
    settings = ModelSettings()
    with suppress(ValueError):  # a teacher may have modules that a student cannot
        settings = read_settings(files, has_weights=False)
    is_16_bit = getattr(config, "dtype", None) in (torch.float16, torch.bfloat16)
    return Architecture(config, dim, is_16_bit, folder, length, settings)


def cached_folder(name: str, revision: str | None) -> Path | None:
    """The folder in the hub's cache that has a model's files, or some of them."""
    found = (try_to_load_from_cache(name, file, revision=revision) for file in ("modules.json", "config.json"))
    return next((Path(path).parent for path in found if isinstance(path, str)), None)


def _stated_length(folder: Path) -> int:
    """The number of tokens that a folder says texts are truncated to, in its sentence-transformers file or its tokenizer's."""
    for file, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        path = first_module(folder)[0] / file
        if path.is_file() and (length := json.loads(path.read_text(encoding="utf-8")).get(key)):
            return int(min(length, NO_LIMIT))
    return NO_LIMIT


def _truncate_dim(folder: Path) -> int | None:
    """The number of dimensions that a sentence-transformers folder keeps; None for all."""
    path = folder / "config_sentence_transformers.json"
    return json.loads(path.read_text(encoding="utf-8")).get("truncate_dim") if path.is_file() else None


def vector_width(folder: Path, hidden_size: int, dimensions: int | None = None) -> int:
    """The width of a model's vectors: `full_width`, cut where the folder says so, or instead to `dimensions`."""
    return min(full_width(folder, hidden_size), dimensions or _truncate_dim(folder) or sys.maxsize)


def full_width(folder: Path, hidden_size: int) -> int:
    """The width of a model's whole vectors: of its last Dense or Pooling module, or of its static embeddings.

    hidden_size: that of the encoder, which is the width of a plain one, and where the modules do not say.
    """
    return _module_width(folder) or hidden_size


def _module_width(folder: Path) -> int | None:
    if not (folder / "modules.json").is_file():
        return None
    width = None
    for module in json.loads((folder / "modules.json").read_text(encoding="utf-8")):
        place, kind = folder / module["path"], module["type"].rpartition(".")[2]
        if kind == "Dense":
            width = json.loads((place / "config.json").read_text(encoding="utf-8"))["out_features"]
        elif kind == "Pooling" and (place / "config.json").is_file():
            about = json.loads((place / "config.json").read_text(encoding="utf-8"))
            modes = max(1, sum(value is True for key, value in about.items() if key.startswith("pooling_mode_")))
            width = modes * about.get("embedding_dimension", about.get("word_embedding_dimension", 0)) or None
        elif kind == "StaticEmbedding":
            with safe_open(place / "model.safetensors", "pt") as tensors:
                width = next((tensors.get_slice(name).get_shape()[-1] for name in tensors.keys()), None)  # noqa: SIM118
    return width
