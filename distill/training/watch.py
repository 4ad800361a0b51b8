"""Which ranks still live, and who says what happened when a collective has failed.

    <folder>/3.json    rank 3: its process, a heartbeat, the step it is at, whether a collective has failed for it
    <folder>/said      made by the one rank that says what happened: a link whose target is the exit code of all

A failed collective names nobody: a dead peer closes its connections, a stopped or cut off one is silent until the process
group's timeout. So each rank that finds itself left looks at the others' files. They lie in the run directory, since they must
outlive any rank, and so rank 0 and its store.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill.process import is_here, state_of, this_process

Record = dict[str, Any]  # what a rank writes of itself
RECORD_BYTES = 1024
BEAT = 1.0
SILENCE = 6.0  # a heart that has not beaten for so many seconds has stopped
PRECEDENCE = 1.0  # seconds in which it falls to rank 0, whose terminal is seen: a rank that is cut off speaks to nobody
PATIENCE = 5.0  # what a rank has to end by itself once another has said why; a rank that hangs is ended then


class Watch:
    """One rank's heartbeat, and its view of the others. `step`, which others set: the step it is at."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.step = 0
        self.rank = rank
        self.world_size = world_size
        self._folder = folder
        self._process = this_process()
        self._is_left = False
        self._seen: dict[int, Record] = {number: _unknown(number) for number in range(world_size)}
        self._closed = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self._beat()
        self._thread = threading.Thread(target=self._beat_on, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    @property
    def said(self) -> int | None:
        """The exit code of the rank that has said what happened; None as long as nobody has."""
        try:
            return int(str((self._folder / "said").readlink()))
        except OSError:
            return None

    def say(self, code: int) -> bool:
        """Whether it falls to this rank to say what happened, and to all ranks to end with `code`: true for one rank alone."""
        try:
            (self._folder / "said").symlink_to(str(code))  # whole at once, and on a full disk too
        except OSError:
            return self.said is None
        return True

    def diagnose(self, failure: str, timeout: float) -> str:
        """What became of the others, to be called where a collective failed with `failure`; '' if another rank says it.

        Takes up to SILENCE seconds. Ranks that are stopped on this machine are killed: they would stay behind, since what ends
        the rest, a launcher's SIGTERM, does not reach them. That comes after `say`, or another rank would find them killed.
        """
        self._is_left = True
        self._beat()
        since, first = time.monotonic(), self._records()
        while self.said is None:
            message, ended = self._look(failure, timeout, first, time.monotonic() - since > SILENCE)
            if message:
                if self.rank > 0:
                    time.sleep(PRECEDENCE)
                if not self.say(1):
                    break
                _kill(ended)
                return f"after step {self.step}: {message}"
            time.sleep(0.1)
        return ""

    def _look(self, failure: str, timeout: float, first: list[Record], is_late: bool) -> tuple[str, list[Record]]:
        """What can be said now, '' for nothing yet, and the ranks to be killed; `first`: the records SILENCE seconds ago."""
        limit = f"{timeout:g} s (engine.timeout)"
        others = [record for record in self._records() if record["rank"] != self.rank]
        running = [record for record in others if not record["is_left"]]
        if gone := [record for record in others if _state(record) == ""]:
            return f"lost {_names(gone)}: killed (for want of memory? dmesg tells) or crashed (its last lines tell)", []
        if stopped := [record for record in running if _state(record) in ("T", "t")]:
            return f"lost {_names(stopped)}: stopped (SIGSTOP), no answer for {limit}", stopped
        if not running:
            hosts = ", ".join(sorted({str(record["host"]) for record in [self._process, *others]}))
            return f"all ranks run, but none hears another: the network between them is cut ({hosts}; {failure})", []
        if not is_late:
            return "", []
        if silent := [record for record in running if record.get("beat") == first[record["rank"]].get("beat")]:
            return f"lost {_names(silent)}: no heartbeat: its machine is down or cut off, or it hangs", silent
        return (
            f"rank {self.rank} has waited {limit} for {_names(running)}, which still runs: the network between them is cut, or"
            " its work takes longer (then raise engine.timeout)"
        ), []

    def _records(self) -> list[Record]:
        """What each rank has last written."""
        for rank in range(self.world_size):
            self._seen[rank] = _read(self._folder / f"{rank}.json") or self._seen[rank]
        return list(self._seen.values())

    def _beat(self) -> None:
        record = {**self._process, "rank": self.rank, "step": self.step, "is_left": self._is_left, "beat": time.monotonic_ns()}
        # in place and of one length: so it works on a full disk, and other machines do not see a file that was there before
        with suppress(OSError):
            file = os.open(self._folder / f"{self.rank}.json", os.O_CREAT | os.O_WRONLY, 0o666)
            try:
                os.pwrite(file, json.dumps(record).ljust(RECORD_BYTES).encode(), 0)
            finally:
                os.close(file)

    def _beat_on(self) -> None:
        while not self._closed.wait(BEAT):
            self._beat()
            code = self.said
            if code is not None and not self._closed.wait(PATIENCE):
                print(f"ended after step {self.step}: another rank has failed, and this one hangs", file=sys.stderr, flush=True)
                os._exit(code)


def _unknown(rank: int) -> Record:
    """What is known of a rank that has not written yet."""
    return {"rank": rank, "is_left": False}


def _names(records: list[Record]) -> str:
    """rank 1 (pid 4711 on node3), ..."""
    known = [f"rank {r['rank']}" + (f" (pid {r['pid']} on {r['host']})" if "pid" in r else "") for r in records[:4]]
    return ", ".join(known) + (f" and {len(records) - 4} more" if len(records) > 4 else "")


def _state(record: Record) -> str:
    """The kernel's letter for the state of a rank; '' if it is gone, ? where that cannot be seen from here."""
    return state_of(record) if "pid" in record and is_here(record) else "?"


def _kill(records: list[Record]) -> None:
    for record in records:
        if _state(record) not in ("", "?"):
            os.kill(record["pid"], signal.SIGKILL)


def _read(path: Path) -> Record | None:
    """The object in a file that is written in place; None if it is not there, or is being written."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
