"""The files of an encoder: whether they can be read and belong together, without loading its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from distill.plan.architectures import cached_folder
from distill.run.files import LFS_POINTER, is_lfs_pointer
from distill.run.model_folders import check_kind, first_module, model_files, resolve_model


@dataclass(frozen=True)
class ModelFolder:
    """An encoder's files. encoder: the folder of its first module, which is `path` itself or inside it."""

    path: Path
    encoder: Path
    is_transformer: bool
    tensors: frozenset[str]
    config: PretrainedConfig | None

    @classmethod
    def open(cls, name: str, revision: str | None) -> ModelFolder | None:
        """None for a hub model that is still to be downloaded. Raises ValueError or OSError for files that cannot be read."""
        place = resolve_model(name)
        is_local = Path(place).is_dir()
        path = Path(place) if is_local else cached_folder(place, revision)
        encoder, is_transformer = first_module(path) if path is not None else (None, False)
        if path is None or encoder is None or not (is_local or _is_downloaded(encoder)):
            if constants.HF_HUB_OFFLINE:
                raise ValueError(
                    f"{name} is neither a folder nor in this machine's cache, and HF_HUB_OFFLINE is set: hf download {name}"
                )
            return None
        if not is_local:
            check_kind(path)
        for file in model_files(path):
            if is_lfs_pointer(file):
                raise ValueError(f"{file} {LFS_POINTER}")
        tensors = frozenset(tensor for file in encoder.glob("*.safetensors") for tensor in _tensor_names(file))
        config = None
        if is_transformer:
            config = AutoConfig.from_pretrained(encoder, local_files_only=True, trust_remote_code=False)
        return cls(path, encoder, is_transformer, tensors, config)

    @property
    def has_pooler(self) -> bool:
        """Whether the weights have a pooler; true where they are not downloaded yet."""
        return not self.tensors or any(name.endswith("pooler.dense.weight") for name in self.tensors)

    @cached_property
    def tokenizer(self) -> Any:
        try:
            return AutoTokenizer.from_pretrained(self.encoder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever the tokenizer's own class raises
            raise ValueError(f"{self.path}: its tokenizer cannot be read ({one_line(error)})") from None

    def check_tokens(self) -> None:
        """Raises ValueError for a tokenizer that gives ids for which the encoder has no embedding."""
        table = getattr(self.config, "vocab_size", None)
        if table is not None and len(self.tokenizer) > table:
            raise ValueError(
                f"{self.path}: its tokenizer has {len(self.tokenizer):,} tokens, and its encoder embeds {table:,}:"
                " they are not of one model; put its own tokenizer files there"
            )


def _tensor_names(file: Path) -> list[str]:
    """Raises ValueError for a file that is cut off or not of safetensors."""
    try:
        with safe_open(file, "pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); copy or download it again") from None


def json_of(path: Path) -> dict[str, Any]:
    """A JSON file of a model's folder, {} if there is none. Raises ValueError naming it; the file stays as it is."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); copy or download it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object; copy or download it again")
    return found


def _is_downloaded(encoder: Path) -> bool:
    """Whether a folder in the hub's cache has all files of its weights: a download may have been interrupted."""
    index = json_of(encoder / "model.safetensors.index.json")
    files = set(index["weight_map"].values()) if "weight_map" in index else {"*.safetensors"}
    return all(any(encoder.glob(file)) for file in files)


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
