"""Architectures of encoders, without their weights: from a folder's config.json, the table of known encoders, or the hub cache.
The hub is never contacted."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass
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
from distill.student.encoder import encoder_class

ENCODERS = TABLES / "encoders.yaml"


@dataclass(frozen=True)
class Architecture:
    """An encoder's config, width of its vectors, precision of its stored weights, and folder if its files are local."""

    config: PretrainedConfig
    dim: int
    is_16_bit: bool
    folder: Path | None = None

    def build(self) -> PreTrainedModel:
        """The encoder, its weights not initialised; under FakeTensorMode it takes no memory."""
        config = copy.deepcopy(self.config)  # keep_layers changes it
        cls: Any = encoder_class(config)
        with no_init_weights():  # ModernBERT's initialisation looks at values, which fake tensors do not have
            encoder = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
        encoder.tie_weights()
        return encoder


def architecture_of(name: str, revision: str | None = None) -> Architecture:
    """The architecture of a folder, package:NAME/FOLDER or hub name. Raises ValueError with the fix where it is not known."""
    known = yaml.safe_load(ENCODERS.read_text(encoding="utf-8")).get(name)
    if known is not None:
        options = {key: value for key, value in known.items() if key not in ("dim", "stored")}
        config = AutoConfig.for_model(**options)
        return Architecture(config, known.get("dim", config.hidden_size), known.get("stored", "float32") != "float32")
    path = resolve_model(name)
    folder = Path(path) if Path(path).is_dir() else None
    files = folder or cached_folder(path, revision)
    try:
        if files is None:
            raise FileNotFoundError("it is not downloaded")
        config = AutoConfig.from_pretrained(first_module(files)[0], local_files_only=True, trust_remote_code=False)
        dim = min(vector_width(files) or config.hidden_size, _truncate_dim(files) or sys.maxsize)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the shape of {name} is not known here: {ENCODERS.name} has no line for it. Add one to {ENCODERS}, or download it"
            f" (hf download {name}), or name a local folder ({str(error).splitlines()[0]})"
        ) from None
    return Architecture(config, dim, getattr(config, "dtype", None) in (torch.float16, torch.bfloat16), folder)


def cached_folder(name: str, revision: str | None) -> Path | None:
    """The folder in the hub's cache that has a model's files, or some of them."""
    found = (try_to_load_from_cache(name, file, revision=revision) for file in ("modules.json", "config.json"))
    return next((Path(path).parent for path in found if isinstance(path, str)), None)


def _truncate_dim(folder: Path) -> int | None:
    """The number of dimensions that a sentence-transformers folder keeps; None for all."""
    path = folder / "config_sentence_transformers.json"
    return json.loads(path.read_text(encoding="utf-8")).get("truncate_dim") if path.is_file() else None


def vector_width(folder: Path) -> int | None:
    """The width of a sentence-transformers folder's vectors: of its last Dense or Pooling module, or of its static embeddings.

    None for a plain encoder, and where the modules do not say.
    """
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
