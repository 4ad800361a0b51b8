"""Exit codes, locks and the environment that the command lines share."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from commands import ROOT, call
from conftest import write_config

from distill.run.temporary import TemporaryError, hub_error
from launcher import command


class TransportError(Exception):
    """As httpx names the errors of a connection."""


@pytest.mark.parametrize(
    "error, code",
    [
        (ValueError("a wrong key"), 2),
        (FloatingPointError("the loss is not finite"), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), 2),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2),
        (OSError(errno.ESTALE, "Stale file handle"), 1),
        (OSError(errno.EIO, "Input/output error"), 1),
        (OSError(errno.EMFILE, "Too many open files"), 1),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 1),
        (TimeoutError("the ranks did not all join"), 1),
        (TemporaryError("port 29500 is in use"), 1),
        (RuntimeError("unexpected"), 1),
        (command.Terminated(), 75),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_exit_code_2_is_for_errors_that_the_user_has_to_fix_alone(error, code):
    assert command.exit_code(error) == code


def test_a_temporary_error_is_one_line_and_exit_code_1(capsys):
    def work() -> int:
        raise TemporaryError("cannot read the dataset: the hub does not answer")

    assert command.run(work) == 1
    assert capsys.readouterr().err == "error: cannot read the dataset: the hub does not answer\n"


def test_a_hub_that_does_not_answer_is_temporary_and_one_that_says_no_is_not():
    silent = FileNotFoundError("cannot find the requested files in the local cache")
    silent.__cause__ = TransportError("timed out")
    busy, absent = OSError("503 Server Error"), OSError("404 Client Error")
    busy.response, absent.response = (type("Response", (), {"status_code": code}) for code in (503, 404))  # type: ignore[attr-defined]
    offline = type("OfflineModeIsEnabled", (ConnectionError,), {})("HF_HUB_OFFLINE is set")
    for error in (silent, busy, TimeoutError()):
        assert isinstance(hub_error("no answer", error), TemporaryError)
    for error in (absent, offline, ValueError("no such split")):
        assert isinstance(hub_error("no", error), ValueError)


def test_a_stage_that_another_process_runs_is_refused_in_one_line(tmp_path, tiny_encoder):
    config, lock = write_config(tmp_path, tiny_encoder), tmp_path / "runs/tiny/.export.lock"
    with command.only_one(lock):
        done = call("export.py", "--config", config)
    assert done.returncode == 1 and f"{lock}: another process runs this stage" in done.stdout, done.stdout
    assert "Traceback" not in done.stdout


def test_a_console_without_a_character_shows_an_escape_instead():
    code = "from launcher import command; command.start(lambda: print('sum ∑') or 0)"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "sum \\u2211\n")
