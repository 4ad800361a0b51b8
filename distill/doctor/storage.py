"""The run directory: writable, the same one on all nodes, with locks that hold between them, and space for the run."""

from __future__ import annotations

import errno
import fcntl
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

from distill.doctor.context import Context
from distill.doctor.findings import Facts, Finding, Findings, Nodes, warning
from distill.doctor.needs import disk_needed
from distill.run.files import publish
from distill.run.formatting import format_bytes

PREFIX = ".doctor-"  # of the doctor's files in the run directory
OLD = 3600.0  # seconds after which they are those of a doctor that was killed
LITTLE = 1e9  # bytes
FIXES = {
    errno.EROFS: "ssh {node} mount -o remount,rw {mount}; or runs_dir=DIR on another file system",
    errno.ENOSPC: "free some space on it, or runs_dir=DIR",
    errno.EDQUOT: "your quota on it is used up: free some space, or runs_dir=DIR",
    errno.EACCES: "ssh {node} ls -ld {path}; let your user write there, or runs_dir=DIR",
}


def collect(context: Context) -> Facts:
    path = context.config.run_dir.absolute()
    facts: Facts = {"path": str(path), "error": "", "errno": 0, "lock": ""}
    try:
        path.mkdir(parents=True, exist_ok=True)
        trial = path / f"{PREFIX}{secrets.token_hex(8)}"
        with publish(trial) as part:
            part.write(b"written")
        if trial.read_bytes() != b"written":
            facts["error"] = "a file that was written and renamed has other content"
        with trial.open("a") as first, trial.open("a") as second:
            facts["lock"] = _lock_error(first) or ("" if _lock_error(second) else "flock grants the same lock twice")
        trial.unlink()
    except OSError as error:
        facts |= {"error": error.strerror or str(error), "errno": error.errno or 0}
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    facts["mount"], facts["kind"] = mount_of(existing)
    facts["free"] = shutil.disk_usage(existing).free
    facts["needed"], facts["estimate"] = disk_needed(context.config)
    return facts


def _lock_error(file: IO) -> str:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return f"flock is refused: {error.strerror}"
    return ""


def mount_of(path: Path) -> tuple[str, str]:
    """The mount point of a path, and what is mounted there: ("/home", "nfs4 server:/home")."""
    resolved, found = path.resolve(), ("/", "unknown")
    for mount in psutil.disk_partitions(all=True):
        if resolved.is_relative_to(mount.mountpoint) and len(mount.mountpoint) >= len(found[0]):
            found = (mount.mountpoint, f"{mount.fstype} {mount.device}")
    return found


@contextmanager
def marker(context: Context, facts: Facts) -> Iterator[str]:
    """On rank 0: a file in the run directory, locked until the context ends. Yields its name, '' where it cannot be written."""
    folder = context.config.run_dir
    if facts.get("failed") or facts["error"]:
        yield ""
        return
    for path in folder.glob(f"{PREFIX}*"):
        with suppress(OSError):  # its own process deletes it
            if time.time() - path.stat().st_mtime > OLD:
                path.unlink()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=PREFIX) as file:
        _lock_error(file)
        yield Path(file.name).name


def check_marker(context: Context, name: str) -> Facts:
    """On another rank: whether it sees the marker of rank 0, and finds it locked; {} if there is none."""
    path = context.config.run_dir / name
    if not name or not path.exists():
        return {"is_shared": False} if name else {}
    with suppress(OSError), path.open("a") as file:
        return {"is_shared": True, "is_locked": bool(_lock_error(file))}
    return {"is_shared": True}  # but not writable, which is an error of its own


def diagnose(context: Context, nodes: Nodes) -> Findings:
    for number, (node, facts) in enumerate(nodes.items()):
        path, kind, mount = facts["path"], facts["kind"], facts["mount"]
        if facts["error"]:
            fix = FIXES.get(facts["errno"], "runs_dir=DIR on a file system that all nodes can write to")
            what = f"{path} cannot be written here: {facts['error']} ({kind})"
            yield Finding(node, what, fix.format(node=node, path=path, mount=mount))
        elif facts["lock"]:
            fix = f"mount it with locks (Lustre: -o flock), or runs_dir=DIR ({kind} at {mount})"
            yield Finding(node, f"{path}: {facts['lock']}", fix)
        if not facts.get("is_shared", True):
            first = next(iter(nodes))
            what = f"{path} is not the run directory of {first}: {nodes[first]['kind']} on {first}, {kind} on {node}"
            yield Finding(node, what, f"mount the same file system on {node}, or runs_dir=DIR on one that all nodes see")
        elif not facts.get("is_locked", True):
            fix = "mount it with locks that hold between nodes (Lustre: -o flock, not localflock; NFS: without nolock)"
            yield Finding(node, f"{path}: a lock that rank 0 holds is free here", fix)
        if number == 0:
            yield from _diagnose_space(node, facts)


def _diagnose_space(node: str, facts: Facts) -> Findings:
    free, needed = facts["free"], facts["needed"]
    fix = f"free some space at {facts['mount']}, or runs_dir=DIR"
    if needed is not None and free < needed:
        yield Finding(node, f"{format_bytes(free)} free, and the run needs about {facts['estimate']}", fix)
    elif needed is None and free < LITTLE:
        yield warning(node, f"{format_bytes(free)} free; what the run needs is {facts['estimate']}", fix)


def summarise(facts: Facts) -> str:
    needed = "needs unknown" if facts["needed"] is None else f"{format_bytes(facts['needed'])} needed"
    return f"{format_bytes(facts['free'])} free ({facts['kind'].split()[0]}), {needed}"
