"""Finds and names what is wrong with a shard set."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from distill.run.files import seal, sha256_of
from distill.shards.blocks import ShardIndex, inspect, open_map, scan
from distill.shards.format import MOMENTS, RECIPE, TAR, Manifest, ShardError, moments_name, tar_name
from distill.shards.moments import Moments

Progress = Callable[[int], object]
Check = Callable[[mmap.mmap, int], object]


def check_shard(data: mmap.mmap, path: Path, number: int, manifest: Manifest) -> None:
    """Raises ShardError unless the tar is byte for byte the one the manifest lists; names the damaged block and member."""
    entry = manifest.shards[number]
    if len(data) == entry.bytes and sha256_of(path) == entry.sha256:
        return
    index = inspect(data, number)
    check_layout(index, number, manifest)
    raise ShardError(f"{entry.name}: a valid shard, but not the one that the manifest lists (sha256)")


def check_layout(index: ShardIndex, number: int, manifest: Manifest) -> None:
    """Raises ShardError unless the shard is of the manifest's teacher, text, width and rows."""
    entry = manifest.shards[number]
    check_origin(index, number, manifest.teacher_fingerprint, entry.text_fingerprint)
    expected = (entry.rows, manifest.dim, min(manifest.block_rows, entry.rows))
    if (index.rows, index.dim, index.block_rows) != expected:
        found = f"{index.rows} rows of {index.dim} in blocks of {index.block_rows}"
        raise ShardError(f"{entry.name}: {found}; the manifest says {expected[0]} of {expected[1]} in blocks of {expected[2]}")


def check_origin(index: ShardIndex, number: int, teacher_fingerprint: str, text_fingerprint: str) -> None:
    """Raises ShardError unless the shard was made by this teacher from this text chunk."""
    if index.teacher_fingerprint != teacher_fingerprint:
        raise ShardError(f"{tar_name(number)}: foreign, made by teacher {index.teacher_fingerprint}, not {teacher_fingerprint}")
    if index.text_fingerprint != text_fingerprint:
        raise ShardError(f"{tar_name(number)}: foreign, made from text {index.text_fingerprint}, not {text_fingerprint}")


def verify_all(directory: str | Path, progress: Progress = lambda num_bytes: None) -> list[str]:
    """One line for each file of the set that is not as it was written; empty if every byte is.

    progress: called with the bytes of each tar. Without a valid manifest the tars that are there are verified against their
    own checksums alone.
    """
    directory = Path(directory)
    try:
        manifest = Manifest.load(directory)
    except ShardError as error:
        return [str(error), *(problem for _, problem in damaged(directory, present(directory), inspect, progress))]
    numbers = range(len(manifest.shards))
    problems = [problem for _, problem in damaged(directory, numbers, listed_check(directory, manifest), progress)]
    return problems + unlisted(directory, len(manifest.shards)) + damage_of_derived_files(directory, manifest)


def damaged(directory: Path, numbers: Iterable[int], check: Check, progress: Progress) -> Iterator[tuple[int, str]]:
    """Each shard of `numbers` that is missing or fails `check`, and why."""
    for number in numbers:
        try:
            data = open_map(directory / tar_name(number))
            check(data, number)
            progress(len(data))
        except ShardError as error:
            yield number, str(error)


def listed_check(directory: Path, manifest: Manifest) -> Check:
    def check(data: mmap.mmap, number: int) -> None:
        check_shard(data, directory / tar_name(number), number, manifest)
        check_layout(scan(data, number), number, manifest)

    return check


def present(directory: Path) -> list[int]:
    """The numbers of the tars in the folder."""
    return sorted(int(path.stem) for path in directory.glob("*.tar") if TAR.fullmatch(path.name))


def unlisted(directory: Path, num_shards: int) -> list[str]:
    listed = set(map(tar_name, range(num_shards)))
    names = sorted(path.name for path in directory.glob("*.tar"))
    return [f"{name}: in the folder and not in the manifest" for name in names if name not in listed]


def damage_of_derived_files(directory: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the files that are computed from the shards: the moments, the sidecars and the recipe."""
    expected = {MOMENTS: manifest.moments_sha256}
    expected |= {moments_name(number): entry.moments_sha256 for number, entry in enumerate(manifest.shards)}
    problems = []
    for name, sha256 in expected.items():
        if not (directory / name).exists():
            problems.append(f"{name}: missing")
        elif sha256_of(directory / name) != sha256:
            problems.append(f"{name}: not as it was written (sha256)")
    if not problems:
        moments = Moments.load(directory / MOMENTS)
        if (moments.count, moments.dim) != (manifest.count, manifest.dim):
            problems.append(f"{MOMENTS}: of {moments.count} rows of {moments.dim}, not {manifest.count} of {manifest.dim}")
    recipe = directory / RECIPE
    if not recipe.exists() or recipe.read_bytes() != seal(manifest.recipe(), indent=1):
        problems.append(f"{RECIPE}: missing, or not what the manifest says")
    return problems
