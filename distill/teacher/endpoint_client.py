"""Requests to an OpenAI-compatible embeddings API: several at once, verified, and sent again where that may help.

`httpx2` sends them. The retries are written here because a client library sees neither a vector that is missing nor one that is
not finite, and the OpenAI one does not wait for a Retry-After of more than a minute.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import ipaddress
import json
import logging
import math
import os
import random
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from distill.run.temporary import TemporaryError
from distill.teacher.teacher_config import EndpointConfig
from distill.teacher.token_log import TokenLog

if TYPE_CHECKING:
    import httpx2

logger = logging.getLogger(__name__)
BUSY = (408, 425, 429)  # and 5xx
TOO_LARGE = (400, 413, 422)  # servers answer with any of them
FIRST_WAIT, MAX_WAIT = 0.5, 60.0  # seconds; doubled with each try
MAX_RETRY_AFTER = 3600.0
SECONDS_BETWEEN_WARNINGS = 10.0
MAX_SHOWN = 300  # characters of a server's message
KEPT = "finished shards are kept: the same command continues"
Fields = dict[str, Any]


class Refused(ValueError):
    """The server refuses a request, and would refuse it again."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Unanswered(Exception):
    """A request without a valid answer. retry_after: seconds that the server asks to wait; lasting: its vectors are wrong."""

    def __init__(self, message: str, retry_after: float | None = None, *, lasting: bool = False) -> None:
        super().__init__(message)
        self.retry_after, self.lasting = retry_after, lasting


class _Answer(NamedTuple):
    vectors: np.ndarray
    tokens: int | None


class EndpointClient:
    """Texts to vectors, float32 [n, dim] as the server gives them, in the texts' order. dim: known after the first answer.

    The API key is read from the environment here. Raises ValueError if it is not there, or if httpx2 is not installed.
    """

    def __init__(self, config: EndpointConfig, log: TokenLog) -> None:
        if importlib.util.find_spec("httpx2") is None:
            raise ValueError("teacher.endpoint needs the package httpx2: bash launcher/install.sh quickstart,endpoint")
        self.config, self.log = config, log
        self.url = f"{config.url.rstrip('/')}/embeddings"
        self.dim: int | None = None
        self.num_retries = 0
        self.fields: Fields = {}
        self._key = api_key(config)
        self._max_texts = config.texts_per_request
        self._warned_at = -math.inf
        self._ssl: ssl.SSLContext | None = None
        if self._key and config.url.startswith("http:") and not _is_local(urlsplit(config.url).hostname or ""):
            logger.warning("teacher.endpoint.url: the API key is sent to %s unencrypted; use https", config.host)

    def connect(self, texts: Sequence[str], dimensions: int | None) -> np.ndarray:
        """The vectors of some texts. Finds out which `fields` a request may have, for all further ones.

        dimensions: the size to ask for. A server that does not know this field gives longer vectors. Raises Refused.
        """
        small = {"encoding_format": "base64"}
        wanted = [{"dimensions": dimensions}] if dimensions is not None else []
        candidates: list[Fields] = [*({**small, **size} for size in [*wanted, {}]), *wanted, {}]
        refusal: Refused | None = None
        for fields in candidates:
            self.fields = fields
            try:
                return self.embed(texts)
            except Refused as error:
                refusal = refusal or error
                if error.status not in TOO_LARGE:
                    break
        assert refusal is not None
        raise refusal

    def embed(self, texts: Sequence[str], tick: Callable[[int], object] = lambda rows: None) -> np.ndarray:
        """tick: called with the number of texts of each answered request.

        Raises Refused; TemporaryError after `retries`, or ValueError if its vectors stay wrong; ValueError at `max_tokens`.
        """
        self.log.check()
        try:
            return asyncio.run(self._embed_all(list(self._cut(texts)), tick))
        finally:
            self.log.save()

    def _cut(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """The texts of each request."""
        batch: list[str] = []
        size = 0
        for text in texts:
            if batch and (len(batch) == self._max_texts or size + len(text) > self.config.chars_per_request):
                yield batch
                batch, size = [], 0
            batch.append(text)
            size += len(text)
        if batch:
            yield batch

    async def _embed_all(self, batches: list[list[str]], tick: Callable[[int], object]) -> np.ndarray:
        import httpx2

        found: list[np.ndarray] = [np.empty(0)] * len(batches)
        waiting = iter(enumerate(batches))
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx2.Limits(max_connections=self.config.concurrency)
        self._ssl = self._ssl or httpx2.create_ssl_context()  # reads all certificates

        async def work(http: httpx2.AsyncClient) -> None:
            for number, texts in waiting:
                found[number] = await self._embed(http, texts)
                tick(len(texts))

        # a signal ends asyncio.run at once, which cancels the requests in flight; threads would wait for their answers
        async with httpx2.AsyncClient(headers=headers, limits=limits, timeout=None, verify=self._ssl) as http:
            workers = [asyncio.create_task(work(http)) for _ in range(min(self.config.concurrency, len(batches)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
        return np.concatenate(found)

    async def _embed(self, http: httpx2.AsyncClient, texts: list[str]) -> np.ndarray:
        """The vectors of one batch; of two halves where the server refuses the whole, as later ones of its size then."""
        refusal = None
        if len(texts) <= self._max_texts:
            try:
                return await self._ask(http, texts)
            except Refused as error:
                if len(texts) == 1 or error.status not in TOO_LARGE:
                    raise
                refusal = error
        half = -(-len(texts) // 2)
        vectors = np.concatenate([await self._embed(http, part) for part in (texts[:half], texts[half:])])
        if refusal is not None and half < self._max_texts:
            logger.warning("teacher.endpoint.texts_per_request is %d from here on: %s", half, refusal)
            self._max_texts = half
        return vectors

    async def _ask(self, http: httpx2.AsyncClient, texts: list[str]) -> np.ndarray:
        """The vectors of one request, which is sent again until there is a valid answer."""
        for attempt in count():
            try:
                answer = await self._send(http, texts)
            except _Unanswered as error:
                if attempt == self.config.retries:
                    kind = ValueError if error.lasting else TemporaryError
                    raise kind(f"{self.url}: no valid answer in {attempt + 1} tries, the last: {error}; {KEPT}") from None
                wait = min(MAX_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1)
                wait += min(error.retry_after or 0, MAX_RETRY_AFTER)
                self._warn_of_retry(error, attempt, wait)
                self.num_retries += 1
            else:
                self.log.add(sum(map(len, texts)), answer.tokens)
                return answer.vectors
            await asyncio.sleep(wait)
        raise AssertionError  # count() does not end

    def _warn_of_retry(self, error: _Unanswered, attempt: int, wait: float) -> None:
        """Not of the first ones, which are usual, and not of each of those in flight."""
        now = time.monotonic()
        if (attempt >= 2 or wait > MAX_WAIT) and now - self._warned_at > SECONDS_BETWEEN_WARNINGS:
            self._warned_at = now
            logger.warning("%s: %s; try %d of %d in %.0f s", self.url, error, attempt + 2, self.config.retries + 1, wait)

    async def _send(self, http: httpx2.AsyncClient, texts: list[str]) -> _Answer:
        """One request. Raises Refused or _Unanswered."""
        import httpx2

        try:
            async with asyncio.timeout(self.config.timeout):
                response = await http.post(self.url, json={"model": self.config.model, "input": texts, **self.fields})
        except TimeoutError:
            raise _Unanswered(f"no answer in {self.config.timeout:g} s (teacher.endpoint.timeout)") from None
        except httpx2.HTTPError as error:
            raise _Unanswered(self._one_line(f"{type(error).__name__}: {error}")) from None
        status = response.status_code
        if status in BUSY or status >= 500:
            wait = seconds_to_wait(response.headers.get("retry-after"), datetime.now(UTC))
            raise _Unanswered(f"HTTP {status}: {self._message(response)}", wait)
        if status != 200:
            raise Refused(status, self._refusal(response, texts))
        try:
            answer = response.json()
            vectors = _vectors(answer, len(texts))
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            detail = str(error) if type(error) is ValueError else type(error).__name__
            raise _Unanswered(self._one_line(f"{len(response.content):,} bytes that are no answer: {detail}")) from None
        self._check(vectors, texts)
        return _Answer(vectors, _tokens(answer))

    def _check(self, vectors: np.ndarray, texts: list[str]) -> None:
        """Raises _Unanswered for a vector that has no direction, or has another size than those before."""
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1) | ~vectors.any(axis=1))
        if len(bad):
            raise _Unanswered(f"the vector of {texts[bad[0]][:60]!r} is zero or not finite", lasting=True)
        self.dim = self.dim or vectors.shape[1]
        if vectors.shape[1] != self.dim:
            raise _Unanswered(f"vectors of {vectors.shape[1]} dimensions after some of {self.dim}", lasting=True)

    def _refusal(self, response: httpx2.Response, texts: list[str]) -> str:
        status, variable = response.status_code, self.config.api_key_env
        if status in (401, 403):
            fix = f"check the key in {variable}, the variable" if variable else "name the environment variable of its key"
            fix += " of teacher.endpoint.api_key_env"
        elif status in (404, 405):
            fix = f"check teacher.endpoint.url, and teacher.endpoint.model={self.config.model}"
        elif status in TOO_LARGE:
            longest = max(map(len, texts))
            fix = f"it had {len(texts)} texts of up to {longest:,} characters; if these are too large, lower text.max_chars"
        else:
            fix = "name another address in teacher.endpoint.url" if status < 400 else "check teacher.endpoint"
        return f"{self.url} refuses a request: HTTP {status}: {self._message(response)}: {fix}"

    def _message(self, response: httpx2.Response) -> str:
        """The server's words: of the JSON of an error, else the beginning of the body."""
        try:
            found = response.json()
            for name in ("error", "message", "detail"):
                found = found[name] if isinstance(found, dict) and name in found else found
            words = found if isinstance(found, str) else json.dumps(found)
        except ValueError:
            words = response.text
        return self._one_line(words) or "no message"

    def _one_line(self, words: str) -> str:
        """Without the key, which a server may repeat."""
        line = " ".join(words.split())
        line = line.replace(self._key, "***") if self._key else line
        return line if len(line) <= MAX_SHOWN else f"{line[:MAX_SHOWN]}..."


def api_key(config: EndpointConfig) -> str | None:
    """The key in the environment, None if the endpoint needs none. Raises ValueError naming the variable, and not its value."""
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        problem = "holds no API key (it has spaces or special characters)" if key else "is not set"
        raise ValueError(
            f"teacher.endpoint.api_key_env: the environment variable {config.api_key_env} {problem} in this process: export it"
            " where the command starts (srun and sbatch pass it on, unless --export says otherwise)"
        )
    return key


def seconds_to_wait(retry_after: str | None, now: datetime) -> float | None:
    """What the header Retry-After, in seconds or as an HTTP date, asks for; None if it is absent or neither."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            until = parsedate_to_datetime(retry_after)
        except ValueError:
            return None
        seconds = (until.replace(tzinfo=until.tzinfo or UTC) - now).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _vectors(answer: Any, num_texts: int) -> np.ndarray:
    """float32 [num_texts, d] in the order of `index`. Raises ValueError, LookupError or TypeError for anything else."""
    if "data" not in answer and "error" in answer:  # some proxies send errors with HTTP 200
        raise ValueError(json.dumps(answer["error"]))
    items = answer["data"]
    if len(items) != num_texts:
        raise ValueError(f"{len(items)} vectors for {num_texts} texts")
    ordered = sorted(items, key=lambda item: item["index"])
    if [item["index"] for item in ordered] != list(range(num_texts)):
        raise ValueError(f"its values of `index` are not 0 to {num_texts - 1}")
    vectors = [_decode(item["embedding"]) for item in ordered]
    if len({len(vector) for vector in vectors}) != 1 or not len(vectors[0]):
        raise ValueError("vectors of different sizes, or empty ones")
    return np.stack(vectors)


def _decode(embedding: str | list[float]) -> np.ndarray:
    """float32 [d] of a list, or of the base64 of little-endian float32."""
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding, validate=True), "<f4").astype(np.float32)
    vector = np.asarray(embedding, dtype=np.float32)
    if vector.ndim != 1:
        raise ValueError("an embedding that is not a list of numbers")
    return vector


def _tokens(answer: Any) -> int | None:
    """As the server reports them; None if it does not."""
    usage = answer.get("usage")
    found = (usage.get("total_tokens") or usage.get("prompt_tokens")) if isinstance(usage, dict) else None
    return found if isinstance(found, int) and found > 0 else None


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
