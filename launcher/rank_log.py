"""The log file of a rank: what it prints, each line with the time, the host, the rank and its step."""

from __future__ import annotations

import faulthandler
import io
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

HOST = socket.gethostname()


class RankLog:
    """The log file of one rank, appended to. What the rank prints also goes to the terminal if `on_terminal`, as of rank 0.

    Until it is closed, sys.stdout and sys.stderr are this log's; on ranks above 0, what libraries print past Python goes into
    the file too. `step`, set by the caller: the training step that the rank is at.
    """

    def __init__(self, folder: Path, stage: str, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.on_terminal = rank == 0
        self.step = 0
        self._rank = rank
        self._file = (folder / f"{stage}-rank-{rank:05d}.log").open("a", buffering=1, encoding="utf-8")
        self._lock = threading.Lock()
        faulthandler.enable(self._file)
        self._streams = out, err = sys.stdout, sys.stderr
        if rank:
            out, err = (os.fdopen(os.dup(stream.fileno()), "w", buffering=1) for stream in (out, err))
            for descriptor in (1, 2):
                os.dup2(self._file.fileno(), descriptor)
        sys.stdout, sys.stderr = _Stream(self, out), _Stream(self, err)
        self.add(f"pid {os.getpid()}: {' '.join(sys.argv)}")

    def __enter__(self) -> RankLog:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Gives sys.stdout and sys.stderr back, but not after an error, which is still to be reported."""
        if error is None:
            self.close()

    def close(self) -> None:
        """Gives sys.stdout and sys.stderr back."""
        sys.stdout, sys.stderr = self._streams
        faulthandler.disable()
        self._file.close()

    def add(self, line: str) -> None:
        at = time.strftime("%Y-%m-%d %H:%M:%S")
        with self._lock:
            self._file.write(f"{at} {HOST} rank {self._rank} step {self.step}: {line}\n")


def show_on_terminal() -> None:
    """From here on what this rank prints goes to the terminal too: it was elected to report what happened."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Stream):
            stream.log.on_terminal = True


def log_to_file(line: str) -> None:
    """Adds a line to this rank's log file alone."""
    if isinstance(sys.stderr, _Stream):
        sys.stderr.log.add(line)


class _Stream(io.TextIOBase):
    """A standard stream: to the terminal as it comes, to the log by whole lines. A progress bar's line is its last state.

    No thread continues a line that another has begun: an error stays a line of its own while a library's thread prints.
    """

    def __init__(self, log: RankLog, terminal: TextIO) -> None:
        self.log = log
        self._terminal = terminal
        self._unfinished = ""
        self._writer = threading.get_ident()

    def write(self, text: str) -> int:
        writer = threading.get_ident()
        if self._unfinished and writer != self._writer and not text.startswith(("\r", "\n")):
            self._write("\n")
        self._writer = writer
        self._write(text)
        return len(text)

    def _write(self, text: str) -> None:
        if self.log.on_terminal:
            self._terminal.write(text)
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        self._unfinished = self._unfinished.rpartition("\r")[2]
        for line in lines:
            if shown := line.rpartition("\r")[2].rstrip():
                self.log.add(shown)

    def flush(self) -> None:
        self._terminal.flush()

    def isatty(self) -> bool:
        return self.log.on_terminal and self._terminal.isatty()

    def fileno(self) -> int:
        return self._terminal.fileno()
