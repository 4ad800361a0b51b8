"""An OpenAI-compatible embeddings API on localhost, which embeds by itself or asks another server, and injects faults."""

from __future__ import annotations

import base64
import json
import random
import struct
import threading
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

DIM = 24
FAULTS = ("429", "429 date", "500", "late", "dropped", "cut", "no json", "reordered", "missing", "twice", "nan")
Answer = Callable[[dict[str, Any]], dict[str, Any]]


def embed(text: str, model: str = "tiny", read_chars: int | None = None) -> np.ndarray:
    """float32 [DIM]: a sum of random vectors of the text's first words, another for each model."""
    words = enumerate(text[:read_chars].split())
    return np.sum([_draw(f"{model} {number % 7} {word}") for number, word in words], axis=0).astype(np.float32)


@cache
def _draw(name: str) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(DIM)


@dataclass
class Server:
    """fault_rate: the fraction of requests, drawn with `seed`, that get one of `faults`. requests: the bodies received.

    model: what it embeds with, whatever the request names. dimensions: whether that field shortens vectors (True), is ignored
    (False) or refused (None). answer: makes the JSON, instead of `embed`.
    """

    fault_rate: float = 0.0
    faults: tuple[str, ...] = FAULTS
    seed: int = 0
    key: str | None = None
    model: str = "tiny"
    knows_base64: bool = True
    dimensions: bool | None = False
    read_chars: int | None = None
    max_texts: int | None = None
    reports_usage: bool = True
    delay: float = 0.0
    late: float = 5.0
    retry_after: float = 0.2
    refusal: tuple[int, str] | None = None
    answer: Answer | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)
    url: str = ""

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)
        self.lock = threading.Lock()
        self.answer = self.answer or self._answer

    @property
    def texts(self) -> list[str]:
        """All that were sent, also those that were sent again."""
        return [text for body in self.requests for text in body["input"]]

    def next_fault(self) -> str | None:
        with self.lock:
            fault = self._draw.choice(self.faults) if self._draw.random() < self.fault_rate else None
            self.injected[fault or "none"] += 1
            return fault

    def refuse(self, body: dict[str, Any], authorization: str | None) -> tuple[int, str] | None:
        """A status and a message."""
        if self.key is not None and authorization != f"Bearer {self.key}":
            return 401, f"Incorrect API key provided: {authorization}"
        if self.refusal is not None:
            return self.refusal
        if not self.knows_base64 and "encoding_format" in body:
            return 422, "encoding_format: extra fields not permitted"
        if self.dimensions is None and "dimensions" in body:
            return 400, "this model does not support dimensions"
        if self.max_texts is not None and len(body["input"]) > self.max_texts:
            return 413, f"batch size {len(body['input'])} > maximum allowed batch size {self.max_texts}"
        return None

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        vectors = [embed(text, self.model, self.read_chars) for text in body["input"]]
        if self.dimensions and "dimensions" in body:
            vectors = [vector[: body["dimensions"]] for vector in vectors]
        tokens = sum(len(text[: self.read_chars].split()) for text in body["input"])
        usage = {"usage": {"prompt_tokens": tokens, "total_tokens": tokens}} if self.reports_usage else {}
        data = [{"object": "embedding", "index": n, "embedding": encode(v, body)} for n, v in enumerate(vectors)]
        return {"object": "list", "model": body["model"], "data": data, **usage}


def encode(vector: np.ndarray, body: dict[str, Any]) -> str | list[float]:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if "encoding_format" in body else vector.tolist()


def forward_to(url: str) -> Answer:
    """Answers of another server."""

    def ask(body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(f"{url}/embeddings", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    return ask


@contextmanager
def serving(**settings: Any) -> Iterator[Server]:
    """A server on a free port, until the block ends."""
    server = Server(**settings)
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_settings": server}))
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_settings: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_POST(self) -> None:
        settings = self.server_settings
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with settings.lock:
            settings.requests.append(body)
        if self.path != "/v1/embeddings":
            return self.send(404, {"error": {"message": "unknown route"}})
        if refusal := settings.refuse(body, self.headers["Authorization"]):
            return self.send(refusal[0], {"error": {"message": refusal[1], "type": "invalid_request_error"}})
        fault = settings.next_fault()
        if fault in ("429", "429 date"):
            until = format_datetime(datetime.now(UTC) + timedelta(seconds=1), usegmt=True)
            wait = until if fault == "429 date" else str(settings.retry_after)
            return self.send(429, {"error": "too many requests"}, {"Retry-After": wait})
        if fault == "500":
            return self.send(500, {"message": "out of luck"})
        if fault == "dropped":
            self.connection.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SO_LINGER: reset
            self.close_connection = True
            self.connection.close()
            return None
        time.sleep(settings.late if fault == "late" else settings.delay)
        assert settings.answer is not None
        return self.send(200, settings.answer(body), fault=fault)

    def send(
        self, status: int, answer: dict[str, Any], headers: dict[str, str] | None = None, fault: str | None = None
    ) -> None:
        data = answer.get("data", [])
        if fault == "reordered":
            data.reverse()
        elif fault == "missing":
            data.pop()
        elif fault == "twice":
            data[0]["index"] = data[-1]["index"] + (len(data) == 1)
        elif fault == "nan":
            data[0]["embedding"] = [float("nan")] * DIM
        raw = json.dumps(answer).encode()
        raw = raw[: len(raw) // 2] if fault == "no json" else raw
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(name, value)
        try:
            self.end_headers()
            self.wfile.write(raw[: len(raw) // 2] if fault == "cut" else raw)
        except OSError:  # the client has given up
            self.close_connection = True
        if fault == "cut":
            self.close_connection = True
