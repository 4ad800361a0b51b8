"""Looks at this node, tells rank 0, and on rank 0 waits for what the others tell; none of it for long."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from distill.doctor.checks import look
from distill.doctor.diagnosis import Diagnosis, Evidence, diagnose, storage_error
from distill.doctor.meeting import REDUCE, Join, Meeting
from distill.doctor.notices import Notices, Report
from distill.doctor.start import Start

LOOK = 10.0  # seconds from its beginning that a process has to look
IMPORT = 13.0  # the same, where it has to import what lies on a slow file system
WAIT = 8.0  # seconds that it then waits for ranks of which nothing is heard
END = 17.0  # seconds from its beginning that it waits for any
POLL = 0.05
A_MOMENT = 2.0


def examine(start: Start, join: Join) -> Diagnosis:
    """On rank 0: how all nodes are."""
    with _notices(start) as notices:
        own = _look(start, notices)
        looked = time.monotonic()
        meeting = _meet(start, own, start.began + END, join)
        while not _all_have_told(start, notices, meeting):
            still_look = [rank for rank, report in notices.heard.items() if "facts" not in report]
            if time.monotonic() > (start.began + END if still_look else min(looked + WAIT, start.began + END)):
                break
            time.sleep(POLL)
        waited = time.monotonic() - looked
        if meeting is None:
            return diagnose(start, Evidence(by_files={0: own, **notices.heard}, by_network={}, waited=waited))
        meeting.stop_waiting()
        if meeting.has_come:
            meeting.is_done.wait(min(REDUCE + 1, max(A_MOMENT, start.began + END - time.monotonic())))
        reduce_errors = dict(meeting.reduce_errors)
        if meeting.has_begun_to_reduce and not meeting.is_done.is_set():
            reduce_errors[0] = "it does not end"
        evidence = Evidence(
            by_files={0: own, **notices.heard},
            by_network=dict(meeting.heard),
            waited=waited,
            network_error=meeting.error or ("" if meeting.has_come else "no answer"),
            reduce_errors=reduce_errors,
            bandwidth=meeting.bandwidth,
        )
        diagnosis = diagnose(start, evidence)
        meeting.close()
    return diagnosis


def report_to_rank_0(start: Start, join: Join) -> str:
    """On any other rank: tells rank 0; returns what this rank must say itself, lest nobody hears of it, or ''."""
    with _notices(start) as notices:
        own = _look(start, notices)
        looked = time.monotonic()
        meeting = _meet(start, own, min(looked + WAIT, start.began + END), join)
        heard = False
        while time.monotonic() < (start.began + END if heard else looked + WAIT) + A_MOMENT:
            heard = notices.has_heard or (meeting is not None and meeting.has_come)
            if notices.is_over or (meeting is not None and meeting.is_over):
                break
            if meeting is not None and meeting.error and "network_error" not in own:
                own = own | {"network_error": meeting.error}
                notices.say(own)
            time.sleep(POLL)
    host, where = socket.gethostname(), start.config.run_dir.absolute()
    if error := storage_error(own):
        return f"{host}: {where} cannot be written here: {error}"
    return "" if heard else f"{host}: nothing heard of rank 0, neither over {where} nor at {start.place}"


@contextmanager
def _notices(start: Start) -> Iterator[Notices]:
    notices = Notices(start.folder, start.rank)
    notices.start()
    try:
        yield notices
    finally:
        notices.close()


def _look(start: Start, notices: Notices) -> Report:
    """This rank's report; says before that it has begun."""
    report: Report = {"host": socket.gethostname(), "local_rank": start.local_rank}
    notices.say(report)
    importing = threading.Thread(target=_import_torch, daemon=True)
    importing.start()
    facts = look(start, start.began + LOOK, start.began + IMPORT) if start.local_rank == 0 else {}
    importing.join(max(0.0, start.began + IMPORT - time.monotonic()))
    report = report | {"facts": facts, "is_late": importing.is_alive()}
    notices.say(report)
    return report


def _import_torch() -> None:
    import torch.distributed  # noqa: F401


def _meet(start: Start, report: Report, until: float, join: Join) -> Meeting | None:
    """Goes where ranks meet; None if there is nobody to meet, or no torch yet to meet with."""
    if start.world_size == 1 or report["is_late"]:
        return None
    meeting = Meeting(start, report, until, join)
    meeting.start()
    return meeting


def _all_have_told(start: Start, notices: Notices, meeting: Meeting | None) -> bool:
    """Whether nothing more is to be expected, by either way."""
    for rank in range(1, start.world_size):
        over_files = notices.heard.get(rank, {})
        over_network = meeting.heard.get(rank) if meeting is not None else None
        if "facts" not in over_files and not (over_network and storage_error(over_network)):
            return False
        if meeting is not None and not meeting.error and over_network is None and not over_files.get("is_late"):
            return False
    return True
