"""The session log: one line for each session of all ranks together."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from distributed_ranks import on_ranks

from distill.run import session_log
from distill.run.session_log import read_sessions, session
from distill.run.stopping import Stopped

CPU = torch.device("cpu")


def test_a_session_records_host_device_time_and_versions(tmp_path):
    began = time.monotonic()
    for _ in range(2):
        with session(tmp_path, "embed", CPU):
            pass
    elapsed = time.monotonic() - began
    first, second = read_sessions(tmp_path)
    assert first["work"] == "embed" and first["ranks"] == 1 and first["device"] and first["host"]
    assert first["versions"]["torch"] == torch.__version__ and first["versions"]["python"]
    assert second["started"] >= first["started"] and 0 <= first["seconds"] <= elapsed + 0.05  # rounded


def test_a_session_that_fails_is_counted_too(tmp_path):
    with pytest.raises(KeyboardInterrupt), session(tmp_path, "embed", CPU):
        raise KeyboardInterrupt
    assert len(read_sessions(tmp_path)) == 1


def test_a_line_that_cannot_be_written_is_no_error(tmp_path):
    with session(tmp_path / "gone", "embed", CPU):
        pass
    assert read_sessions(tmp_path / "gone") == []


def test_an_incomplete_line_is_skipped(tmp_path):
    with session(tmp_path, "train", CPU):
        pass
    with (tmp_path / "sessions.jsonl").open("a") as file:
        file.write('{"work": "tr')
    assert [found["work"] for found in read_sessions(tmp_path)] == ["train"]


def test_a_line_with_a_flipped_bit_is_left_out_and_named(tmp_path, caplog):
    for work in ("text", "train"):
        with session(tmp_path, work, CPU):
            pass
    path = tmp_path / "sessions.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"ranks":1', b'"ranks":3', 1))
    assert [found["work"] for found in read_sessions(tmp_path)] == ["train"]
    assert f"{path}, line 1, is damaged and left out" in caplog.text


def test_lines_of_an_earlier_version_are_read(tmp_path):
    (tmp_path / "sessions.jsonl").write_text('{"work": "train"}\n')
    assert read_sessions(tmp_path) == [{"work": "train"}]


def _rank(folder):
    with pytest.raises(Stopped), session(folder, "stopped", CPU):
        raise Stopped
    with session(folder, "done", CPU):
        pass
    if torch.distributed.get_rank() == 1:
        with pytest.raises(ValueError), session(folder, "failed on one rank", CPU):  # and no other waits for it
            raise ValueError
        with session(folder, "alone", CPU, alone=True):
            pass


def test_ranks_leave_one_line_together_and_none_where_one_of_them_fails(tmp_path):
    on_ranks(2, _rank, tmp_path)
    assert [(found["work"], found["ranks"]) for found in read_sessions(tmp_path)] == [("stopped", 2), ("done", 2), ("alone", 1)]


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
def test_the_commit_is_that_of_our_own_clone_and_says_whether_it_was_changed(tmp_path):
    def git(*what):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *what], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert session_log._commit(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("first")
    git("add", "file")
    git("commit", "-m", "first")
    head = git("rev-parse", "--short=12", "HEAD")
    assert session_log._commit(tmp_path) == head
    (tmp_path / "file").write_text("second")
    assert session_log._commit(tmp_path) == head + "+"
    inner = tmp_path / "venv"
    inner.mkdir()
    assert session_log._commit(inner) is None  # a clone that merely holds us is not ours
    assert not Path(tmp_path / "venv/.git").exists()
