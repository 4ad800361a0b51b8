"""Which process a file speaks of, and whether it still runs: for files through which processes of several machines meet."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """JSON-able: host, boot, pids (the namespace of process numbers), pid, started."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    names = Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "pids": names.stat().st_ino if names.exists() else 0,
        "pid": os.getpid(),
        "started": _stat(os.getpid())[1],
    }


def is_here(process: dict[str, Any]) -> bool:
    """Whether a process runs, or ran, where its number means something to us."""
    ours = this_process()
    return bool(ours["boot"]) and all(process.get(key) == ours[key] for key in ("host", "boot", "pids"))


def state_of(process: dict[str, Any]) -> str:
    """The kernel's letter for the state of a process that is here, e.g. S, R, T (stopped); '' if it is gone."""
    pid = process.get("pid")
    state, started = _stat(pid) if isinstance(pid, int) else ("", "")
    return state if started == process.get("started") else ""


def _stat(pid: int) -> tuple[str, str]:
    """The state of a process and when it began, in the kernel's ticks: numbers are given out again. ('', '') if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return ("", "") if fields[0] in "ZX" else (fields[0], fields[19])
