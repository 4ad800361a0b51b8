"""What a rank prints: rank 0 on the terminal, every rank in its log file, and the rank that reports a failure in both."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from commands import ROOT
from training_processes import start_training

PRINTS = """
import os, sys
from pathlib import Path
from launcher.rank_log import RankLog, show_on_terminal
log = RankLog(Path(sys.argv[2]), "ckd", int(sys.argv[1]))
print("beginning")
print("10%\\r50%\\r100%", end="", file=sys.stderr)
print("\\rbar done", file=sys.stderr)
log.step = 7
os.write(2, b"from a library in C\\n")
show_on_terminal()
print("error: no", file=sys.stderr, flush=True)
os.abort() if len(sys.argv) > 3 else None
"""

INTERRUPTED = """
import sys, threading
from pathlib import Path
from launcher.rank_log import RankLog
log = RankLog(Path(sys.argv[1]), "ckd", 0)
half = threading.Thread(target=lambda: sys.stderr.write("Exception in thread "))
half.start(), half.join()
print("error: no", file=sys.stderr)
"""


def printed_by(rank: int, folder, *more: str) -> tuple[str, list[str]]:
    """What the terminal shows, and the lines of the rank's file."""
    arguments = [sys.executable, "-c", PRINTS, str(rank), str(folder), *more]
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return done.stdout + done.stderr, (folder / f"ckd-rank-{rank:05d}.log").read_text().splitlines()


def test_rank_0_prints_on_the_terminal_and_in_its_file(tmp_path):
    terminal, lines = printed_by(0, tmp_path)
    assert "beginning" in terminal and "50%" in terminal and "from a library in C" in terminal and "error: no" in terminal
    logged = [re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (\S+) rank 0 step (\d+): (.*)", line) for line in lines]
    assert [match and match.groups()[1:] for match in logged[1:]] == [("0", "beginning"), ("0", "bar done"), ("7", "error: no")]
    assert {match[1] for match in logged if match} == {os.uname().nodename}


def test_another_rank_prints_on_the_terminal_only_once_it_is_elected_to_report(tmp_path):
    terminal, lines = printed_by(3, tmp_path)
    assert terminal == "error: no\n"
    assert any("rank 3 step 0: beginning" in line for line in lines) and "from a library in C" in lines
    assert "rank 3 step 7: error: no" in lines[-1]


def test_a_rank_that_crashes_leaves_where_it_was_and_a_second_start_is_added(tmp_path):
    printed_by(1, tmp_path)
    _, lines = printed_by(1, tmp_path, "crash")
    assert sum("beginning" in line for line in lines) == 2
    assert any(line.startswith("Fatal Python error: Aborted") for line in lines)
    assert any(re.search(r'File "<string>", line \d+', line) for line in lines)


def test_an_error_is_a_line_of_its_own_while_another_thread_prints(tmp_path):
    arguments = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stderr == "Exception in thread \nerror: no\n"
    assert (tmp_path / "ckd-rank-00000.log").read_text().splitlines()[-1].endswith("step 0: error: no")


@pytest.mark.slow
def test_every_rank_of_a_run_has_its_file(embedded_copy):
    config, directory = embedded_copy
    with start_training("none", 3, config) as started:
        assert started.wait(120) == [0, 0, 0]
    for rank in range(3):
        lines = (directory / f"logs/ckd-rank-{rank:05d}.log").read_text().splitlines()
        assert re.search(rf"{os.uname().nodename} rank {rank} step 0: pid \d+", lines[0]), lines
        assert "step 12: done" in lines[-1], lines
