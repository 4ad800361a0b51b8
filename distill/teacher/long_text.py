"""Texts that are longer than the teacher reads: counted by its tokenizers, without its weights, and cut or dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distill.corpus.long_text import Reading, blocks, cut
from distill.corpus.text_config import SourceConfig
from distill.run.model_folders import resolve_model
from distill.run.prompts import ROLE_PROMPTS, Role
from distill.student.encoder import NO_LIMIT
from distill.student.student import characters_covered
from distill.teacher.batching import can_tokenise, tokenise
from distill.teacher.encoder import prompt_of
from distill.teacher.load import load_without_weights
from distill.teacher.teacher_config import ModelConfig, TeacherConfig

MIN_ROOM = 8  # tokens of a text: with less, a part is not a text
CHARS_PER_CALL = 1 << 22  # tokenizers keep about 100 bytes a token


class TextReader:
    """One encoder of the teacher without its weights: which tokens it reads of a text."""

    def __init__(self, config: ModelConfig) -> None:
        """Raises ValueError for an encoder that reads texts of any length, or whose tokenizer cannot tell where tokens lie."""
        model = load_without_weights(config)
        limit = model.max_seq_length
        if not can_tokenise(model) or limit is None or limit >= NO_LIMIT:
            raise ValueError(
                f"{config.model} reads texts of any length: set teacher.max_length, or leave text.long at truncate"
            )
        if not model.tokenizer.is_fast:
            raise ValueError(f"{config.model} has only a slow tokenizer, which text.long=truncate alone can do with")
        self._model, self.max_length = model, int(limit)
        self._prompts: Mapping[Role | None, str] = {role: prompt_of(model, config, role) for role in (None, *ROLE_PROMPTS)}
        backend = model.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        self.identity = {
            "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
            "max_length": self.max_length,
        }
        model.max_seq_length = self.max_length + 1  # `lengths` need not be exact above the limit

    def prompt(self, source: SourceConfig) -> str:
        """What is put before the texts of a source, as `Teacher.prompts` has it."""
        return self._prompts[source.role] if source.prompt is None else source.prompt

    def lengths(self, texts: Sequence[str], prompt: str) -> np.ndarray:
        """int64 [n], the tokens of texts with a prompt and the special ones; max_length + 1 of those that would be cut."""
        return tokenise(self._model, texts, prompt).lengths

    def readings(self, texts: Sequence[str], prompt: str) -> list[Reading]:
        """Where the tokens of each text end, and how many of them are read."""
        room, found = self.room(prompt), []
        backend = self._model.tokenizer.backend_tokenizer
        backend.no_truncation()  # `lengths` sets it again
        for encoding in backend.encode_batch([prompt + text for text in texts]):
            ends = np.array([end for _, end in encoding.offsets], np.int64) - len(prompt)
            found.append(Reading(np.maximum.accumulate(ends[ends > 0]), room))
        return found

    def characters_read(self, texts: Sequence[str], roles: Sequence[Role | None]) -> np.ndarray:
        """int64 [n], how many characters of each text the tokens cover that the encoder reads."""
        prompts = [self._prompts[role] for role in roles]
        backend = self._model.tokenizer.backend_tokenizer
        backend.enable_truncation(self.max_length, direction=self._model.tokenizer.truncation_side)
        encodings = backend.encode_batch([prompt + text for prompt, text in zip(prompts, texts, strict=True)])
        return characters_covered(encodings, [len(prompt) for prompt in prompts])

    def room(self, prompt: str) -> int:
        """The number of tokens that a text may have with a prompt."""
        return self.max_length - int(self.lengths([""], prompt)[0])


class LongTexts:
    """What becomes of texts that the teacher, or one of several encoders, would cut: a `distill.corpus.long_text.Limit`."""

    def __init__(self, action: Literal["chunk", "drop"], config: TeacherConfig, sources: Sequence[SourceConfig]) -> None:
        """Raises ValueError for a teacher without a tokenizer or a limit, or whose prompt leaves no room for a text."""
        self._action = action
        self._readers = [TextReader(model) for model in config.models]
        self._prompts = [[reader.prompt(source) for reader in self._readers] for source in sources]
        for reader, prompt in {pair for prompts in self._prompts for pair in zip(self._readers, prompts, strict=True)}:
            if (room := reader.room(prompt)) < MIN_ROOM:
                raise ValueError(
                    f"text.long {action}: the teacher reads {reader.max_length} tokens (teacher.max_length), and its prompt"
                    f" {prompt!r} leaves {max(room, 0)} for a text; raise it, or leave text.long at truncate"
                )
        self.identity: Mapping[str, Any] = {
            "readers": [reader.identity for reader in self._readers],
            "prompts": self._prompts,
        }

    def __call__(self, texts: Sequence[str], source: int) -> list[list[str]]:
        """What takes the place of each text of a source: itself, its parts or none."""
        found: list[list[str]] = []
        for some in blocks(texts, len(texts), CHARS_PER_CALL):
            fits = self._fit(some, source)
            parts = iter(self._cut([text for text, fit in zip(some, fits, strict=True) if not fit], source))
            found += [[text] if fit else next(parts) for text, fit in zip(some, fits, strict=True)]
        return found

    def _fit(self, texts: Sequence[str], source: int) -> np.ndarray:
        """bool [n], whether all encoders read the texts to their end."""
        pairs = zip(self._readers, self._prompts[source], strict=True)
        return np.all([reader.lengths(texts, prompt) <= reader.max_length for reader, prompt in pairs], axis=0)

    def _cut(self, texts: Sequence[str], source: int) -> list[list[str]]:
        """The parts of each text, or none; what the cuts try is tokenised for all texts together."""
        parts: list[list[str]] = [[] for _ in texts]
        if not texts or self._action == "drop":
            return parts
        pairs = zip(self._readers, self._prompts[source], strict=True)
        readings = zip(*(reader.readings(texts, prompt) for reader, prompt in pairs), strict=True)
        cuts: dict[int, Generator[str, bool, list[str]]] = dict(enumerate(map(cut, texts, readings)))
        tried = {number: next(cutting) for number, cutting in cuts.items()}
        while tried:
            for number, fit in zip(list(tried), self._fit(list(tried.values()), source).tolist(), strict=True):
                try:
                    tried[number] = cuts[number].send(fit)
                except StopIteration as finished:
                    parts[number] = finished.value
                    del tried[number]
        return parts


def characters_read(config: TeacherConfig, texts: Sequence[str], roles: Sequence[Role | None]) -> np.ndarray | None:
    """int64 [n], how many characters of each text the teacher reads, or that encoder of several which reads most.

    None where that is not known: for vectors and endpoints, encoders without a limit, and those that are in no folder here.
    """
    try:
        if not all(Path(resolve_model(model.model or "")).is_dir() for model in config.models):
            return None
        return np.max([TextReader(model).characters_read(texts, roles) for model in config.models], axis=0)
    except (OSError, ValueError):
        return None
