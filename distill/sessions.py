"""Who worked at a stage, for how long, on what and with which versions: <stage>/sessions.jsonl, a line for each time.

    {"work": "train", "host": .., "device": .., "ranks": 2, "started": .., "seconds": .., "joules": {..}, "versions": {..}}

A session that is killed leaves no line. What a stage is made of does not depend on any of it.
"""

from __future__ import annotations

import json
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
from distill.energy import Energy
from distill.training.distributed import is_distributed, rank, reduce_sums, world_size
from distill.training.stopping import Stopped

PACKAGES = ("torch", "deepspeed", "transformers", "sentence-transformers", "numpy")
FILE = "sessions.jsonl"


@contextmanager
def session(directory: Path, work: str, device: torch.device, *, alone: bool = False) -> Iterator[None]:
    """Adds a line to directory/sessions.jsonl once the block has ended: one of all ranks, where there are ranks.

    alone: of this process, whatever ranks there are. Ranks leave no line where the block raises anything but Stopped, which
    all of them raise: they are not together then. That the line cannot be written is no reason for a stage to fail.
    """
    together = is_distributed() and not alone
    line = {"work": work, "host": socket.gethostname(), "device": device_name(device), "ranks": world_size() if together else 1}
    line |= {"started": round(time.time(), 1), "versions": versions() if alone or rank() == 0 else {}}
    clock, energy = time.monotonic(), Energy(device)

    def write() -> None:
        joules = _over_ranks(energy.joules(), device) if together else energy.joules()
        if alone or rank() == 0:
            seconds = round(time.monotonic() - clock, 1)
            with suppress(OSError), (directory / FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "seconds": seconds, "joules": joules}) + "\n")

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


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file that is only added to; none where there is no file. Half a line, of a kill, is left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def versions() -> dict[str, str]:
    """Of this project, with the commit where it runs from a clone, of Python, and of PACKAGES."""
    found = {"distill": distill.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    commit = _commit(Path(distill.__file__).parents[1])
    return found | ({"commit": commit} if commit else {})


def device_name(device: torch.device) -> str:
    """As its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    return platform.machine()


def _over_ranks(joules: dict[str, float], device: torch.device) -> dict[str, float]:
    """The sum over ranks of what all of them tell."""
    kinds = ("cpu", "gpu")
    sums = {kind: torch.tensor(joules.get(kind, 0.0), dtype=torch.double, device=device) for kind in kinds}
    told = {f"{kind} told": torch.tensor(float(kind in joules), dtype=torch.double, device=device) for kind in kinds}
    total = reduce_sums({**sums, **told})
    return {kind: round(total[kind], 1) for kind in kinds if total[f"{kind} told"] == world_size()}


def _commit(root: Path) -> str | None:
    """The commit of a clone, with + where its files have changed since; None where `root` is none, or git is not there."""
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
