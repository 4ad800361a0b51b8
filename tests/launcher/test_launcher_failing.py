"""A rank that is killed, stopped, disconnected or fails: the others end soon, one message reports why, no process remains."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
from commands import command
from distributed_ranks import free_port
from reference_times import starts
from training_processes import TrainingProcesses, start_training

from distill.run.heartbeats import SILENCE

pytestmark = [pytest.mark.slow, pytest.mark.serial]
TIMEOUT = 8
ENDLESS = ["ckd.max_steps=100000", "ckd.epochs=100000", "ckd.dev_every=100000", "ckd.save_every=5", f"engine.timeout={TIMEOUT}"]


@pytest.fixture
def run(embedded_copy):
    """The config of a run whose precompute is done, and where its checkpoints appear."""
    config, directory = embedded_copy
    return config, directory / "ckd/checkpoints"


def the_message(printed: str) -> str:
    """The one line that reports what happened; a launcher may add others."""
    ours = [line for line in printed.splitlines() if re.match(r"(rank \d+: )?error: ", line)]
    assert len(ours) == 1, printed
    assert 'launcher/train.py", line' not in printed and "gloo" not in printed.replace(ours[0], ""), printed
    return ours[0]


CELLS = [("pipeline", 2, signal.SIGSTOP, 0), ("deepspeed", 2, signal.SIGKILL, 1)]
ALL_CELLS = [
    (launcher, size, signum, victim)
    for launcher in ("deepspeed", "pipeline", "none", "torchrun")
    for size in (2, 3)
    for signum in (signal.SIGKILL, signal.SIGSTOP)
    for victim in range(size)
]


@pytest.mark.parametrize(
    "launcher, size, signum, victim",
    [*CELLS, *(pytest.param(*cell, marks=pytest.mark.soak) for cell in ALL_CELLS if cell not in CELLS)],
)
def test_a_rank_that_is_lost_ends_the_others_and_is_named(run, launcher, size, signum, victim):
    config, checkpoints = run
    with start_training(launcher, size, config, *ENDLESS) as started:
        started.wait_for(checkpoints, "step-????????/COMPLETE.json")
        pid = started.ranks()[victim]
        os.kill(pid, signum)
        codes = started.wait((TIMEOUT if signum == signal.SIGSTOP else 0) + SILENCE + starts(2))
        assert all(code not in (0, 75, 130) for code in codes)
        message = the_message(started.printed)
    assert f"lost rank {victim} (pid {pid} on {os.uname().nodename})" in message, message
    assert ("stopped (SIGSTOP)" if signum == signal.SIGSTOP else "killed") in message
    step = re.search(r"the same command continues from step (\d+)$", message)
    assert step and (checkpoints / f"step-{int(step[1]):08d}/COMPLETE.json").exists(), message


@pytest.mark.parametrize(
    "launcher, size, victim, save_every", [pytest.param("none", 3, 1, 1, marks=pytest.mark.soak), ("deepspeed", 2, 0, 5)]
)
def test_an_error_on_one_rank_is_the_one_message(run, launcher, size, victim, save_every):
    """A rank that may open no more files fails as its next checkpoint is written."""
    config, checkpoints = run
    with start_training(launcher, size, config, *ENDLESS, f"ckd.save_every={save_every}") as started:
        started.wait_for(checkpoints, "step-????????/COMPLETE.json")
        resource.prlimit(started.ranks()[victim], resource.RLIMIT_NOFILE, (3, 3))
        codes = started.wait(SILENCE + starts(2))
        assert set(codes) == {1}
        message = the_message(started.printed)
    assert message.startswith(f"rank {victim}: error: " if victim else "error: ") and "Too many open files" in message, message


def test_what_all_ranks_find_wrong_is_reported_once(run):
    """By rank 0, or by another if rank 0 is later than RANK_0_FIRST."""
    config, _ = run
    with start_training("none", 3, config, "engine.deepspeed=none.json", *ENDLESS) as started:
        assert started.wait() == [2, 2, 2]
        assert "error: engine.deepspeed: no DeepSpeed configuration at none.json" in the_message(started.printed)


def test_ranks_end_with_the_pipeline_that_started_them(run):
    config, checkpoints = run
    with start_training("pipeline", 2, config, *ENDLESS) as started:
        started.wait_for(checkpoints, "step-????????/COMPLETE.json")
        os.kill(started.main, signal.SIGKILL)
        assert started.wait(starts(1)) == [-signal.SIGKILL]


@pytest.fixture
def two_networks() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces, joined by one cable: their names and the names of the cable's ends."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` here (iproute2): a cut link cannot be tried")
    mark = f"{os.getpid() % 100_000}"
    ends = [(f"distill{number}-{mark}", f"dst{number}-{mark}") for number in range(2)]

    def ip(*arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot make a network of its own: ip {' '.join(arguments)}: {done.stderr.strip()}")

    try:
        for name, _ in ends:
            ip("netns", "add", name)
        ip("link", "add", ends[0][1], "netns", ends[0][0], "type", "veth", "peer", "name", ends[1][1], "netns", ends[1][0])
        for number, (name, end) in enumerate(ends):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield ends
    finally:
        for name, _ in ends:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_a_cut_link_ends_both_sides_and_is_not_reported_as_a_dead_rank(run, two_networks):
    config, checkpoints = run
    train = command("train.py", "--config", config, *ENDLESS)
    rendezvous = {"WORLD_SIZE": "2", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": str(free_port())}
    commands = [["ip", "netns", "exec", name, *train] for name, _ in two_networks]
    own = [
        rendezvous | {"RANK": str(rank), "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": end}
        for rank, (_, end) in enumerate(two_networks)
    ]
    with TrainingProcesses(commands, own, config) as started:
        started.wait_for(checkpoints, "step-????????/COMPLETE.json")
        name, end = two_networks[1]
        subprocess.run(["ip", "-n", name, "link", "set", end, "down"], check=True)
        cut = time.monotonic()
        assert started.wait(TIMEOUT + SILENCE + starts(2)) == [1, 1]
        assert time.monotonic() - cut > TIMEOUT - 1, "a slow network is not a cut one"
        assert "the network between them is cut" in the_message(started.printed)
