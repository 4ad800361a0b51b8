"""The config sections `teacher` and `shards`."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import field_validator, model_validator

from distill.run.config import FileName, Section, result, speed
from distill.run.precision import Precision

OF_A_MODEL = (
    *("revision", "pooling", "max_length", "prompt_name", "concat"),
    *("vectors_field", "precision", "placement", "max_memory"),
)  # keys of the teacher that mean nothing to a server


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


class EndpointConfig(Section):
    """A server with an OpenAI-compatible embeddings API."""

    url: str = speed(
        description="the API's address up to its version, e.g. https://HOST/v1; texts are sent to URL/embeddings; another"
        " address of the same model continues a set"
    )
    model: str = result(min_length=1, description="the model's name in the requests")
    api_key_env: str | None = speed(
        None, description="name of the environment variable that holds the API key; null: the server needs none"
    )
    concurrency: int = speed(8, ge=1, description="requests in flight, of each of teacher.tasks")
    texts_per_request: int = speed(64, ge=1, description="largest number of texts in a request")
    chars_per_request: int = speed(
        100_000, ge=1, description="largest number of characters in a request; a longer text is sent alone"
    )
    timeout: float = speed(60.0, gt=0, description="seconds until a request without an answer is sent again")
    retries: int = speed(
        10, ge=0, description="how often a request is sent again that met a busy server or got no valid answer"
    )
    max_tokens: int | None = speed(
        None, gt=0, description="precompute ends when the run has used this number of tokens, over all starts and tasks"
    )
    price_per_million_tokens: float | None = speed(None, ge=0, description="for the cost that plan.py states")

    @model_validator(mode="after")  # of the section: the error of a field would show its value
    def _holds_no_secret(self) -> EndpointConfig:
        try:
            parts = urlsplit(self.url)
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_url = False
        if "@" in self.url or "?" in self.url or "#" in self.url:
            raise ValueError(
                "url has credentials, a query or a fragment in it: name the address alone, and in api_key_env the environment"
                " variable that holds the key"
            )
        if not is_url or self.url.rstrip("/").endswith("/embeddings"):
            raise ValueError("url is not an address such as https://HOST/v1, to which /embeddings is appended")
        if self.api_key_env is not None and not (self.api_key_env.isascii() and self.api_key_env.isidentifier()):
            raise ValueError("api_key_env is not the name of an environment variable; the key itself belongs in that variable")
        return self

    @property
    def host(self) -> str:
        """HOST or HOST:PORT of the url."""
        return urlsplit(self.url).netloc.lower()


class TeacherConfig(ModelConfig):
    """What embeds the text: an encoder, several whose vectors are concatenated (`concat`), precomputed vectors, or a server
    (`endpoint`)."""

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
    endpoint: EndpointConfig | None = result(
        None,
        description="instead of a model: {url: https://HOST/v1, model: NAME, api_key_env: VARIABLE}, a server with an"
        " OpenAI-compatible embeddings API",
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
        given = [name for name in ("model", "vectors", "endpoint") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"teacher needs one of `model`, `vectors` and `endpoint`, not {' and '.join(given) or 'none'}")
        if self.endpoint is not None and (refused := [name for name in OF_A_MODEL if self._is_set(name)]):
            raise ValueError(
                f"teacher.{', teacher.'.join(refused)}: an endpoint's server decides this; leave it out (prompt, dimensions and"
                " tasks are possible)"
            )
        if self.concat and (self.model is None or any(other.model is None for other in self.concat)):
            raise ValueError("teacher.concat needs a `model` in teacher and in each of its entries")
        if self.weight is not None and not self.concat:
            raise ValueError("teacher.weight is for several encoders, and teacher.concat has none; leave it out")
        if self.placement == "zero3" and self.concat:
            raise ValueError("teacher.placement zero3 is for one encoder; teacher.concat has several")
        if self.max_memory is not None and self.placement != "auto":
            raise ValueError("teacher.max_memory is for placement auto")
        return self

    def _is_set(self, name: str) -> bool:
        return getattr(self, name) != type(self).model_fields[name].default

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
        """What the vectors are from: the names of the encoders or of the endpoint's model, or the paths of `vectors`."""
        if self.endpoint is not None:
            return [self.endpoint.model]
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
