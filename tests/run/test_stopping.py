"""A stop request."""

from __future__ import annotations

import os
import time

from distill.run.stopping import StopRequest


def test_a_request_is_a_call_or_a_file_that_is_removed_once_cleared(tmp_path):
    assert not StopRequest().is_requested
    of_rank_0 = StopRequest(tmp_path / "STOP")
    assert not of_rank_0.is_requested
    (tmp_path / "STOP").touch()
    assert of_rank_0.is_requested
    of_rank_0.clear()
    assert not of_rank_0.is_requested and not (tmp_path / "STOP").exists()
    of_rank_0.request()
    assert of_rank_0.is_requested
    of_rank_0.clear()  # nothing to remove


def test_a_file_of_an_earlier_start_is_removed_and_one_that_a_user_creates_stays(tmp_path):
    stop = StopRequest(tmp_path / "STOP")
    now = time.time()
    assert not stop.remove_left_over(now)
    stop.pass_on()  # by a pipeline that is killed before it removes it
    assert stop.is_requested and stop.remove_left_over(now - 60) and not stop.is_requested
    (tmp_path / "STOP").touch()
    assert not stop.remove_left_over(now - 60) and stop.is_requested
    os.utime(tmp_path / "STOP", (now - 120, now - 120))
    assert stop.remove_left_over(now - 60) and not stop.is_requested


def test_waiting_for_a_stop_ends_with_it(tmp_path):
    stop = StopRequest(tmp_path / "STOP")
    assert not stop.wait(0)
    stop.request()
    assert stop.wait(60)
