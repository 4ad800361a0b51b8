"""Requests to an embeddings API: every fault that may pass is tried again, every other ends with what to do."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from datetime import UTC, datetime

import numpy as np
import pytest
from conftest import sentences
from teacher.embedding_server import FAULTS, embed, serving

from distill.run.temporary import TemporaryError
from distill.teacher import endpoint_client
from distill.teacher.endpoint_client import EndpointClient, Refused, seconds_to_wait
from distill.teacher.teacher_config import EndpointConfig
from distill.teacher.token_log import TokenLog, read_usage

TEXTS = sentences(60)
VECTORS = np.stack([embed(text) for text in TEXTS])
KEY = "sk-secret-7d3f"


def client_of(server, log=None, **config):
    given = {"model": "m", "texts_per_request": 4, "concurrency": 4, "timeout": 20.0} | config
    return EndpointClient(EndpointConfig(url=server.url, **given), log or TokenLog())


@pytest.fixture
def quick(monkeypatch):
    """Waits of a hundredth between tries."""
    monkeypatch.setattr(endpoint_client, "FIRST_WAIT", 0.005)


@pytest.mark.parametrize("knows_base64", [True, False], ids=["base64", "floats"])
def test_vectors_come_in_the_order_of_the_texts_as_base64_or_floats(knows_base64):
    with serving(knows_base64=knows_base64) as server:
        client = client_of(server)
        client.connect(TEXTS[:2], None)
        ticks = []
        vectors = client.embed(TEXTS, ticks.append)
    assert ("encoding_format" in server.requests[-1]) is knows_base64
    assert vectors.dtype == np.float32 and np.array_equal(vectors, VECTORS)
    assert ticks == [4] * 15


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "429 date"])
def test_a_request_that_met_a_fault_is_sent_again(quick, fault):
    with serving(fault_rate=0.5, faults=(fault,), late=1.5, seed=1) as server:
        vectors = client_of(server, timeout=0.75).embed(TEXTS[:12])
    assert np.array_equal(vectors, VECTORS[:12]) and server.injected[fault] >= 1


def test_retry_after_is_waited_for():
    with serving(fault_rate=1, faults=("429",), retry_after=1) as server:
        started = time.monotonic()
        with pytest.raises(TemporaryError, match=r"HTTP 429: too many requests; finished shards are kept"):
            client_of(server, retries=1).embed(TEXTS[:1])
        assert time.monotonic() - started > 1


def test_retry_after_is_read_as_seconds_and_as_a_date():
    now = datetime(2026, 7, 1, 12, 0, 0, tzinfo=UTC)
    assert seconds_to_wait("7", now) == 7 and seconds_to_wait("0.5", now) == 0.5
    assert seconds_to_wait("Wed, 01 Jul 2026 12:00:30 GMT", now) == 30
    assert seconds_to_wait("Wed, 01 Jul 2026 11:00:00 GMT", now) == 0
    assert [seconds_to_wait(value, now) for value in (None, "soon", "nan", "inf")] == [None] * 4


def test_after_the_retries_the_end_says_that_the_work_is_kept(quick):
    with serving(fault_rate=1, faults=("500",)) as server, pytest.raises(TemporaryError) as error:
        client_of(server, retries=3).embed(TEXTS)
    assert "no valid answer in 4 tries, the last: HTTP 500: out of luck" in str(error.value)
    assert "finished shards are kept: the same command continues" in str(error.value)


def test_a_server_that_is_not_there_is_tried_again_and_then_named(quick):
    with serving() as server:
        pass
    with pytest.raises(TemporaryError, match=rf"{server.url}/embeddings: no valid answer in 3 tries, the last: ConnectError"):
        client_of(server, retries=2).embed(TEXTS[:1])


def test_vectors_that_stay_wrong_are_an_error_to_fix_and_not_a_temporary_one(quick):
    with serving(fault_rate=1, faults=("nan",)) as server, pytest.raises(ValueError, match="is zero or not finite") as error:
        client_of(server, retries=2).embed(TEXTS[:1])
    assert not isinstance(error.value, TemporaryError) and len(server.requests) == 3
    with serving() as server:
        client = client_of(server, retries=1)
        client.embed(TEXTS[:1])
        client.dim += 1
        with pytest.raises(ValueError, match=r"vectors of 24 dimensions after some of 25"):
            client.embed(TEXTS[:1])
        server.answer = lambda body: {"data": [{"index": 0, "embedding": [0.0] * 25}]}
        with pytest.raises(ValueError, match=rf"the vector of '{TEXTS[0][:10]}.* is zero"):
            client.embed(TEXTS[:1])


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"HTTP 401: not today: check the key in ENDPOINT_KEY, the variable of teacher\.endpoint\.api_key_env"),
        (403, r"HTTP 403: not today: check the key in ENDPOINT_KEY"),
        (404, r"HTTP 404: not today: check teacher\.endpoint\.url, and teacher\.endpoint\.model=m"),
        (413, r"HTTP 413: not today: it had 1 texts of up to \d+ characters; .* lower text\.max_chars"),
        (400, r"HTTP 400: not today: it had 1 texts of up to"),
        (302, r"HTTP 302: not today: name another address in teacher\.endpoint\.url"),
        (451, r"HTTP 451: not today: check teacher\.endpoint"),
    ],
)
def test_a_refusal_ends_at_once_with_the_servers_words_and_what_to_do(monkeypatch, status, message):
    monkeypatch.setenv("ENDPOINT_KEY", KEY)
    with serving(refusal=(status, "not today")) as server, pytest.raises(Refused, match=message):
        client_of(server, api_key_env="ENDPOINT_KEY", concurrency=1).embed(TEXTS)
    assert len(server.requests) <= 3  # 4, 2 and 1 texts


def test_a_batch_that_is_too_large_is_halved_and_later_ones_are_smaller(caplog):
    with serving(max_texts=5) as server, caplog.at_level(logging.WARNING):
        client = client_of(server, texts_per_request=16, concurrency=1)
        assert np.array_equal(client.embed(TEXTS), VECTORS)
        sent = len(server.requests)
        assert np.array_equal(client.embed(TEXTS), VECTORS)
        assert max(len(body["input"]) for body in server.requests[sent:]) <= 5
    assert (
        "teacher.endpoint.texts_per_request is 4 from here on" in caplog.text and "maximum allowed batch size 5" in caplog.text
    )


def test_requests_are_bounded_in_characters_and_a_longer_text_goes_alone():
    texts = ["a" * 30, "b" * 30, "c" * 500, "d" * 40, "e" * 61]
    with serving() as server:
        client_of(server, chars_per_request=100).embed(texts)
    assert sorted(server.requests, key=lambda body: body["input"]) == [
        {"model": "m", "input": batch} for batch in (texts[:2], texts[2:3], texts[3:4], texts[4:])
    ]


@pytest.mark.parametrize(
    ("supports", "width", "asks"), [(True, 8, True), (False, 24, True), (None, 24, False)], ids=["known", "ignored", "refused"]
)
def test_dimensions_are_asked_for_where_the_server_knows_them(supports, width, asks):
    with serving(dimensions=supports) as server:
        client = client_of(server)
        assert client.connect(TEXTS[:3], 8).shape == (3, width)
        client.embed(TEXTS[:1])
    assert ("dimensions" in server.requests[-1]) is asks


def test_the_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("ENDPOINT_KEY", f"{KEY}\n")  # as `export X=$(cat file)` may leave it
    with serving(key=KEY) as server:
        assert len(client_of(server, api_key_env="ENDPOINT_KEY").embed(TEXTS)) == 60
        server.key = "another"
        with pytest.raises(Refused) as error:
            client_of(server, api_key_env="ENDPOINT_KEY").embed(TEXTS)
    assert "Incorrect API key provided: Bearer ***" in str(error.value) and KEY not in repr(error.value)


@pytest.mark.parametrize(
    ("value", "message"), [(None, "ENDPOINT_KEY is not set"), (" ", "is not set"), (f"{KEY} {KEY}", "holds no API key")]
)
def test_a_missing_key_is_named_by_its_variable_before_any_request(monkeypatch, value, message):
    monkeypatch.delenv("ENDPOINT_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("ENDPOINT_KEY", value)
    with serving() as server, pytest.raises(ValueError, match=message) as error:
        client_of(server, api_key_env="ENDPOINT_KEY")
    assert not server.requests and KEY not in str(error.value)


@pytest.mark.parametrize(
    ("url", "warns"), [("http://10.0.0.7/v1", True), ("https://10.0.0.7/v1", False), ("http://localhost:80/v1", False)]
)
def test_a_key_that_would_be_sent_in_the_clear_is_warned_of(monkeypatch, caplog, url, warns):
    monkeypatch.setenv("ENDPOINT_KEY", KEY)
    EndpointClient(EndpointConfig(url=url, model="m", api_key_env="ENDPOINT_KEY"), TokenLog())
    assert ("unencrypted; use https" in caplog.text) is warns


def test_tokens_are_counted_over_all_processes_of_a_run_and_end_at_the_limit(tmp_path):
    with serving() as server:
        client_of(server, TokenLog(tmp_path)).embed(TEXTS[:20])
        server.reports_usage = False
        other = TokenLog(tmp_path)
        client_of(server, other).embed(TEXTS[20:30])
        characters = sum(map(len, TEXTS[:30]))
        counted = sum(len(text.split()) for text in TEXTS[:20])
        total = read_usage(tmp_path)
        assert (total.requests, total.characters, total.is_estimate) == (8, characters, True)
        assert total.tokens == pytest.approx(counted + sum(map(len, TEXTS[20:30])) / 4, abs=3) and other.total == total
        limited = client_of(server, TokenLog(tmp_path, limit=total.tokens + 20), concurrency=1)
        with pytest.raises(
            ValueError, match=r"max_tokens [\d,]+ is reached: this run has used \d+ requests, .*raise the limit"
        ):
            limited.embed(TEXTS)
        sent = len(server.requests)
        with pytest.raises(ValueError, match="max_tokens"):
            client_of(server, TokenLog(tmp_path, limit=total.tokens + 20)).embed(TEXTS)
    assert len(server.requests) == sent and sent < 15  # an earlier process has reached it


def test_a_stop_signal_ends_requests_in_flight_at_once():
    def unwind(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, unwind)
    try:
        with serving(late=60, fault_rate=1, faults=("late",)) as server:
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            started = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                client_of(server, timeout=100.0).embed(TEXTS)
            assert time.monotonic() - started < 30 and server.injected["late"] == 4
    finally:
        signal.signal(signal.SIGUSR1, before)
