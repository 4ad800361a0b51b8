"""Ranks that are killed, stopped, silent or slow, as the others see them; one of the others reports what happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest
from reference_times import hang_limit, starts

from distill.run import heartbeats
from distill.run.heartbeats import PATIENCE, SILENCE, RankHeartbeats
from distill.run.liveness import this_process


def take_part(folder, number, size, act, results):
    results.put((number, act(RankHeartbeats(folder, number, size))))


def in_processes(folder, *acts):
    """The results of `acts`, of one rank each, which run side by side in processes of their own."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=take_part, args=(folder, n, len(acts), act, results)) for n, act in enumerate(acts)]
    for process in processes:
        process.start()
    return processes, results


def test_of_many_ranks_one_is_elected_to_report(tmp_path):
    _, results = in_processes(tmp_path, *[lambda beats: (beats.elect(beats.rank + 3), beats.elected_code)] * 8)
    found = dict(results.get(timeout=hang_limit()) for _ in range(8))
    (elected,) = [number for number, (is_elected, _) in found.items() if is_elected]
    assert {code for _, code in found.values()} == {elected + 3}


def test_of_many_ranks_that_find_one_stopped_one_reports_it_and_none_that_it_was_killed(tmp_path):
    def stop_or_diagnose(beats: RankHeartbeats) -> str:
        if beats.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        return beats.diagnose("Timed out waiting", 60)

    (stopped, *_), results = in_processes(tmp_path, *[stop_or_diagnose] * 8)
    messages = sorted(message for _, message in (results.get(timeout=SILENCE + starts(1)) for _ in range(7)))
    assert messages[:6] == [""] * 6 and "lost rank 0" in messages[6] and "stopped (SIGSTOP)" in messages[6], messages
    stopped.join(starts(1))
    assert stopped.exitcode == -signal.SIGKILL


def test_a_rank_that_works_longer_than_the_timeout_is_not_reported_as_lost(tmp_path):
    processes, results = in_processes(
        tmp_path, lambda beats: time.sleep(60), lambda beats: beats.diagnose("Timed out waiting", 60)
    )
    number, message = results.get(timeout=SILENCE + starts(1))
    assert number == 1 and f"rank 1 has waited 60 s (engine.timeout) for rank 0 (pid {processes[0].pid}" in message
    assert "still runs" in message and processes[0].is_alive()
    processes[0].kill()


def test_a_rank_on_another_machine_without_a_heartbeat_is_named(tmp_path):
    elsewhere = this_process() | {"host": "node7", "pid": 4711, "rank": 1, "has_failed": False, "beat": 1}
    (tmp_path / "1.json").write_text(json.dumps(elsewhere))
    beats = RankHeartbeats(tmp_path, 0, 2)
    message = beats.diagnose("Timed out waiting", 60)
    beats.close()
    assert "lost rank 1 (pid 4711 on node7): no heartbeat" in message


def test_a_rank_that_hangs_ends_once_another_has_reported_why(tmp_path):
    (hanging, _), results = in_processes(tmp_path, lambda beats: time.sleep(60), lambda beats: beats.elect(7))
    assert results.get(timeout=hang_limit()) == (1, True)
    hanging.join(PATIENCE + starts(1))
    assert hanging.exitcode == 7


@pytest.fixture
def reads(monkeypatch):
    """The ranks whose files have been read, in order."""
    found: list[int] = []
    read = heartbeats._read
    monkeypatch.setattr(heartbeats, "_read", lambda path: found.append(int(path.stem)) or read(path))
    return found


def test_of_thousands_of_ranks_each_reads_the_few_nearby_until_one_has_reported(tmp_path, reads):
    beats = RankHeartbeats(tmp_path, 3000, 4096)
    threading.Timer(0.5, lambda: (tmp_path / "elected").symlink_to("1")).start()
    assert beats.diagnose("Timed out waiting", 60) == ""
    beats.close()
    assert set(reads) == set(range(2984, 3017)) and len(reads) < 100


def test_of_thousands_of_ranks_one_that_was_killed_is_named_by_those_of_its_machine_at_once(tmp_path, reads):
    (tmp_path / "3007.json").write_text(json.dumps(this_process() | {"pid": 2**30, "rank": 3007, "has_failed": False}))
    beats = RankHeartbeats(tmp_path, 3000, 4096)
    assert f"lost rank 3007 (pid {2**30} on {os.uname().nodename}): killed" in beats.diagnose("Connection closed", 60)
    beats.close()
    assert len(reads) == 33


def test_thousands_of_ranks_beat_less_often_and_are_lost_later(tmp_path):
    few, many = RankHeartbeats(tmp_path / "few", 0, 8), RankHeartbeats(tmp_path / "many", 0, 4096)
    assert (
        (few.interval, few.silence) == (1.0, SILENCE) and 4096 / many.interval <= 500 and many.silence > 6 * many.interval - 1
    )
    for each in (few, many):
        each.close()


def test_of_thousands_of_ranks_rank_0_looks_at_all(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(heartbeats, "SILENCE", 0.0)
    beats = RankHeartbeats(tmp_path, 0, 1000)
    for rank in range(1, 1000):
        (tmp_path / f"{rank}.json").write_text(json.dumps({"host": "far", "pid": 1, "rank": rank, "has_failed": rank != 999}))
    assert "lost rank 999 (pid 1 on far): no heartbeat" in beats.diagnose("Timed out waiting", 60)
    beats.close()
    assert len(reads) == 2000
