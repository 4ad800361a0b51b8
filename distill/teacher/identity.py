"""What makes vectors this teacher's. Two sets of shards with one fingerprint may be mixed; with two, never."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.config import RunConfig, TeacherConfig
from distill.files import sha256_of
from distill.models import resolve_model
from distill.shards import Manifest

FILES = frozenset({".safetensors", ".json", ".txt", ".model"})
NAMED = ("model", "vectors", "vectors_field", "revision", "pooling", "max_length", "prompt")


def teacher_identity(config: TeacherConfig, precision: str) -> dict[str, Any]:
    """The teacher as JSON: its settings, the precision it runs in ('fp32' or 'bf16'), and the sha256 of its files: weights,
    configs and vocabularies.

    A hub model is pinned by its `revision` instead of by checksums.
    """
    identity: dict[str, Any] = {name: getattr(config, name) for name in NAMED} | {"precision": precision}
    if config.vectors is not None:
        return identity | {"precision": "given", "sha256": sha256_of(Path(config.vectors))}
    folder = Path(resolve_model(config.model or ""))
    files = sorted(path for path in folder.rglob("*") if path.suffix in FILES and path.is_file())
    return identity | {"files": {str(path.relative_to(folder)): sha256_of(path) for path in files}}


def check_teacher(config: RunConfig, manifest: Manifest) -> None:
    """Raises ValueError if the shards were made by another teacher than the config's; needs no weights."""
    made_by = manifest.teacher
    changed = [
        f"teacher.{name}: {made_by.get(name)!r} in the shards, {getattr(config.teacher, name)!r} in the config"
        for name in NAMED
        if made_by.get(name) != getattr(config.teacher, name)
    ]
    if changed:
        raise ValueError(
            f"{config.run_dir / 'shards'} was made by another teacher ({'; '.join(changed)}):"
            " use another name= for this teacher, or put the config back"
        )
