"""The names and the manifest of a shard set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from distill.run.files import unseal, write_json
from distill.run.prompts import Role

VERSION = 1
MANIFEST = "manifest.json"
RECIPE = "recipe.json"
MOMENTS = "moments.npz"
HELD_OUT = "held_out"
MAX_SHARDS = 1_000_000
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
TAR = re.compile(r"[0-9]{6}\.tar")


class ShardError(ValueError):
    """An invalid shard set; the message names the file, the block and member where known, and the fix."""


def tar_name(index: int) -> str:
    return f"{index:06d}.tar"


def moments_name(index: int) -> str:
    return f"{index:06d}.{MOMENTS}"


def repair_hint(directory: Path) -> str:
    return f"run: python -m distill.shards repair {directory}"


class _StrictModel(BaseModel):
    """Base of the manifest's models: unknown keys and wrong types are errors."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class _Extended(_StrictModel):
    """A model whose `later` field is left out where it is empty: earlier versions did not have it."""

    later: ClassVar[str]

    @model_serializer(mode="wrap")
    def _without_empty(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value or name != self.later}


class ShardEntry(_Extended):
    """A shard in the manifest. rows: its texts. text_fingerprint: of the text chunk. moments_sha256: the sha256 of
    NNNNNN.moments.npz, the sums over the shard's vectors from which the PCA follows. translations: [number of a source, column,
    number of its texts that have a translation there] for each."""

    later = "translations"

    name: str
    rows: PositiveInt
    bytes: PositiveInt
    sha256: Sha256
    text_fingerprint: str
    moments_sha256: Sha256
    translations: list[list[int]] = []


class SourceEntry(_Extended):
    """A source of the texts. role: what they are in retrieval. columns: of parallel text, the names of the teacher's column and
    of the translations, which are numbered from 1."""

    later = "columns"

    name: str
    role: Role | None = None
    columns: list[str] = []


class Manifest(_StrictModel):
    """The files of a finished set. A reader opens only what is listed here.

    count: texts in all shards. rows: the largest number of texts in a shard. sources: those that the shards' source.npy number,
    none where the shards have no source.npy.
    """

    version: int
    count: PositiveInt
    dim: PositiveInt
    dtype: Literal["float16"]
    rows: PositiveInt
    block_rows: PositiveInt
    teacher: dict[str, Any]
    teacher_fingerprint: str
    text_fingerprint: str
    moments_sha256: Sha256
    sources: tuple[SourceEntry, ...] = Field(default=(), strict=False)
    shards: tuple[ShardEntry, ...] = Field(min_length=1, strict=False)

    @model_validator(mode="after")
    def _is_consistent(self) -> Manifest:
        for index, entry in enumerate(self.shards):
            if entry.name != tar_name(index):
                raise ValueError(f"shards.{index}.name is {entry.name!r}, not {tar_name(index)!r}")
        if max(entry.rows for entry in self.shards) > self.rows:
            raise ValueError(f"a shard has more than rows = {self.rows} texts")
        if (total := sum(entry.rows for entry in self.shards)) != self.count:
            raise ValueError(f"count is {self.count}, but the shards' rows add up to {total}")
        return self

    def recipe(self) -> dict[str, Any]:
        """The arguments of `finish`, also stored as recipe.json: with the shards, the manifest can be rebuilt from it."""
        return {
            "teacher": self.teacher,
            "teacher_fingerprint": self.teacher_fingerprint,
            "text_fingerprint": self.text_fingerprint,
            "text_fingerprints": [entry.text_fingerprint for entry in self.shards],
            "rows": self.rows,
            "block_rows": self.block_rows,
            **({"sources": [entry.model_dump() for entry in self.sources]} if self.sources else {}),
        }

    def save(self, directory: Path) -> None:
        write_json(directory / RECIPE, self.recipe())
        write_json(directory / MANIFEST, self.model_dump(exclude=None if self.sources else {"sources"}))

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Reads and checks DIR/manifest.json. Raises ShardError that names the file and what is wrong."""
        path = directory / MANIFEST
        try:
            return cls.parse(path.read_bytes())
        except FileNotFoundError:
            raise ShardError(f"no finished shard set at {directory} (no {MANIFEST}): run precompute") from None
        except (OSError, ValueError) as error:
            raise ShardError(f"{path}: {error}; {repair_hint(directory)}") from None

    @classmethod
    def parse(cls, raw: bytes) -> Manifest:
        """The manifest in the bytes of its file. Raises ValueError for anything that `save` does not write."""
        value = unseal(raw, indent=1)
        if value.get("version") != VERSION:
            raise ValueError(f"version is {value.get('version')!r}; this program reads {VERSION}")
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            wrong = [(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors()]
            raise ValueError("; ".join(f"{where}: {what}" if where else what for where, what in wrong)) from None
