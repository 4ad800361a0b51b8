"""The identity of a teacher: all that decides its vectors. Shards are mixed only if their teachers' identities are equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.run.files import DigestCache
from distill.run.hub import model_commit
from distill.run.model_folders import model_digests, resolve_model
from distill.run.temporary import hub_error
from distill.shards import Manifest
from distill.student.student_config import StudentConfig
from distill.teacher.imported import vector_files
from distill.teacher.teacher_config import ModelConfig, TeacherConfig

NAMED = (
    *("model", "revision", "pooling", "max_length", "prompt", "prompt_name"),
    *("dimensions", "weight", "vectors", "vectors_field", "concat", "endpoint"),
)
ENCODER = ("model", "revision", "pooling", "max_length", "prompt", "prompt_name", "dimensions", "endpoint")


def teacher_identity(config: TeacherConfig, precision: str, digests: DigestCache) -> dict[str, Any]:
    """The teacher as JSON: its settings, the precision it runs in ('fp32' or 'bf16'), and the sha256 of its files: weights,
    configs and vocabularies; of a hub model, the commit of its revision; of several files of vectors, a list in their order."""

    def files_of(model: ModelConfig) -> dict[str, str]:
        path = resolve_model(model.model or "")
        return model_digests(Path(path), digests) or {"commit": _commit(path, model.revision)}

    identity = named_settings(config) | {"precision": precision}
    if config.vectors is not None:
        found = [digests.sha256(Path(path)) for path in vector_files(config)]
        return identity | {"precision": "given", "sha256": found[0] if len(found) == 1 else found}
    identity["files"] = files_of(config)
    for entry, model in zip(identity["concat"], config.concat, strict=True):
        entry["files"] = files_of(model)
    return identity


def check_teacher(config: TeacherConfig, shards_dir: Path, manifest: Manifest) -> None:
    """Raises ValueError if the shards were made by another teacher than the config's; needs no weights."""
    made_by, wanted = manifest.teacher, named_settings(config)
    made_by = made_by | {"concat": [_without_files(entry) for entry in made_by.get("concat", [])]}
    changed = [
        f"teacher.{name}: {made_by.get(name)!r} in the shards, {wanted.get(name)!r} in the config"
        for name in NAMED
        if made_by.get(name) != wanted.get(name)
    ]
    if changed:
        raise ValueError(
            f"{shards_dir} was made by another teacher ({'; '.join(changed)}):"
            " use another name= for this teacher, or put the config back"
        )


def check_weights(config: TeacherConfig, shards_dir: Path, manifest: Manifest, digests: DigestCache) -> None:
    """Raises ValueError if the teacher, or a file of its folders, is no longer the one that made the shards."""
    check_teacher(config, shards_dir, manifest)
    entries = [manifest.teacher, *manifest.teacher.get("concat", [])]
    for model, entry in zip(config.models, entries, strict=True):
        recorded: dict[str, str] = entry.get("files", {})  # of a hub model the commit, which is loaded again
        found = model_digests(Path(resolve_model(model.model or "")), digests)
        if changed := [name for name, digest in recorded.items() if found.get(name, digest) != digest]:
            raise ValueError(
                f"{model.model}: {', '.join(changed)} changed since this teacher made {shards_dir}: put it back, or use another"
                " name= and make the shards again"
            )


def pinned(config: TeacherConfig, manifest: Manifest) -> TeacherConfig:
    """The config with the commits of its hub models, which the shards record, for revisions: a branch may have moved since."""
    entries = [manifest.teacher, *manifest.teacher.get("concat", [])]
    commits = [entry.get("files", {}).get("commit") for entry in entries]
    first, *others = [
        model.model_copy(update={"revision": commit} if commit else {})
        for model, commit in zip(config.models, commits, strict=True)
    ]
    return config.model_copy(update={"revision": first.revision, "concat": others})


def initial_student(config: StudentConfig, teacher: TeacherConfig) -> StudentConfig:
    """The student's config, with the revision and the dimensions of the teacher if that is what it begins with."""
    if config.init != "teacher":
        return config
    of_teacher: dict[str, Any] = {"revision": teacher.revision} if config.revision is None else {}
    # four layers side by side are no longer the model's vectors, whose first dimensions these are
    if config.truncate_dim is None and config.pooling != "concat_last4_mean":
        of_teacher["truncate_dim"] = teacher.dimensions
    return config.model_copy(update=of_teacher)


def named_settings(config: TeacherConfig) -> dict[str, Any]:
    """The part of the config that decides the vectors. Without `dimensions` where they are all, `weight` where it is 1 or that
    of all encoders, and an endpoint where there is none: earlier versions had no such keys, and shards record a fingerprint of
    this."""
    settings = config.model_dump(mode="json", include=set(NAMED) - {"endpoint"})
    if config.endpoint is not None:
        settings["endpoint"] = {"model": config.endpoint.model}
    for entry, weight in zip([settings, *settings["concat"]], config.weights, strict=True):
        if entry["dimensions"] is None:
            del entry["dimensions"]
        if weight == 1:
            del entry["weight"]
    return settings


def _without_files(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "files"}


def _commit(name: str, revision: str | None) -> str:
    """The commit of a hub model that would be loaded: branches move, and shards of two commits must not be mixed."""
    from huggingface_hub import hf_hub_download

    if commit := model_commit(name, revision):
        return commit
    try:
        config = hf_hub_download(name, "config.json", revision=revision)
    except (OSError, ValueError) as error:
        raise hub_error(f"no teacher {name} on the hub or in its cache here: {str(error).splitlines()[0]}", error) from None
    return Path(config).parent.name  # snapshots/COMMIT/config.json
