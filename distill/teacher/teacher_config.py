"""The config sections `teacher` and `shards`."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from distill.run.config import FileName, Section, result, speed
from distill.run.precision import Precision


class ModelConfig(Section):
    """One encoder of the teacher."""

    model: str | None = result(
        None, description="a folder, a hub name, or package:NAME/FOLDER for a model inside a Python package"
    )
    revision: str | None = result(None, description="a hub model's commit, tag or branch")
    pooling: Literal["cls", "pooler", "mean", "lasttoken"] | None = result(
        None, description="for a plain encoder; in a sentence-transformers folder it replaces the folder's own pooling alone"
    )
    max_length: int | None = result(None, gt=2, description="tokens; longer texts are truncated; null: the model's limit")
    prompt: str | None = result(None, description="put before every text; null: the model's default prompt, if it has one")
    prompt_name: str | None = result(None, description="instead of `prompt`: the name of one of the model's prompts")
    dimensions: int | None = result(
        None, ge=1, description="the first dimensions of each vector (Matryoshka), normalised again; null: the model's own"
    )
    weight: float | None = result(
        None, gt=0, description="with concat: the weight of this encoder's cosine in the mean of all encoders'; null: 1"
    )

    @model_validator(mode="after")
    def _one_prompt(self) -> ModelConfig:
        if self.prompt is not None and self.prompt_name is not None:
            raise ValueError("give `prompt` or `prompt_name`, not both")
        return self


class TeacherConfig(ModelConfig):
    """What embeds the text: an encoder, several whose vectors are concatenated (`concat`), or precomputed vectors."""

    concat: list[ModelConfig] = result(
        [], description="further encoders (model to weight); their vectors are appended to the first one's"
    )
    vectors: FileName | list[FileName] | None = result(
        None,
        description="instead of a model: a path or glob, or a list of them, of .npy, .safetensors or .parquet files with a"
        " vector for each raw text, in order; the files of a glob are sorted",
    )
    vectors_field: str = result(
        "embedding", description="the column of .parquet files of vectors; the tensor of .safetensors files with several"
    )
    precision: Precision = result("auto", description="auto: bf16 where the processor has it")
    tokens_per_batch: int = speed(8192, gt=0, description="largest number of tokens in a forward pass, with padding")
    tasks: int = speed(1, ge=1, description="number of precompute processes that pipeline.py starts")
    placement: Literal["device", "auto", "zero3"] = speed(
        "device",
        description="auto: over all GPUs, memory and disk (accelerate); zero3: sharded over the ranks of precompute.py",
    )
    max_memory: dict[str, str] | None = speed(
        None,
        description='placement auto: limits, e.g. {"0": 70GiB, cpu: 100GiB}; the rest stays on disk',
    )

    @field_validator("vectors")
    @classmethod
    def _some_vectors(cls, vectors: str | list[str] | None) -> str | list[str] | None:
        if vectors == []:
            raise ValueError("teacher.vectors lists no file")
        return vectors

    @model_validator(mode="after")
    def _is_consistent(self) -> TeacherConfig:
        if (self.model is None) == (self.vectors is None):
            raise ValueError("teacher needs either `model` or `vectors`, not both and not neither")
        if self.concat and (self.vectors is not None or any(other.model is None for other in self.concat)):
            raise ValueError("teacher.concat needs a `model` in teacher and in each of its entries")
        if self.weight is not None and not self.concat:
            raise ValueError("teacher.weight is for several encoders, and teacher.concat has none; leave it out")
        if self.placement == "zero3" and self.concat:
            raise ValueError("teacher.placement zero3 is for one encoder; teacher.concat has several")
        if self.max_memory is not None and self.placement != "auto":
            raise ValueError("teacher.max_memory is for placement auto")
        return self

    @property
    def models(self) -> list[ModelConfig]:
        """All encoders, in the order of their dimensions."""
        return [self, *self.concat]

    @property
    def weights(self) -> list[float]:
        """The weight of each encoder's cosine in that of the concatenated vectors; ones where all are equal."""
        weights = [1.0 if model.weight is None else model.weight for model in self.models]
        return weights if len(set(weights)) > 1 else [1.0] * len(weights)

    @property
    def vector_paths(self) -> list[str]:
        """The paths and globs of `vectors`; none of a model."""
        given = self.vectors or []
        return [given] if isinstance(given, str) else given

    @property
    def names(self) -> list[str]:
        """What the vectors are from: the names of the encoders, or the paths of `vectors`."""
        return self.vector_paths or [model.model or "" for model in self.models]


class ShardsConfig(Section):
    """The sizes of the WebDataset shards, and the runs whose vectors are used again."""

    rows: int = result(65_536, gt=0, description="texts per shard")
    block_rows: int = result(1024, gt=0, description="texts per WebDataset sample")
    reuse: list[FileName] = speed(
        [],
        description="finished runs of this teacher, or of one of its encoders, whose vectors are taken for the texts that they"
        " have: names under runs_dir, or directories; the others are embedded",
    )
