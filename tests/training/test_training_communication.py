"""Keys and ids that a rank receives in a step, as the network interface counts their bytes."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys

import pytest
from commands import ROOT, environment
from conftest import make_encoder, sentences
from reference_times import hang_limit

BENCH = ROOT / "tests/bench/communication.py"
GLOBAL_BATCH, WIDTH = 256, 256


def missing_for_namespaces() -> str | None:
    """What network namespaces need and this machine does not have; None if nothing is missing."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"distill-probe-{os.getpid()}"
    probe = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return f"no network namespaces here: {probe.stderr.strip()}" if probe.returncode else None


@pytest.mark.soak
def test_a_rank_receives_the_bytes_of_the_formula_plus_at_most_five_percent(tmp_path):
    reason = missing_for_namespaces()
    if reason:
        pytest.skip(reason)
    encoder = make_encoder(tmp_path / "encoder", layers=1, width=WIDTH)
    text = tmp_path / "text.txt.gz"
    with gzip.open(text, "wt") as file:
        file.write("\n".join(sentences(1200)) + "\n")
    sizes = ["--sentences", 1200, "--layers", 0, "--global-batch", GLOBAL_BATCH, "--micro-batch", 128, "--queue", 512]
    amounts = ["--steps", 6, "--gathers", 20, "--out", tmp_path / "results.json"]
    places = ["--model", encoder, "--text", text, "--work", tmp_path / "work"]
    command = [sys.executable, BENCH, *places, *sizes, *amounts]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=hang_limit()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    for gather, step in zip(results["gather"], results["step"], strict=True):
        assert gather["bytes_by_formula"] == GLOBAL_BATCH / 2 * (2 * WIDTH + 8)
        assert 0 <= gather["bytes_received"] / gather["bytes_by_formula"] - 1 <= 0.05
        assert step["bytes_received"] > gather["bytes_received"]
