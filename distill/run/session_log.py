"""Session log: host, device, ranks, duration, energy and versions of each session of a stage, in <stage>/sessions.jsonl.

    {"work": "train", "host": .., "device": .., "ranks": 2, "started": .., "seconds": .., "gpu_joules": .., "versions": {..}}

A session that is killed leaves no line. No stage reads the log.
"""

from __future__ import annotations

import platform
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import distill
from distill.run.collectives import is_distributed, rank, reduce_sums, world_size
from distill.run.energy import EnergyMeter
from distill.run.files import append_line, read_lines
from distill.run.stopping import Stopped

PACKAGES = ("torch", "deepspeed", "transformers", "sentence-transformers", "numpy")
FILE = "sessions.jsonl"


@contextmanager
def session(directory: Path, work: str, device: torch.device, *, alone: bool = False) -> Iterator[None]:
    """Appends a line to directory/sessions.jsonl when the block ends: one line for all ranks together.

    alone: a line for this process alone, even if there are other ranks. With several ranks, no line is written if the block
    raises anything but Stopped, since then the other ranks may not be there for the collective. Errors of writing are ignored.
    """
    together = is_distributed() and not alone
    line = {"work": work, "host": socket.gethostname(), "device": device_name(device), "ranks": world_size() if together else 1}
    line |= {"started": round(time.time(), 1), "versions": versions() if alone or rank() == 0 else {}}
    clock, energy = time.monotonic(), EnergyMeter(device)

    def write() -> None:
        joules = _sum_over_ranks(energy.joules(), device) if together else energy.joules()
        if alone or rank() == 0:
            seconds = round(time.monotonic() - clock, 1)
            with suppress(OSError):
                append_line(directory / FILE, {**line, "seconds": seconds, "gpu_joules": joules})

    try:
        yield
    except BaseException as error:
        if isinstance(error, Stopped) or not together:
            write()
        raise
    write()


def read_sessions(directory: Path) -> list[dict[str, Any]]:
    """The lines of a stage's sessions.jsonl."""
    return read_lines(directory / FILE)


def versions() -> dict[str, str]:
    """Versions of this project (with the commit, in a clone), of Python, and of PACKAGES."""
    found = {"distill": distill.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    commit = _commit(Path(distill.__file__).parents[1])
    return found | ({"commit": commit} if commit else {})


def device_name(device: torch.device) -> str:
    """The vendor's name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE):
            return found[1].strip()
    return platform.machine()


def _sum_over_ranks(joules: float | None, device: torch.device) -> float | None:
    """The sum over ranks; None unless every rank measured."""
    values = {"joules": joules or 0.0, "num_measured": float(joules is not None)}
    sums = reduce_sums({name: torch.tensor(value, dtype=torch.double, device=device) for name, value in values.items()})
    return round(sums["joules"], 1) if sums["num_measured"] == world_size() else None


def _commit(root: Path) -> str | None:
    """The commit of a clone, followed by + if files have changed; None if `root` is no clone, or git is not installed."""
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")) != root.resolve():
            return None
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
        return _git(root, "rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *what: str) -> str:
    done = subprocess.run(
        ["git", "--no-optional-locks", "-C", str(root), *what], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()
