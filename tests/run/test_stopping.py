"""A stop request."""

from __future__ import annotations

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
