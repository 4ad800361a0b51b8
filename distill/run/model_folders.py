"""Where a model named in a config lies, and whether it is one. Nothing is loaded here, and no code of a model is ever run."""

from __future__ import annotations

import importlib.util
import json
import re
import stat
from pathlib import Path
from typing import Any

from distill.run.files import LFS_POINTER, DigestCache, fingerprint, is_lfs_pointer

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLE = "pytorch_model.bin"
MODEL_FILES = frozenset({".safetensors", ".json", ".txt", ".model"})  # weights, configs and vocabularies


def resolve_model(name: str) -> str:
    """A folder, `package:NAME/FOLDER` inside an installed Python package, or a hub name, as a path or hub name.

    Raises ValueError if the package is not installed or the folder holds no model; a package is found, not imported.
    """
    if name.startswith("package:"):
        package, _, folder = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"{name}: the Python package {package} is not installed; pip install it, or name a model folder")
        path = Path(spec.submodule_search_locations[0]) / folder
    elif (name and Path(name).exists()) or name.startswith((".", "/", "~")):
        path = Path(name).expanduser()
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return name
    else:
        raise ValueError(f"{name!r} is neither a folder, nor package:NAME/FOLDER, nor a name on the hub (owner/model)")
    check_model_folder(path)
    return str(path)


def check_model_folder(path: Path) -> None:
    """Raises ValueError naming what a folder lacks to be an encoder that loads without running code."""
    if not path.is_dir():
        raise ValueError(f"no model at {path}: no such folder")
    check_kind(path)
    inner, needs_config = first_module(path)
    if needs_config and not (inner / "config.json").is_file():
        raise ValueError(f"no model at {path}: it has no config.json")
    if not any((inner / weights).is_file() for weights in WEIGHTS):
        pickled = " (it has pytorch_model.bin, a pickle; convert it to safetensors)" if any(inner.glob("*.bin")) else ""
        raise ValueError(f"no model at {path}: it has no model.safetensors{pickled}")
    for file in inner.glob("*.safetensors"):
        if is_lfs_pointer(file):
            raise ValueError(f"{file} {LFS_POINTER}")
    for module in modules_of(path):
        folder = path / module["path"]
        if (folder / PICKLE).is_file() and not any((folder / weights).is_file() for weights in WEIGHTS):
            raise ValueError(
                f"{folder / PICKLE} is a pickle, which is not read: convert it to model.safetensors"
                " (sentence_transformers: SentenceTransformer(folder).save_pretrained(new_folder))"
            )


def check_kind(path: Path) -> None:
    """Raises ValueError for a folder that is something else than an embedding model of one dense vector a text."""

    def is_not(what: str, fix: str) -> ValueError:
        return ValueError(f"{path} is {what}, no model that gives a text one dense vector: {fix}")

    config, about = (_json_object(path / file) for file in ("config.json", "config_sentence_transformers.json"))
    if (path / "adapter_config.json").is_file() and not config:
        base = _json_object(path / "adapter_config.json").get("base_model_name_or_path")
        fix = f"merge it into its base model{f', {base}' if base else ''} (peft: merge_and_unload, then save_pretrained)"
        raise is_not("a LoRA adapter without its base model", fix)
    if any(path.glob("*.gguf")) and not any(path.rglob("*.safetensors")):
        raise is_not("a GGUF model of llama.cpp", "name the model in safetensors that it was made from")
    if (code := config.get("auto_map", {}).get("AutoConfig")) and not _is_known(config.get("model_type")):
        raise ValueError(
            f"{path} needs code of its own ({code}), which is not run: name a model that transformers has the code of"
        )
    kinds = [module["type"] for module in modules_of(path)]
    kind = about.get("model_type")
    if kind == "CrossEncoder" or (not kinds and _is_classifier(config)):
        raise is_not(
            "a CrossEncoder or classifier, which scores texts", "name an embedding model, or the encoder it was made of"
        )
    if kind == "SparseEncoder" or any(".sparse_encoder." in each for each in kinds):
        raise is_not("a SparseEncoder", "name a dense one")
    if kind == "MultiVectorEncoder" or any(".multi_vector_encoder." in each for each in kinds):
        raise is_not("a MultiVectorEncoder, which gives a vector for each token", "name a dense one")


def check_one_route(path: Path) -> None:
    """Raises ValueError for a Router, which has a model for queries and another for documents."""
    if (modules := modules_of(path)) and modules[0]["type"].rpartition(".")[2] in ("Router", "Asym"):
        routes = sorted(str(folder.relative_to(path)) for folder in path.iterdir() if (folder / "config.json").is_file())
        named = f", {' or '.join(routes)}" if routes else ""
        raise ValueError(
            f"{path} is a Router, with a model for queries and another for documents: name a folder with one of them{named}"
        )


def _is_known(model_type: str | None) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _is_classifier(config: dict[str, Any]) -> bool:
    architectures = config.get("architectures") or []
    return bool(architectures) and all(str(each).endswith("ForSequenceClassification") for each in architectures)


def _json_object(path: Path) -> dict[str, Any]:
    """{} for a file that is not there or no JSON object: what reads it next says so."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def first_module(path: Path) -> tuple[Path, bool]:
    """Where a folder's weights lie (in the first module of modules.json, else in itself); whether they are a transformer's."""
    modules = modules_of(path)
    return (path / modules[0]["path"], modules[0]["type"].endswith(".Transformer")) if modules else (path, True)


def modules_of(path: Path) -> list[dict[str, str]]:
    """The entries of modules.json, each with a path and a type; [] without that file."""
    if not (path / "modules.json").is_file():
        return []
    try:
        modules = json.loads((path / "modules.json").read_text(encoding="utf-8"))
        found = [{"path": str(module["path"]), "type": str(module["type"])} for module in modules]
        if not found:
            raise ValueError("it is empty")
        return found
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"no model at {path}: its modules.json is no list of modules ({error!r})") from None


def apply_umask(folder: Path) -> None:
    """Gives the weights in a folder the mode that a new file there gets: safetensors writes them for their owner alone."""
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def model_files(folder: Path) -> list[Path]:
    """What decides a model folder's vectors: weights, configs and vocabularies, in sorted order."""
    return sorted(path for path in folder.rglob("*") if path.suffix in MODEL_FILES and path.is_file())


def model_digests(folder: Path, digests: DigestCache) -> dict[str, str]:
    """Path in the folder -> sha256, of all files that decide a model's vectors; {} for a hub name."""
    return {str(path.relative_to(folder)): digests.sha256(path) for path in model_files(folder)}


def model_fingerprint(name: str | None, digests: DigestCache) -> str:
    """The fingerprint of a model folder's content; '' where there is no such folder, and for a hub name."""
    try:
        files = model_digests(Path(resolve_model(name or "")), digests)
    except ValueError:
        return ""
    return fingerprint(files) if files else ""
