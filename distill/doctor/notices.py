"""Reports from rank to rank over the run directory.

    <folder>/asked.json    rank 0's question: a number that no other start has, so that no report of a killed one is believed
    <folder>/3.json        rank 3's answer: that number, and its report
    <folder>/lock          held by rank 0, tried by the others

All of it is in a thread, since a file system that hangs, hangs whoever asks it.
"""

from __future__ import annotations

import fcntl
import json
import secrets
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill.files import write_json

Report = dict[str, Any]  # JSON-able; "facts" are there once the rank has looked
POLL = 0.1
A_MOMENT = 1.0
OLD = 3600.0  # seconds


class Notices(threading.Thread):
    """One rank's part. heard: on rank 0, what each rank has said last. has_heard, is_over: on the others, whether rank 0 has
    asked, and whether it has taken its folder away since."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(name="notices", daemon=True)
        self.heard: dict[int, Report] = {}
        self.has_heard = False
        self.is_over = False
        self._folder = folder
        self._rank = rank
        self._report: Report | None = None
        self._closed = threading.Event()

    def say(self, report: Report) -> None:
        """Tells rank 0, instead of what was said before."""
        self._report = report

    def close(self) -> None:
        """Removes this rank's traces, and on rank 0 all; gives up where the file system hangs."""
        self._closed.set()
        self.join(A_MOMENT)

    def run(self) -> None:
        with suppress(OSError):  # `storage` says what is wrong here
            self._folder.mkdir(parents=True, exist_ok=True)
            self._ask() if self._rank == 0 else self._answer()

    def _ask(self) -> None:
        number = secrets.token_hex(8)
        self._sweep()
        try:
            with (self._folder / "lock").open("w") as lock:
                with suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                write_json(self._folder / "asked.json", {"number": number})
                while not self._closed.wait(POLL):
                    self._look_anew()
                    for path in self._folder.glob("[0-9]*.json"):
                        answer = _read(path)
                        if answer is not None and answer["number"] == number:
                            self.heard[int(path.stem)] = answer["report"]
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._remove_empty()

    def _answer(self) -> None:
        said: tuple[str, Report] | None = None
        file = self._folder / f"{self._rank}.json"
        try:
            while not self._closed.wait(POLL):
                self._look_anew()
                asked = _read(self._folder / "asked.json")
                if asked is None and said is not None:
                    self.is_over = True
                    break
                if asked is None or self._report is None or said == (asked["number"], self._report):
                    continue
                self.has_heard = True
                said = (asked["number"], self._report)
                write_json(file, {"number": said[0], "report": {**said[1], "is_locked": self._is_locked()}})
        finally:
            file.unlink(missing_ok=True)
            self._remove_empty()

    def _is_locked(self) -> bool:
        """Whether the lock that rank 0 holds is seen here."""
        with (self._folder / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    def _look_anew(self) -> None:
        """A network file system's client remembers what a folder held until it is itself the one to change it."""
        trace = self._folder / f".{self._rank}"
        with suppress(OSError):
            trace.touch()
            trace.unlink()

    def _sweep(self) -> None:
        """Removes the folders of starts that were killed."""
        for folder in self._folder.parent.iterdir():
            if time.time() - folder.stat().st_mtime > OLD:
                shutil.rmtree(folder, ignore_errors=True)

    def _remove_empty(self) -> None:
        with suppress(OSError):
            self._folder.rmdir()
        with suppress(OSError):
            self._folder.parent.rmdir()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
