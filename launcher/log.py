"""What a rank prints goes to a file of its own as well, each line with the time, the host, the rank and its step."""

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
    """The file of one rank, appended to, and who hears the rank besides: the terminal does if `aloud`, which rank 0 always is.

    From its making on, sys.stdout and sys.stderr are this log's, and what libraries print past Python goes, of ranks above 0,
    into the file. `step`, which others set, is the step that the rank is at.
    """

    def __init__(self, folder: Path, stage: str, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.aloud = rank == 0
        self.step = 0
        self._rank = rank
        self._file = (folder / f"{stage}-rank-{rank:05d}.log").open("a", buffering=1, encoding="utf-8")
        self._lock = threading.Lock()
        faulthandler.enable(self._file)
        out, err = sys.stdout, sys.stderr
        if rank:
            out, err = (os.fdopen(os.dup(stream.fileno()), "w", buffering=1) for stream in (out, err))
            for descriptor in (1, 2):
                os.dup2(self._file.fileno(), descriptor)
        sys.stdout, sys.stderr = _Stream(self, out), _Stream(self, err)
        self.add(f"pid {os.getpid()}: {' '.join(sys.argv)}")

    def add(self, line: str) -> None:
        at = time.strftime("%Y-%m-%d %H:%M:%S")
        with self._lock:
            self._file.write(f"{at} {HOST} rank {self._rank} step {self.step}: {line}\n")


def speak() -> None:
    """From here on the terminal hears this rank: it falls to it to say what happened."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Stream):
            stream.log.aloud = True


def note(line: str) -> None:
    """For this rank's file alone."""
    if isinstance(sys.stderr, _Stream):
        sys.stderr.log.add(line)


class _Stream(io.TextIOBase):
    """A standard stream: to the terminal as it comes, to the log by whole lines. A progress bar's line is its last state.

    No thread goes on with a line that another has begun: an error stays a line of its own while a library's thread prints.
    """

    def __init__(self, log: RankLog, terminal: TextIO) -> None:
        self.log = log
        self._terminal = terminal
        self._begun = ""
        self._writer = threading.get_ident()

    def write(self, text: str) -> int:
        writer = threading.get_ident()
        if self._begun and writer != self._writer and not text.startswith(("\r", "\n")):
            self._write("\n")
        self._writer = writer
        self._write(text)
        return len(text)

    def _write(self, text: str) -> None:
        if self.log.aloud:
            self._terminal.write(text)
        *lines, self._begun = (self._begun + text).split("\n")
        self._begun = self._begun.rpartition("\r")[2]
        for line in lines:
            if shown := line.rpartition("\r")[2].rstrip():
                self.log.add(shown)

    def flush(self) -> None:
        self._terminal.flush()

    def isatty(self) -> bool:
        return self.log.aloud and self._terminal.isatty()

    def fileno(self) -> int:
        return self._terminal.fileno()
