"""Liveness of processes on several machines: an identity to write into a shared file, its state, and a heartbeat thread."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Heartbeat:
    """A daemon thread that calls `beat` every `interval` seconds between `start` and `close`."""

    def __init__(self, beat: Callable[[], object], interval: float) -> None:
        self._beat = beat
        self._interval = interval
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stops the thread and waits for its end."""
        self._closed.set()
        self._thread.join()

    def wait(self, seconds: float) -> bool:
        """Waits until `close` is called, at most for these seconds; returns whether it was."""
        return self._closed.wait(seconds)

    def _run(self) -> None:
        while not self.wait(self._interval):
            self._beat()


def this_process() -> dict[str, Any]:
    """The identity of this process, JSON-able: host, boot, pids (the namespace of process numbers), pid, started."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    names = Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text(encoding="utf-8").strip() if boot.exists() else "",
        "pids": names.stat().st_ino if names.exists() else 0,
        "pid": os.getpid(),
        "started": _stat(os.getpid())[1],
    }


def is_here(process: dict[str, Any]) -> bool:
    """Whether a process runs, or ran, on this machine since its last boot and in this namespace of process numbers."""
    ours = this_process()
    return bool(ours["boot"]) and all(process.get(key) == ours[key] for key in ("host", "boot", "pids"))


def state_of(process: dict[str, Any]) -> str:
    """The kernel's letter for the state of a process on this machine, e.g. S, R, T (stopped); '' if it is gone."""
    pid = process.get("pid")
    state, started = _stat(pid) if isinstance(pid, int) else ("", "")
    return state if started == process.get("started") else ""


def label() -> str:
    """This process as part of a file's name: a digest of its machine (host, boot, namespace), its number and start time."""
    ours = this_process()
    return f"{machine(ours)}-{ours['pid']}-{ours['started']}"


def has_ended(label: str) -> bool:
    """Whether the process of a `label` ran on this machine and is gone; False for one of another machine."""
    on, _, process = label.partition("-")
    pid, _, started = process.partition("-")
    return on == machine(this_process()) and pid.isdecimal() and _stat(int(pid))[1] != started


def machine(process: dict[str, Any]) -> str:
    """A digest, 8 hex digits, of where a process runs: host, boot, namespace of process numbers."""
    return hashlib.sha256(f"{process['host']} {process['boot']} {process['pids']}".encode()).hexdigest()[:8]


def _stat(pid: int) -> tuple[str, str]:
    """State and start time (in kernel ticks, since process numbers are reused) of a process; ('', '') if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return "", ""
    return ("", "") if fields[0] in "ZX" else (fields[0], fields[19])
