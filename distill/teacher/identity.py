"""What makes vectors this teacher's. Two sets of shards with one fingerprint may be mixed; with two, never."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.config import ModelConfig, RunConfig, TeacherConfig
from distill.files import sha256_of
from distill.models import resolve_model
from distill.shards import Manifest

FILES = frozenset({".safetensors", ".json", ".txt", ".model"})
MODEL = ("model", "revision", "pooling", "max_length", "prompt", "prompt_name")
NAMED = (*MODEL, "vectors", "vectors_field", "concat")

Digests = dict[str, dict[str, Any]]
"""File -> its size, mtime_ns and sha256: what need not be read again while the first two stand."""


def teacher_identity(config: TeacherConfig, precision: str, known: Digests | None = None) -> tuple[dict[str, Any], Digests]:
    """The teacher as JSON: its settings, the precision it runs in ('fp32' or 'bf16'), and the sha256 of its files: weights,
    configs and vocabularies; of a hub model, the commit that its revision stands for now.

    `known` are the digests that an earlier task came by; all that were used are returned too.
    """
    used: Digests = {}

    def digest(path: Path) -> str:
        stat, key = path.stat(), str(path)
        entry = (known or {}).get(key)
        if entry is None or (entry["size"], entry["mtime_ns"]) != (stat.st_size, stat.st_mtime_ns):
            entry = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_of(path)}
        used[key] = entry
        return entry["sha256"]

    def files_of(model: ModelConfig) -> dict[str, str]:
        folder = Path(resolve_model(model.model or ""))
        if not folder.is_dir():
            return {"commit": _commit(str(folder), model.revision)}
        files = sorted(path for path in folder.rglob("*") if path.suffix in FILES and path.is_file())
        return {str(path.relative_to(folder)): digest(path) for path in files}

    identity = named_settings(config) | {"precision": precision}
    if config.vectors is not None:
        return identity | {"precision": "given", "sha256": digest(Path(config.vectors))}, used
    identity["files"] = files_of(config)
    for entry, model in zip(identity["concat"], config.concat, strict=True):
        entry["files"] = files_of(model)
    return identity, used


def check_teacher(config: RunConfig, manifest: Manifest) -> None:
    """Raises ValueError if the shards were made by another teacher than the config's; needs no weights."""
    made_by, wanted = manifest.teacher, named_settings(config.teacher)
    made_by = made_by | {"concat": [_without_files(entry) for entry in made_by.get("concat", [])]}
    changed = [
        f"teacher.{name}: {made_by.get(name)!r} in the shards, {wanted[name]!r} in the config"
        for name in NAMED
        if made_by.get(name) != wanted[name]
    ]
    if changed:
        raise ValueError(
            f"{config.shards_dir} was made by another teacher ({'; '.join(changed)}):"
            " use another name= for this teacher, or put the config back"
        )


def named_settings(config: TeacherConfig) -> dict[str, Any]:
    """The part of the config that makes vectors this teacher's."""
    return config.model_dump(mode="json", include=set(NAMED))


def _without_files(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "files"}


def _commit(name: str, revision: str | None) -> str:
    """The commit of a hub model that would be loaded: branches move, and shards of two commits must not be mixed."""
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"no teacher {name} on the hub or in its cache here: {str(error).splitlines()[0]}") from None
    return str(getattr(found, "_commit_hash", None) or revision)
