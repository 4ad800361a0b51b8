"""Claims: one task per shard, also after kills on any machine; nobody waits for a killed task."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import pytest

from distill.teacher import claims as module
from distill.teacher.claims import Claims, claimed

HANG = 300  # seconds


@pytest.fixture
def claim(tmp_path):
    return tmp_path / ".000000.claim"


def elsewhere(beat: int) -> str:
    """The claim of a task on another machine."""
    return json.dumps({"host": "far", "boot": "b", "pids": 1, "pid": 1, "started": "1", "beat": beat})


def test_only_one_of_two_tasks_takes_a_shard(claim):
    with Claims() as one, Claims() as other:
        assert one.take(claim) and not other.take(claim)
        one.release(claim)
        assert other.take(claim)
    assert not claim.exists()


def _take_and_hang(path, taken):
    with Claims() as claims:
        taken.put(claims.take(path))
        time.sleep(600)


def test_the_claim_of_a_killed_task_of_this_machine_is_void_at_once(claim):
    context = multiprocessing.get_context("fork")
    taken = context.Queue()
    task = context.Process(target=_take_and_hang, args=(claim, taken))
    task.start()
    assert taken.get(timeout=HANG)
    with Claims() as claims:
        assert claims.state(claim) == "live" and not claims.take(claim)
        os.kill(task.pid, signal.SIGKILL)
        task.join()
        assert claim.exists() and claims.state(claim) == "void" and claims.take(claim)


@pytest.fixture
def clock(monkeypatch):
    """The observer's clock, which only the test moves: `clock.now`, in seconds."""
    made = SimpleNamespace(now=0.0)
    monkeypatch.setattr("time.monotonic", lambda: made.now)
    return made


def test_another_machines_claim_is_live_while_it_changes_and_void_after_the_timeout(claim, clock):
    claim.write_text(elsewhere(1))
    with Claims() as claims:
        assert claims.state(claim) == "unknown" and not claims.take(claim)
        claim.write_text(elsewhere(2))
        assert claims.state(claim) == "live"
        clock.now += module.TIMEOUT + 1
        assert claims.state(claim) == "void" and claims.take(claim)


def test_a_claim_is_rewritten_by_its_owners_heartbeat(claim, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.05)
    with Claims() as claims:
        assert claims.take(claim)
        before = claim.read_bytes()
        deadline = time.monotonic() + HANG
        while claim.read_bytes() in (before, b""):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_an_incomplete_claim_is_void_only_after_the_timeout(claim, clock):
    claim.write_text('{"host": "fa')
    with Claims() as claims:
        assert not claims.take(claim)
        clock.now += module.TIMEOUT + 1
        assert claims.take(claim)


def test_a_missing_shard_is_claimed_once_and_one_made_in_the_meantime_is_skipped(tmp_path):
    left = [(tmp_path, index) for index in range(4)]
    with Claims() as claims:
        yielded = claimed(claims, lambda: list(left))
        _, first, claim = next(yielded)
        assert first == 0 and claim.exists()
        left.remove((tmp_path, 0))
        left.remove((tmp_path, 1))
        assert [index for _, index, _ in yielded] == [2, 3]


def test_a_task_ends_when_live_tasks_have_claimed_the_rest_and_takes_over_from_killed_ones(tmp_path, monkeypatch):
    left = [(tmp_path, 0), (tmp_path, 1)]
    with Claims() as other, Claims() as claims:
        assert other.take(tmp_path / ".000000.claim")
        (tmp_path / ".000001.claim").write_text(elsewhere(1))
        monkeypatch.setattr(module, "TIMEOUT", 0.3)
        assert [index for _, index, _ in claimed(claims, lambda: list(left), poll=0.05)] == [1]


def _be_killed_before_writing(path):
    Claims._content = lambda self: os._exit(0)
    Claims().take(path)


def test_a_task_that_is_killed_while_it_claims_leaves_nothing_to_wait_for(claim):
    task = multiprocessing.get_context("fork").Process(target=_be_killed_before_writing, args=(claim,))
    task.start()
    task.join()
    with Claims() as claims:
        assert claims.take(claim)
    assert not list(claim.parent.glob("*.part"))


def test_a_heartbeat_is_written_in_place_and_creates_no_claim_that_was_removed(claim):
    with Claims() as claims:
        assert claims.take(claim)
        before, size = claim.read_bytes(), claim.stat().st_size
        with claim.open("rb") as seen_by_another:
            claims._beat()
            assert claim.read_bytes() != before and len(seen_by_another.read()) == claim.stat().st_size == size
        claim.unlink()
        claims._beat()
        assert not claim.exists()


def test_waiting_for_a_task_elsewhere_is_reported_once_and_calls_back(tmp_path, monkeypatch, caplog):
    (tmp_path / ".000000.claim").write_text(elsewhere(1))
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    caplog.set_level("INFO")
    calls: list[int] = []
    with Claims() as claims:
        waiting = claimed(claims, lambda: [(tmp_path, 0)], poll=0.05, while_waiting=lambda: calls.append(1))
        assert [index for _, index, _ in waiting] == [0]
    assert len(calls) > 1 and caplog.text.count("waiting for 1 claims of other machines") == 1
