"""The names, the manifest and the sealed JSON of a shard set."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from distill.run.files import canonical_json, fingerprint, publish

VERSION = 1
MANIFEST = "manifest.json"
RECIPE = "recipe.json"
MOMENTS = "moments.npz"
HELD_OUT = "held_out"
MAX_SHARDS = 1_000_000
HEX = re.compile(r"[0-9a-f]{64}")
TAR = re.compile(r"[0-9]{6}\.tar")


class ShardError(ValueError):
    """An invalid shard set; the message names the file, the block and member where known, and the fix."""


def tar_name(index: int) -> str:
    return f"{index:06d}.tar"


def moments_name(index: int) -> str:
    return f"{index:06d}.{MOMENTS}"


def seal(value: dict[str, Any], *, indent: int | None = None) -> bytes:
    """`value` as JSON with its own fingerprint under the key "self", so that any changed byte is detected."""
    return canonical_json({**value, "self": fingerprint(value)}, indent)


def unseal(raw: bytes, *, indent: int | None = None) -> dict[str, Any]:
    """The argument of `seal`. Raises ValueError if a byte differs from what `seal` wrote."""
    value = json.loads(raw)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    value.pop("self", None)
    if seal(value, indent=indent) != raw:
        raise ValueError("it was changed after it was written (its own sha256 does not fit)")
    return value


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    with publish(path) as file:
        file.write(seal(value, indent=1))


def read_sealed(path: Path) -> dict[str, Any]:
    try:
        return unseal(path.read_bytes(), indent=1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ShardError(f"{path}: {error}; {repair_hint(path.parent)}") from None


def repair_hint(directory: Path) -> str:
    return f"run: python -m distill.shards repair {directory}"


@dataclass(frozen=True)
class ShardEntry:
    """A shard in the manifest. text_fingerprint: the text chunk's sha256; moments_sha256: of the sidecar's bytes."""

    name: str
    rows: int
    bytes: int
    sha256: str
    text_fingerprint: str
    moments_sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of a finished set. A reader opens only what is listed here."""

    version: int
    count: int
    dim: int
    dtype: str
    rows: int
    block_rows: int
    teacher: dict[str, Any]
    teacher_fingerprint: str
    text_fingerprint: str
    moments_sha256: str
    shards: tuple[ShardEntry, ...]

    def recipe(self) -> dict[str, Any]:
        """The arguments of `finish`, stored beside the manifest, so that either can be rebuilt from the other."""
        return {
            "teacher": self.teacher,
            "teacher_fingerprint": self.teacher_fingerprint,
            "text_fingerprint": self.text_fingerprint,
            "text_fingerprints": [entry.text_fingerprint for entry in self.shards],
            "rows": self.rows,
            "block_rows": self.block_rows,
        }

    def save(self, directory: Path) -> None:
        write_sealed(directory / RECIPE, self.recipe())
        write_sealed(directory / MANIFEST, asdict(self))

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Reads and checks DIR/manifest.json. Raises ShardError that names the file and what is wrong."""
        path = directory / MANIFEST
        try:
            value = read_sealed(path)
        except FileNotFoundError:
            raise ShardError(f"no finished shard set at {directory} (no {MANIFEST}): run precompute") from None
        try:
            return cls.from_json(value)
        except ValueError as error:
            raise ShardError(f"{path}: {error}; {repair_hint(directory)}") from None

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Manifest:
        if value.get("version") != VERSION:
            raise ValueError(f"version is {value.get('version')!r}; this program reads {VERSION}")
        _demand_keys(cls, value, "the manifest")
        if not isinstance(value["shards"], list):
            raise ValueError("shards is not a list")
        shards = tuple(_entry(index, entry) for index, entry in enumerate(value["shards"]))
        manifest = cls(**{**value, "shards": shards})
        for key in ("count", "dim", "rows", "block_rows"):
            _demand_count(getattr(manifest, key), key)
        for key in ("teacher_fingerprint", "text_fingerprint"):
            if not isinstance(getattr(manifest, key), str):
                raise ValueError(f"{key} is not a string")
        _demand_hex(manifest.moments_sha256, "moments_sha256")
        if manifest.dtype != "float16":
            raise ValueError(f"dtype is {manifest.dtype!r}, not float16")
        if not isinstance(manifest.teacher, dict):
            raise ValueError("teacher is not an object")
        if not shards:
            raise ValueError("shards is empty")
        if max(entry.rows for entry in shards) > manifest.rows:
            raise ValueError(f"a shard has more than rows = {manifest.rows} texts")
        if sum(entry.rows for entry in shards) != manifest.count:
            raise ValueError(f"count is {manifest.count}, but the shards' rows add up to {sum(e.rows for e in shards)}")
        return manifest


def _entry(index: int, value: Any) -> ShardEntry:
    where = f"shards[{index}]"
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object")
    _demand_keys(ShardEntry, value, where)
    entry = ShardEntry(**value)
    if not isinstance(entry.name, str) or not TAR.fullmatch(entry.name) or entry.name != tar_name(index):
        raise ValueError(f"{where}.name is {entry.name!r}, not {tar_name(index)!r}")
    _demand_count(entry.rows, f"{where}.rows")
    _demand_count(entry.bytes, f"{where}.bytes")
    _demand_hex(entry.sha256, f"{where}.sha256")
    _demand_hex(entry.moments_sha256, f"{where}.moments_sha256")
    if not isinstance(entry.text_fingerprint, str):
        raise ValueError(f"{where}.text_fingerprint is not a string")
    return entry


def _demand_keys(cls: type[Manifest] | type[ShardEntry], value: dict[str, Any], where: str) -> None:
    known = {field.name for field in fields(cls)}
    if value.keys() != known:
        raise ValueError(f"{where} lacks {sorted(known - value.keys())} and has unknown {sorted(value.keys() - known)}")


def _demand_count(value: Any, where: str) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{where} is {value!r}, not a positive integer")


def _demand_hex(value: Any, where: str) -> None:
    if not isinstance(value, str) or not HEX.fullmatch(value):
        raise ValueError(f"{where} is {value!r}, not a sha256")
