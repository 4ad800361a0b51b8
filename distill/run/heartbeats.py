"""Rank heartbeats, and electing one rank to report a failed collective.

    <folder>/3.json    rank 3: its process, a heartbeat, the step it is at, whether a collective has failed for it
    <folder>/elected   made by the one rank that reports what happened: a link whose target is the exit code of all

The error of a failed collective does not name a rank: a dead peer closes its connections, a stopped or disconnected one is
silent until the process group's timeout. So each rank whose collective failed reads the others' files. They lie in the run
directory, since they must outlive any rank, and so rank 0 and its store.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill.run.liveness import Heartbeat, is_here, state_of, this_process

logger = logging.getLogger(__name__)
Record = dict[str, Any]  # what a rank writes about itself
RECORD_BYTES = 1024
BEAT = 1.0
BEATS = 500  # heartbeats that all ranks together write in a second at most; more ranks beat less often
SILENCE = 6.0  # seconds without a heartbeat after which a rank counts as lost, where ranks beat every second
PRECEDENCE = 1.0  # seconds in which rank 0, whose terminal is seen, is elected first: a disconnected rank reaches nobody
NEAR = 16  # ranks to either side, which as a rule include those of the same machine
POLL = 0.1  # seconds from one look at the ranks nearby to the next, with up to POLLERS ranks; more ranks wait longer
POLLERS = 64
READS = 20_000  # files that all ranks together open in a second until one has found what happened
PATIENCE = 5.0  # seconds in which a rank must exit by itself once another has reported why; then it is ended


class RankHeartbeats:
    """One rank's heartbeat, and its view of the others.

    step: the training step that it is at, set by the caller. silence: seconds without a heartbeat until a rank counts as lost.
    """

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.step = 0
        self.rank = rank
        self.world_size = world_size
        self._folder = folder
        self._process = this_process()
        self._has_failed = False
        self._seen: dict[int, Record] = {number: _unknown(number) for number in range(world_size)}
        folder.mkdir(parents=True, exist_ok=True)
        self._beat()
        self.interval = max(BEAT, world_size / BEATS)
        self.silence = SILENCE * self.interval / BEAT
        self._heartbeat = Heartbeat(self._beat_or_exit, self.interval)
        self._heartbeat.start()

    def close(self) -> None:
        self._heartbeat.close()

    @property
    def elected_code(self) -> int | None:
        """The exit code of the rank that reports what happened; None as long as none was elected."""
        try:
            return int(str((self._folder / "elected").readlink()))
        except OSError:
            return None

    def elect(self, code: int) -> bool:
        """Whether this rank is elected to report what happened, and all ranks to exit with `code`: true for one rank alone."""
        try:
            (self._folder / "elected").symlink_to(str(code))  # whole at once, and on a full disk too
        except OSError:
            return self.elected_code is None
        return True

    def diagnose(self, failure: str, timeout: float) -> str:
        """What happened to the other ranks, after a collective failed with `failure`; '' if another rank reports it.

        Takes up to `silence` seconds. Every rank looks at those nearby, of its machine; at all others one rank after the other,
        the lowest first, as their number grows with the square of the ranks'. Ranks that are stopped on this machine are
        killed: they would stay behind, since what ends the rest, a launcher's SIGTERM, does not reach them. That comes after
        `elect`, or another rank would find them killed.
        """
        self._has_failed = True
        self._beat()
        begun = next_look = time.monotonic()
        since, first, poll = 0.0, dict[int, Record](), POLL * max(1, self.world_size / POLLERS)
        wait_for_lower = self.rank * self.world_size / READS if self.world_size > 2 * NEAR else 0.0
        while self.elected_code is None:
            time.sleep(max(0.0, min(next_look - time.monotonic(), BEAT)))
            if (now := time.monotonic()) < next_look:
                continue
            next_look = now + poll
            sees_all = now - begun >= wait_for_lower
            self._read_records(range(self.world_size) if sees_all else self._nearby)
            if sees_all and not first:
                since, first = now, dict(self._seen)
            message, ended = self._diagnose_once(failure, timeout, first, bool(first) and now - since > self.silence)
            if message:
                if self.rank > 0:
                    time.sleep(PRECEDENCE)
                if not self.elect(1):
                    break
                _kill(ended)
                return f"after step {self.step}: {message}"
        return ""

    def _diagnose_once(self, failure: str, timeout: float, first: dict[int, Record], is_late: bool) -> tuple[str, list[Record]]:
        """What is known now, '' for nothing yet, and the ranks to be killed.

        first: the records `silence` seconds ago; {} while only those of the ranks nearby have been read.
        """
        limit = f"{timeout:g} s (engine.timeout)"
        others = [record for number, record in self._seen.items() if number != self.rank]
        running = [record for record in others if not record["has_failed"]]
        if gone := [record for record in others if _state(record) == ""]:
            return f"lost {_names(gone)}: killed (out of memory? see dmesg) or crashed (see its last lines)", []
        if stopped := [record for record in running if _state(record) in ("T", "t")]:
            return f"lost {_names(stopped)}: stopped (SIGSTOP), no answer for {limit}", stopped
        if first and not running:
            hosts = ", ".join(sorted({str(record["host"]) for record in [self._process, *others]}))
            return f"all ranks run, but none reaches another: the network between them is cut ({hosts}; {failure})", []
        if not is_late:
            return "", []
        if silent := [record for record in running if record.get("beat") == first[record["rank"]].get("beat")]:
            return f"lost {_names(silent)}: no heartbeat: its machine is down or disconnected, or it hangs", silent
        return (
            f"rank {self.rank} has waited {limit} for {_names(running)}, which still runs: the network between them is cut, or"
            " its work takes longer (then raise engine.timeout)"
        ), []

    @property
    def _nearby(self) -> range:
        return range(max(0, self.rank - NEAR), min(self.world_size, self.rank + NEAR + 1))

    def _read_records(self, ranks: range) -> None:
        """Reads the last record of each of these ranks."""
        for rank in ranks:
            self._seen[rank] = _read(self._folder / f"{rank}.json") or self._seen[rank]

    def _beat(self) -> None:
        record = {
            **self._process,
            "rank": self.rank,
            "step": self.step,
            "has_failed": self._has_failed,
            "beat": time.monotonic_ns(),
        }
        # in place and of one length: so it works on a full disk, and other machines do not see a file that was there before
        with suppress(OSError):
            file = os.open(self._folder / f"{self.rank}.json", os.O_CREAT | os.O_WRONLY, 0o666)
            try:
                os.pwrite(file, json.dumps(record).ljust(RECORD_BYTES).encode(), 0)
            finally:
                os.close(file)

    def _beat_or_exit(self) -> None:
        """Beats; ends this process PATIENCE seconds after another rank was elected, if it does not exit by itself."""
        self._beat()
        code = self.elected_code
        if code is not None and not self._heartbeat.wait(PATIENCE):
            logger.error("ended after step %d: another rank has failed, and this one hangs", self.step)
            os._exit(code)


def _unknown(rank: int) -> Record:
    """The record of a rank that has not written yet."""
    return {"rank": rank, "has_failed": False}


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
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
