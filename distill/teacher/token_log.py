"""Tokens that a run has sent to an endpoint, over all its starts and tasks: a JSON file of each process in one folder."""

from __future__ import annotations

import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from distill.run import liveness
from distill.run.files import read_json, write_json

FOLDER = "tokens"  # in precompute/
SAVE_SECONDS = 2.0  # between writes: the tokens that a killed process does not record
CHARS_PER_TOKEN = 4  # of a server that does not report its tokens; of English text


@dataclass(frozen=True)
class Usage:
    """Requests, their characters and tokens; is_estimate: whether some tokens are CHARS_PER_TOKEN characters, not counted."""

    requests: int = 0
    characters: int = 0
    tokens: int = 0
    is_estimate: bool = False

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests,
            self.characters + other.characters,
            self.tokens + other.tokens,
            self.is_estimate or other.is_estimate,
        )

    @property
    def tokens_per_character(self) -> float:
        return self.tokens / self.characters if self.characters else 1 / CHARS_PER_TOKEN

    def __str__(self) -> str:
        estimate = f" (estimated: {CHARS_PER_TOKEN} characters each)" if self.is_estimate else ""
        return f"{self.requests:,} requests, {self.tokens:,} tokens{estimate}"


class TokenLog:
    """Counts the tokens of this process, `own`, and saves them for other processes of the run. folder: None saves nothing.

    limit: tokens of the run at which `add` raises ValueError.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.own = Usage()
        self._folder, self._limit = folder, limit
        self._name = f"{liveness.label()}-{secrets.token_hex(4)}.json"
        self._others = self._read_others()
        self._saved_at = time.monotonic()

    @property
    def total(self) -> Usage:
        """Of the run, as this process last read it."""
        return self._others + self.own

    def check(self) -> None:
        """Raises ValueError if the limit is reached."""
        if self._limit is not None and self.total.tokens >= self._limit:
            raise ValueError(
                f"teacher.endpoint.max_tokens {self._limit:,} is reached: this run has used {self.total}; its finished shards"
                " are kept: raise the limit, and the same command continues"
            )

    def add(self, characters: int, tokens: int | None) -> None:
        """Counts an answered request; tokens: as the server reports them, None if it does not."""
        estimate = max(1, characters // CHARS_PER_TOKEN)
        self.own += Usage(1, characters, estimate if tokens is None else tokens, tokens is None)
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save()
        self.check()

    def save(self) -> None:
        """Writes this process's file and reads those of the others."""
        self._saved_at = time.monotonic()
        if self._folder is not None and self.own.requests:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(self._folder / self._name, asdict(self.own))
            self._others = self._read_others()

    def _read_others(self) -> Usage:
        return Usage() if self._folder is None else read_usage(self._folder, but=self._name)


def read_usage(folder: Path, but: str = "") -> Usage:
    """What the files of `folder` record together; but: the name of one that is left out."""
    records = [read_json(path) for path in sorted(folder.glob("*.json")) if path.name != but]
    return sum((Usage(**record) for record in records if record is not None), Usage())
