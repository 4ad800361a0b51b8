"""A teacher behind an endpoint: texts to vectors by a server, and how its model is recognised.

Nothing of the server's model can be read but its vectors, so those of a few fixed texts are its fingerprint.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distill.corpus import TextChunk
from distill.corpus.prepare import source_names
from distill.corpus.text_config import SourceConfig
from distill.teacher.endpoint_client import EndpointClient
from distill.teacher.identity import named_settings
from distill.teacher.teacher_config import TeacherConfig
from distill.teacher.token_log import TokenLog

PROBES = (
    "A small model learns from a large one.",
    "Wie hoch ist der Fernsehturm? O πύργος έχει ύψος 368 μέτρα. 电视塔有多高",
    "def area(radius):\n    return 3.14159 * radius ** 2  # of a circle\n",
    " ".join(f"Line {n} of this page lists {n * 37 % 101} items for shelf {n * 53 % 89}." for n in range(6)),
)
"""In several scripts; the longest has about 100 tokens, since some servers refuse a text that exceeds their longest input."""

GIVEN = "given"  # the precision of a server's model: it is the server's

MIN_COSINE = 0.999
"""Between vectors of one text by one model. Measured on three encoders, 1 - cosine is 1e-7 by rounding to float16, up to 3e-5
by other batches in bf16, up to 9e-5 by bf16 instead of fp32; another prompt makes it 1e-2, and int8 weights at least as much.
"""


class EndpointTeacher:
    """A server's model: texts to L2-normalised float16 vectors [n, dim], in the texts' order, by requests to the server.

    `read` puts the prompts before a text chunk and `encode` sends it. dim: known after `probe`. Raises ValueError without an
    API key in the environment.
    """

    def __init__(self, config: TeacherConfig, *, sources: Sequence[SourceConfig] = (), log: TokenLog | None = None) -> None:
        """sources: those of the texts, which may have prompts. log: counts the tokens."""
        assert config.endpoint is not None
        self.config = config
        self.log = log or TokenLog(limit=config.endpoint.max_tokens)
        self.client = EndpointClient(config.endpoint, self.log)
        self.dim = 0
        self._sources = sources

    def probe(self, texts: Sequence[str] = PROBES) -> np.ndarray:
        """The vectors of the probe texts, without prompts; to be called before any other text is embedded.

        Raises ValueError if they are shorter than `teacher.dimensions`, or if the server refuses them.
        """
        vectors, wanted = self.client.connect(texts, self.config.dimensions), self.config.dimensions
        if wanted is not None and vectors.shape[1] < wanted:
            raise ValueError(
                f"teacher.dimensions {wanted} is above the {vectors.shape[1]} dimensions that {self} gives;"
                " lower it, or leave it out"
            )
        self.dim = wanted or vectors.shape[1]
        return self._unit(vectors)

    def identity(self, texts: Sequence[str] = PROBES) -> dict[str, Any]:
        """What identifies the teacher, JSON-able: its settings, and the vectors of the probe texts."""
        vectors = [base64.b64encode(vector.astype("<f2").tobytes()).decode() for vector in self.probe(texts)]
        probes = [{"text": text, "float16": vector} for text, vector in zip(texts, vectors, strict=True)]
        host = self.client.config.host
        return named_settings(self.config) | {"precision": GIVEN, "host": host, "probes": probes}

    def check(self, recorded: dict[str, Any], where: object) -> None:
        """Raises ValueError unless the server has the model whose identity was recorded for `where`, such as its shards."""
        check_probes(recorded, self.identity([probe["text"] for probe in recorded["probes"]]), where)

    def read(self, chunk: TextChunk) -> list[str]:
        """The texts of a chunk, each with the prompt of its source before it."""
        if not self._sources:
            return [self._prompt(None) + text for text in chunk.texts]
        prompts = [self._prompt(source) for source in self._sources]
        numbers = [0] * len(chunk.texts) if chunk.sources is None else chunk.sources.tolist()
        return [prompts[number] + text for number, text in zip(numbers, chunk.texts, strict=True)]

    def encode(self, read: list[str], tick: Callable[[int], object] = lambda rows: None) -> np.ndarray:
        """tick: called with the number of texts of each request that was answered."""
        return self._unit(self.client.embed(read, tick))

    def describe(self) -> list[str]:
        """Lines on who shortens the vectors, and on prompts."""
        endpoint = self.client.config
        lines = [f"teacher: {self}, {self.dim} dimensions, {endpoint.concurrency} requests at once"]
        if self.config.dimensions is not None:
            by = "by the server" if "dimensions" in self.client.fields and self.client.dim == self.dim else "here"
            lines.append(f"teacher.dimensions {self.dim}: its vectors are shortened {by}, and normalised again")
        names = source_names([source.model_dump() for source in self._sources])
        for name, source in zip(names, self._sources, strict=True):
            if prompt := self._prompt(source):
                lines.append(f"prompt of {name}: {prompt!r}")
            elif source.role is not None:
                lines.append(
                    f"no prompt is put before {name}: an endpoint names none for its role, {source.role};"
                    " text.sources[].prompt gives one"
                )
        return lines

    def __str__(self) -> str:
        return f"{self.client.config.model} at {self.client.config.host}"

    def _prompt(self, source: SourceConfig | None) -> str:
        given = source.prompt if source is not None else None
        return given if given is not None else self.config.prompt or ""

    def _unit(self, vectors: np.ndarray) -> np.ndarray:
        """float16, L2-normalised, of the first `dim` numbers."""
        kept = vectors[:, : self.dim].astype(np.float64)  # the squares of small float32 would be zero
        lengths = np.linalg.norm(kept, axis=1, keepdims=True)
        if not lengths.all():
            raise ValueError(f"{self} gives a vector whose first {self.dim} numbers are zero: raise teacher.dimensions")
        return (kept / lengths).astype(np.float16)


def recorded_dim(identity: dict[str, Any] | None) -> int | None:
    """The width of the vectors of a recorded identity, None if there is none."""
    return len(_vector(identity["probes"][0])) if identity and "probes" in identity else None


def check_probes(recorded: dict[str, Any], found: dict[str, Any], where: object) -> None:
    """Raises ValueError unless two identities are of one model; where: what was made with the recorded one."""
    fix = "serve the model that it was begun with, or use another name= for this one"
    for before, now in zip(recorded["probes"], found["probes"], strict=True):
        first, second = _vector(before), _vector(now)
        who = f"{found['endpoint']['model']} at {found['host']}"
        if first.shape != second.shape:
            raise ValueError(f"{who} gives vectors of {len(second)} dimensions, and {where} was begun with {len(first)}: {fix}")
        cosine = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
        if cosine < MIN_COSINE:
            raise ValueError(
                f"{who} gives other vectors than those that {where} was begun with: the cosine of both for the text"
                f" {before['text'][:40]!r} is {cosine:.5f}, and at least {MIN_COSINE} for one model: {fix}"
            )


def _vector(probe: dict[str, str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(probe["float16"]), "<f2").astype(np.float64)
