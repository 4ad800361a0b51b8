"""What an encoder is made of, without its weights: from its folder's config.json, the table of known encoders, or the cache of
what was downloaded. The hub is not asked."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from distill.models import first_module, resolve_model
from distill.plan.devices import TABLES
from distill.student.encoder import encoder_class

ENCODERS = TABLES / "encoders.yaml"


@dataclass(frozen=True)
class Architecture:
    """config: transformers'; dim: the width of its vectors; is_16_bit: how its weights are stored; folder: where its files
    lie, if they are here."""

    name: str
    config: PretrainedConfig
    dim: int
    is_16_bit: bool
    folder: Path | None

    @property
    def hidden_size(self) -> int:
        return int(getattr(self.config, "hidden_size", 0) or self.config.d_model)

    def build(self) -> PreTrainedModel:
        """The encoder on the device and in the mode that are set: under FakeTensorMode it takes no memory."""
        config = copy.deepcopy(self.config)  # a student that keeps some layers says so in it
        cls: Any = encoder_class(config)
        return cls.from_config(config) if hasattr(cls, "from_config") else cls(config)


def architecture_of(name: str, revision: str | None = None) -> Architecture:
    """Of a folder, package:NAME/FOLDER, or hub name. Raises ValueError that says what to do where its shape is not known.

    A hub name's is known by the table or, once it is downloaded, by its files.
    """
    known = _table().get(name)
    if known is not None:
        return _from_table(name, dict(known))
    place = resolve_model(name)
    folder = Path(place) if Path(place).is_dir() else None
    files = folder or _downloaded(place, revision)
    try:
        if files is None:
            raise FileNotFoundError("it is not downloaded")
        config = AutoConfig.from_pretrained(first_module(files)[0], local_files_only=True, trust_remote_code=False)
        dim = _dim_of(files)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the shape of {name} is not known here: {ENCODERS.name} has no line for it. Add one to {ENCODERS}, or download it"
            f" (hf download {name}), or name a local folder ({str(error).splitlines()[0]})"
        ) from None
    stored = getattr(config, "dtype", None) in (torch.float16, torch.bfloat16)
    plain = Architecture(name, config, 0, stored, folder)
    return Architecture(name, config, dim or plain.hidden_size, stored, folder)


def _downloaded(name: str, revision: str | None) -> Path | None:
    """The folder in the hub's cache that has a model's files, or some of them."""
    found = (try_to_load_from_cache(name, file, revision=revision) for file in ("modules.json", "config.json"))
    return next((Path(path).parent for path in found if isinstance(path, str)), None)


def _table() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(ENCODERS.read_text(encoding="utf-8"))


def _from_table(name: str, words: dict[str, Any]) -> Architecture:
    dim, stored = words.pop("dim", None), words.pop("stored", "float32")
    config = AutoConfig.for_model(words.pop("model_type"), **words)
    plain = Architecture(name, config, 0, stored != "float32", None)
    return Architecture(name, config, dim or plain.hidden_size, plain.is_16_bit, None)


def _dim_of(folder: Path) -> int | None:
    """The width that the last dense module of a sentence-transformers folder gives; None where it has none."""
    if not (folder / "modules.json").is_file():
        return None
    widths = [
        json.loads((folder / module["path"] / "config.json").read_text(encoding="utf-8"))["out_features"]
        for module in json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        if module["type"].endswith(".Dense")
    ]
    return widths[-1] if widths else None
