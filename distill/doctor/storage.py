"""The run directory: writable, with renames and locks that hold, and room for what the run will write."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

from distill.doctor.findings import Facts, Finding, Findings, Nodes, size, warning
from distill.doctor.needs import disk_needed
from distill.doctor.start import Start
from distill.files import publish

LITTLE = 1e9
REMEDIES = {
    errno.EROFS: "ssh {node} mount -o remount,rw {mount}; or runs_dir=DIR on another file system",
    errno.ENOSPC: "free some space on it, or runs_dir=DIR",
    errno.EDQUOT: "your quota on it is used up: free some space, or runs_dir=DIR",
    errno.EACCES: "ssh {node} ls -ld {path}; let your user write there, or runs_dir=DIR",
}


def look(start: Start) -> Facts:
    path = start.config.run_dir.absolute()
    facts: Facts = {"path": str(path), "error": "", "errno": 0, "lock": ""}
    try:
        start.folder.mkdir(parents=True, exist_ok=True)
        trial = start.folder / f"trial-{start.rank}"
        with publish(trial) as file:
            file.write(b"whole")
        if trial.read_bytes() != b"whole":
            facts["error"] = "what was written and renamed reads otherwise"
        facts["lock"] = _lock_error(trial)
        trial.unlink()
    except OSError as error:
        facts |= {"error": error.strerror or str(error), "errno": error.errno or 0}
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    facts["mount"], facts["kind"] = mount_of(there)
    facts["free"] = shutil.disk_usage(there).free
    facts["needed"], facts["estimate"] = disk_needed(start.config)
    return facts


def _lock_error(path: Path) -> str:
    with path.open("a") as first, path.open("a") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return f"flock is refused: {error.strerror}"
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return ""
    return "flock grants the same lock twice"


def mount_of(path: Path) -> tuple[str, str]:
    """The mount point that a path lies under, and what is mounted there: ("/home", "nfs4 server:/home")."""
    found = ("/", "unknown")
    resolved = str(path.resolve())
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        before, _, after = line.partition(" - ")
        point = before.split()[4].replace("\\040", " ")
        if os.path.commonpath([point, resolved]) == point and len(point) >= len(found[0]):
            found = (point, " ".join(after.split()[:2]))
    return found


def judge(start: Start, nodes: Nodes) -> Findings:
    for node, facts in nodes.items():
        if facts["error"]:
            remedy = REMEDIES.get(facts["errno"], "runs_dir=DIR on a file system that all nodes can write to")
            fix = remedy.format(node=node, path=facts["path"], mount=facts["mount"])
            yield Finding(node, f"{facts['path']} cannot be written here: {facts['error']} ({facts['kind']})", fix)
        elif facts["lock"]:
            fix = f"mount it with locks (Lustre: -o flock), or runs_dir=DIR ({facts['kind']} at {facts['mount']})"
            yield Finding(node, f"{facts['path']}: {facts['lock']}", fix)
        if "is_locked" in facts and not facts["is_locked"]:
            fix = "mount it with locks that hold between nodes (Lustre: -o flock, not localflock; NFS: without nolock)"
            yield Finding(node, f"{facts['path']}: a lock that rank 0 holds is free here", fix)
    first = next(iter(nodes), None)
    if first is not None:
        yield from _judge_room(first, nodes[first])


def _judge_room(node: str, facts: dict[str, Any]) -> Findings:
    free, needed = facts["free"], facts["needed"]
    fix = f"free some space at {facts['mount']}, or runs_dir=DIR"
    if needed is not None and free < needed:
        yield Finding(node, f"{size(free)} free, and the run needs about {facts['estimate']}", fix)
    elif needed is None and free < LITTLE:
        yield warning(node, f"{size(free)} free; what the run needs is {facts['estimate']}", fix)


def note(facts: Facts) -> str:
    needed = "what is needed is unknown" if facts["needed"] is None else f"{size(facts['needed'])} needed"
    return f"{size(facts['free'])} free ({facts['kind'].split()[0]}), {needed}"
