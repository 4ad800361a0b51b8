"""Two ranks on this machine, this process and a fork of it: both there, one missing, another run directory."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import replace

import pytest
from conftest import write_config
from distributed_ranks import free_port
from facts import context_of
from reference_times import hang_limit

from distill.doctor import Context, examine

LIMIT = 150.0  # seconds; healthy ranks take a few, more where the machine is busy


@pytest.fixture
def rank_0(tmp_path, tiny_encoder) -> Context:
    more = {
        "started": time.monotonic(),
        "timeout": LIMIT,
        "hosts": (),
        "master_addr": "127.0.0.1",
        "master_port": free_port(),
        "local_world_size": 2,
    }
    return context_of(write_config(tmp_path, tiny_encoder), 2, "engine.precision=fp32", threads=1, **more)


def examine_both(rank_0, rank_1):
    """The diagnoses of two ranks."""
    processes = multiprocessing.get_context("fork")
    ours, theirs = processes.Pipe()
    other = processes.Process(target=lambda: theirs.send(examine(rank_1)))
    other.start()
    try:
        return examine(rank_0), ours.recv() if ours.poll(LIMIT) else "no answer"
    finally:
        other.kill()
        other.join()


def test_of_two_healthy_ranks_only_rank_0_returns_a_diagnosis(rank_0):
    diagnosis, of_rank_1 = examine_both(rank_0, replace(rank_0, rank=1, local_rank=1))
    assert diagnosis.findings == () and diagnosis.bandwidth > 0 and len(diagnosis.nodes) == 1
    assert of_rank_1 is None
    assert list(rank_0.config.run_dir.iterdir()) == []


def test_another_run_directory_is_found(rank_0, tmp_path):
    elsewhere = rank_0.config.model_copy(update={"runs_dir": tmp_path / "elsewhere"})
    diagnosis, of_rank_1 = examine_both(rank_0, replace(rank_0, rank=1, config=elsewhere))
    found = {finding.check: finding for finding in diagnosis.findings if finding.is_fault}
    assert {"storage", "software"} <= found.keys() and found["storage"].node.endswith("(rank 1)")
    assert "is not the run directory of" in found["storage"].what
    assert of_rank_1 is None


@pytest.mark.parametrize("change", [{"master_addr": "192.0.2.1"}, {}])
def test_rank_0_without_the_others_ends_in_time(rank_0, change):
    """192.0.2.1 is an address that no machine has."""
    started = time.monotonic()
    diagnosis = examine(replace(rank_0, timeout=12.0, started=started, **change))
    assert time.monotonic() - started < hang_limit() and diagnosis.code == 1
    (missing,) = (finding.what for finding in diagnosis.findings if finding.check == "rendezvous")
    assert ("rank 0 cannot serve 192.0.2.1:" if change else "rank 1 did not come to 127.0.0.1:") in missing


def test_a_rank_without_rank_0_reports_it_itself(rank_0):
    started = time.monotonic()
    diagnosis = examine(replace(rank_0, rank=1, timeout=10.0, started=started))
    assert time.monotonic() - started < hang_limit() and diagnosis.code == 1
    assert any("rank 1 did not reach rank 0 at 127.0.0.1:" in finding.what for finding in diagnosis.findings)
