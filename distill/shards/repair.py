"""Deletes damaged shards only; rebuilds the files that are computed from the valid ones."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from distill.run.files import sha256_of, unseal
from distill.shards.blocks import inspect
from distill.shards.format import MANIFEST, MOMENTS, RECIPE, Manifest, ShardError, moments_name, tar_name
from distill.shards.verify import (
    Check,
    Progress,
    check_origin,
    damage_of_derived_files,
    damaged,
    listed_check,
    present,
    unlisted,
)
from distill.shards.writer import finish


def repair(directory: str | Path, progress: Progress = lambda num_bytes: None) -> tuple[list[str], bool]:
    """Deletes damaged shards, so that precompute makes them again; if there are none, rebuilds moments, recipe and manifest.

    Returns what was done, one line each, and whether the set is complete now.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ShardError(f"no folder at {directory}")
    manifest, recipe = _descriptions(directory)
    num_shards = len(recipe["text_fingerprints"]) if recipe else None
    numbers = present(directory) if num_shards is None else range(num_shards)
    check = listed_check(directory, manifest) if manifest else _unlisted_check(recipe)

    bad = list(damaged(directory, numbers, check, progress))
    actions = [_delete(directory, number, problem) for number, problem in bad]
    if num_shards is not None:
        actions += [_set_aside(directory, problem.partition(":")[0]) for problem in unlisted(directory, num_shards)]
    if bad or recipe is None:
        (directory / MANIFEST).unlink(missing_ok=True)
        (directory / MOMENTS).unlink(missing_ok=True)
        return [*actions, "run precompute again: it makes the missing shards and the manifest"], False
    beside = damage_of_derived_files(directory, manifest) if manifest else [f"{MANIFEST}: missing or damaged"]
    if beside:
        if manifest:
            _drop_bad_sidecars(directory, manifest)
        finish(directory, **recipe)
        actions += [f"rebuilt from the shards: {problem}" for problem in beside]
    return actions, True


def _descriptions(directory: Path) -> tuple[Manifest | None, dict[str, Any] | None]:
    """The manifest, and the arguments of `finish` from it or from their own file; None for what is missing or damaged."""
    try:
        manifest = Manifest.load(directory)
        return manifest, manifest.recipe()
    except ShardError:
        try:
            return None, unseal((directory / RECIPE).read_bytes(), indent=1)
        except (OSError, ValueError):
            return None, None


def _unlisted_check(recipe: dict[str, Any] | None) -> Check:
    def check(data: mmap.mmap, number: int) -> None:
        index = inspect(data, number)
        if recipe is not None:
            check_origin(index, number, recipe["teacher_fingerprint"], recipe["text_fingerprints"][number])

    return check


def _delete(directory: Path, number: int, problem: str) -> str:
    (directory / tar_name(number)).unlink(missing_ok=True)
    (directory / moments_name(number)).unlink(missing_ok=True)
    return f"to be made again: {problem}"


def _set_aside(directory: Path, name: str) -> str:
    (directory / name).rename(directory / f"{name}.unlisted")
    return f"{name}: not in the manifest, renamed to {name}.unlisted"


def _drop_bad_sidecars(directory: Path, manifest: Manifest) -> None:
    for number, entry in enumerate(manifest.shards):
        sidecar = directory / moments_name(number)
        if sidecar.exists() and sha256_of(sidecar) != entry.moments_sha256:
            sidecar.unlink()
