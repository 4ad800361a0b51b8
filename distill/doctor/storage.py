"""The run directory: writable, the same one on all nodes, with locks that hold between them, and space for the run."""

from __future__ import annotations

import errno
import fcntl
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

import psutil

from distill.doctor.check import Context, Facts, Finding, Findings, Nodes, warning
from distill.doctor.needs import disk_needed
from distill.run.files import publish, sweep
from distill.run.formatting import format_bytes

PREFIX, SUFFIX = ".doctor-", ".part"  # of the doctor's files in the run directory; `sweep` deletes those of a killed doctor
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
        trial = path / f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}"
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
    (mount, kind), free = mount_of(existing), shutil.disk_usage(existing).free
    needed, estimate = disk_needed(context.config)
    summary = f"{format_bytes(free)} free ({kind.partition(' ')[0]}), "
    summary += "needs unknown" if needed is None else f"{format_bytes(needed)} needed"
    return facts | {"mount": mount, "kind": kind, "free": free, "needed": needed, "estimate": estimate, "summary": summary}


def _lock_error(file: IO) -> str:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return f"flock is refused: {error.strerror}"
    return ""


def mount_of(path: Path) -> tuple[str, str]:
    """The mount point of a path, and what is mounted there: ("/home", "nfs4 server:/home")."""
    resolved = path.resolve()
    mounts = [each for each in psutil.disk_partitions(all=True) if resolved.is_relative_to(each.mountpoint)]
    deepest = max(reversed(mounts), key=lambda mount: len(mount.mountpoint), default=None)  # the last of those at one point
    return (deepest.mountpoint, f"{deepest.fstype} {deepest.device}") if deepest else ("/", "unknown")


def temporary_file(context: Context) -> Any:
    """An open binary file in the run directory, which is deleted when it is closed."""
    return tempfile.NamedTemporaryFile(dir=context.config.run_dir, prefix=PREFIX, suffix=SUFFIX)


@contextmanager
def marker(context: Context, facts: Facts) -> Iterator[str]:
    """On rank 0: a file in the run directory, locked until the context ends. Yields its name, '' where it cannot be written."""
    file = None
    if not facts.get("failed") and not facts["error"]:
        with suppress(OSError):
            sweep(context.config.run_dir)
        with suppress(OSError):
            file = temporary_file(context)
            _lock_error(file)
    with file or nullcontext():
        yield Path(file.name).name if file else ""


def check_marker(context: Context, name: str) -> Facts:
    """On another rank: whether it sees the marker of rank 0, and finds it locked; {} if there is none."""
    if not name:
        return {}
    try:
        with (context.config.run_dir / name).open("r+") as file:
            return {"is_shared": True, "is_locked": bool(_lock_error(file))}
    except (FileNotFoundError, NotADirectoryError):
        return {"is_shared": False}
    except OSError:
        return {"is_shared": True}  # but not writable, which is an error of its own


def diagnose(context: Context, nodes: Nodes) -> Findings:
    for node, facts in nodes.items():
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
    for node, facts in islice(nodes.items(), 1):  # all nodes have the same run directory
        free, needed = facts["free"], facts["needed"]
        fix = f"free some space at {facts['mount']}, or runs_dir=DIR"
        if needed is not None and free < needed:
            yield Finding(node, f"{format_bytes(free)} free, and the run needs about {facts['estimate']}", fix)
        elif needed is None and free < LITTLE:
            yield warning(node, f"{format_bytes(free)} free; what the run needs is {facts['estimate']}", fix)
